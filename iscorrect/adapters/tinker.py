"""tinker: a loss on log-probs, and weights folded into advantages for servers with their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iscorrect.adapters.bands import check_no_reference
from iscorrect.adapters.ragged import pad_together
from iscorrect.dumps import DumpWriter
from iscorrect.errors import input_error
from iscorrect.layout import Layout, masked, unpad
from iscorrect.loss.metrics import Metrics
from iscorrect.loss.specs import CorrectionConfig, LossConfig, parse, parse_loss

CustomLoss = Callable[[list[Any], list[Tensor]], tuple[Tensor, dict[str, float]]]


def custom_loss(policy_loss: LossConfig, dumps: DumpWriter | None = None) -> CustomLoss:
    """What ``training_client.forward_backward_custom`` takes as its loss.

    Each datum's ``loss_fn_inputs`` hold the sampler's "logprobs", "advantages", and a "mask" where
    not every token counts. The ratio is that of the policy being trained.

    Args:
        policy_loss: any, or its text.
        dumps: writes both log-probs of every call, counted from 0.

    Raises:
        InputError: a ``reference_kl``; at the call: a datum lacks one of the two, or holds one of
            another length, or "weights" without a mask; a mask holds something else than 0 and 1.
    """
    spec = parse_loss(policy_loss)
    check_no_reference(
        "tinker.custom_loss", spec, "subtract the penalty from the advantages"
    )
    calls = itertools.count()

    def loss_fn(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        rows, present = pad_together(
            "tinker.custom_loss", "pass one value for every target token", log_probs=logprobs,
            rollout=[_input(datum, i, "logprobs") for i, datum in enumerate(data)],
            advantages=[_input(datum, i, "advantages") for i, datum in enumerate(data)],
            mask=[_mask(datum, i) for i, datum in enumerate(data)],
        )
        batch = dict(
            rollout_log_probs=rows["rollout"], advantages=rows["advantages"],
            mask=present & rows["mask"].bool(),
        )
        if dumps is not None:
            dumps.write(step=next(calls), old_log_probs=rows["log_probs"], **batch)
        loss, metrics = spec(rows["log_probs"], **batch)
        return loss, metrics.to_floats()

    return loss_fn


def _input(datum: Any, i: int, name: str) -> Tensor:
    if name not in datum.loss_fn_inputs:
        raise input_error(
            "tinker.custom_loss", f"data[{i}].loss_fn_inputs", expected=f"there with {name!r}",
            got=", ".join(map(repr, datum.loss_fn_inputs)) or "nothing",
            fix=f"pass the {'sampler' if name == 'logprobs' else 'token'}'s {name} in every datum",
        )
    values: Tensor = datum.loss_fn_inputs[name].to_torch().float()
    return values


def _mask(datum: Any, i: int) -> Tensor:
    if "mask" not in datum.loss_fn_inputs:
        if "weights" in datum.loss_fn_inputs:
            raise input_error(
                "tinker.custom_loss", f"data[{i}].loss_fn_inputs", expected="there with a 'mask'"
                " beside 'weights', which this loss does not read", got="'weights' alone",
                fix="pass weights of 0 and 1 as mask, and others times the advantages",
            )
        return torch.ones_like(_input(datum, i, "logprobs"))
    mask = _input(datum, i, "mask")
    _check_mask("tinker.custom_loss", f"data[{i}] mask", mask)
    return mask


def _check_mask(caller: str, argument: str, mask: Tensor) -> None:
    if ((mask != 0) & (mask != 1)).any():
        raise input_error(
            caller, argument, expected="of 0 and 1", got="other values",
            fix="multiply weights into the advantages",
        )


def corrected_advantages(
    correction: CorrectionConfig,
    *,
    old_log_probs: Sequence[Tensor],
    rollout_log_probs: Sequence[Tensor],
    advantages: Sequence[Tensor],
    masks: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Metrics]:
    """Advantages times weights, for a server whose loss takes advantages and nothing else.

        A_t ← w_t A_t

    The same gradient as weighting the loss, for w ≥ 0 and every loss that is homogeneous in the
    advantages: REINFORCE, PPO, CISPO. Only where the server's ratio is π/π_old; a server that
    divides by the sampler's log-probs has corrected already.

    Args:
        correction: any, or its text.
        old_log_probs: "t_i" each, log π_old, nats.
        rollout_log_probs: "t_i" each, log μ, nats.
        advantages: "t_i" each.
        masks: bool "t_i" each; None: every token counts.

    Raises:
        InputError: lists of different lengths, what is no tensor of tokens, or a mask that holds
            something else than 0 and 1.

    >>> old, rollout = [torch.tensor([-1.0, -1.0])], [torch.tensor([-1.0, -3.0])]
    >>> from iscorrect.loss.presets import token_tis
    >>> ready, metrics = corrected_advantages(
    ...     token_tis(cap=2.0), old_log_probs=old, rollout_log_probs=rollout,
    ...     advantages=[torch.tensor([1.0, 1.0])],
    ... )
    >>> ready
    [tensor([1., 2.])]
    """
    rows, present = pad_together(
        "corrected_advantages", "pass one value for every token of each sample",
        advantages=advantages, old_log_probs=old_log_probs, rollout_log_probs=rollout_log_probs,
        **({} if masks is None else {"masks": masks}),
    )
    counted = present
    if masks is not None:
        _check_mask("corrected_advantages", "masks", rows["masks"])
        counted = present & rows["masks"].bool()
    weights, _, metrics = parse(correction)(
        old_log_probs=rows["old_log_probs"], rollout_log_probs=rows["rollout_log_probs"],
        advantages=rows["advantages"], mask=Layout(counted),
    )
    return unpad(masked(rows["advantages"], counted) * weights, present), metrics
