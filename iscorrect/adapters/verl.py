"""verl: corrections in place of its own, and objectives as policy losses.

verl imports the modules named in ``VERL_USE_EXTERNAL_MODULES``; call these functions in one of
them.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from iscorrect.adapters.verl_metrics import verl_metrics
from iscorrect.bounds import Ignore
from iscorrect.correction import Correction
from iscorrect.dumps import DumpWriter
from iscorrect.errors import input_error
from iscorrect.layout import Layout, masked
from iscorrect.metrics import policy_metrics
from iscorrect.objectives import Objective, with_clipped

Hook = Callable[[Any, Mapping[str, Any]], tuple[Any, dict[str, float]]]


def install(correction: Correction, dumps: DumpWriter | None = None) -> None:
    """Let a correction make verl's ``rollout_is_weights`` and ``response_mask``.

    Args:
        correction: must not look at advantages, which verl computes later.
        dumps: writes both log-probs of every batch, counted from 0 where verl names no step.
    """
    from verl.trainer.ppo import rollout_corr_helper

    name = "compute_rollout_correction_and_add_to_batch"
    hook = batch_hook(correction, dumps)
    setattr(rollout_corr_helper, name, hook)
    # binds the function when it is imported, which may have happened already
    bound = sys.modules.get("verl.trainer.ppo.v1.trainer_base")
    if bound is not None:
        setattr(bound, name, hook)


def batch_hook(correction: Correction, dumps: DumpWriter | None = None) -> Hook:
    """What stands for verl's ``compute_rollout_correction_and_add_to_batch``.

    As in verl, tokens that a rule rejects leave ``response_mask``, those whose weight the bound
    makes 0 stay in it. Where a rule rejects the whole batch the mask stays too, with weights of 0.
    """
    batches = itertools.count()

    def add_to_batch(batch: Any, config: Mapping[str, Any]) -> tuple[Any, dict[str, float]]:
        for setting in ("rollout_is", "rollout_rs"):
            if config.get(setting) is not None:
                raise input_error(
                    "iscorrect.adapters.verl", f"algorithm.rollout_correction.{setting}",
                    expected="null, since the correction stands for it",
                    got=repr(config.get(setting)),
                    fix=f"set algorithm.rollout_correction.{setting}=null, or pass"
                    " from_verl(...) of these settings to install",
                )
        response_mask = batch.batch["response_mask"]
        evidence = dict(
            old_log_probs=batch.batch["old_log_probs"],
            rollout_log_probs=batch.batch["rollout_log_probs"], mask=response_mask.bool(),
        )
        weights, _, metrics = correction(**evidence)
        rules = dataclasses.replace(correction, bound=Ignore(), normalize=False)
        keep = rules(**evidence).keep
        keep = torch.where(keep.any(), keep, evidence["mask"])
        if dumps is not None:
            number = next(batches)
            dumps.write(step=int(batch.meta_info.get("global_steps", number)), **evidence)
        batch.batch["rollout_is_weights"] = weights
        batch.batch["response_mask"] = (response_mask * keep).to(response_mask.dtype)
        return batch, verl_metrics(correction, keep=keep, **evidence) | metrics.to_floats()

    return add_to_batch


def register_loss(name: str, objective: Objective) -> None:
    """Make an objective a policy loss of verl: ``actor.policy_loss.loss_mode=name``.

    verl's weights multiply it, verl aggregates.

    Args:
        name: not one of verl's own.
        objective: callable (log_probs, old_log_probs, advantages, layout) -> loss "b t".

    Raises:
        InputError: verl has a loss of that name.
    """
    from verl.trainer.ppo import core_algos

    if name in core_algos.POLICY_LOSS_REGISTRY:
        raise input_error(
            "register_loss", "name", expected="a name that verl does not use", got=repr(name),
            fix=f"pass 'iscorrect_{name}'",
        )

    def policy_loss(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        layout = Layout(response_mask.bool())
        log_probs, old, advantages = (
            masked(x.float(), layout.mask) for x in (log_prob, old_log_prob, advantages)
        )
        per_token, clipped = with_clipped(objective, log_probs, old, advantages, layout)
        if rollout_is_weights is not None:
            per_token = per_token * masked(rollout_is_weights, layout.mask)
        loss = core_algos.agg_loss(
            loss_mat=per_token, loss_mask=response_mask, loss_agg_mode=loss_agg_mode,
            **config.global_batch_info,
        )
        metrics = policy_metrics((log_probs - old).detach(), layout, clipped)
        return loss, metrics.to_floats()

    core_algos.register_policy_loss(name)(policy_loss)
