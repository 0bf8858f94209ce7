"""SkyRL: a loss of this library in its registry of policy losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iscorrect.errors import input_error
from iscorrect.layout import masked
from iscorrect.loss.aggregate import Sum
from iscorrect.loss.policy_loss import PolicyLoss

OFF_POLICY_CORRECTION = (
    "tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low",
    "outlier_token_is_threshold_high", "token_mask_is_threshold_low",
    "token_mask_is_threshold_high",
)


def register(name: str, policy_loss: PolicyLoss) -> None:
    """Make a loss one of SkyRL's: ``trainer.algorithm.policy_loss_type=name``.

    Args:
        name: as in the configuration.
        policy_loss: aggregated by "sum", since SkyRL folds its denominators into the advantages.

    Raises:
        InputError: another aggregation; at the call: SkyRL's own correction is configured too.
    """
    from skyrl.backends.skyrl_train.utils.ppo_utils import register_policy_loss  # type: ignore[import-not-found]

    if policy_loss.aggregation != Sum() or policy_loss.over != "mask":
        raise input_error(
            "skyrl.register", "policy_loss", expected="aggregation 'sum' over the mask",
            got=f"{policy_loss.aggregation!r} over {policy_loss.over!r}",
            fix="pass aggregation='sum'; SkyRL divides the advantages",
        )

    def corrected(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        own = getattr(config, "off_policy_correction", None)
        for setting in OFF_POLICY_CORRECTION:
            if getattr(own, setting, None) is not None:
                raise input_error(
                    "skyrl", f"trainer.algorithm.off_policy_correction.{setting}",
                    expected="null, since the registered loss corrects", got=getattr(own, setting),
                    fix=f"set trainer.algorithm.off_policy_correction.{setting}=null",
                )
        if rollout_logprobs is None:
            raise input_error(
                "skyrl", "rollout_logprobs", expected="the engine's log-probs", got="None",
                fix="set generator.sampling_params.logprobs=0",
            )
        mask = (torch.ones_like(log_probs) if loss_mask is None else loss_mask).bool()
        loss, metrics = policy_loss(
            log_probs, rollout_log_probs=masked(rollout_logprobs, mask),
            old_log_probs=old_log_probs, advantages=advantages, mask=mask,
        )
        return loss, metrics.to_floats()

    register_policy_loss(name)(corrected)
