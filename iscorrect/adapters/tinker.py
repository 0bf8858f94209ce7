"""tinker: a loss on log-probs, and weights folded into advantages for servers with their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iscorrect.layout import Layout, pad_sequences, unpad
from iscorrect.loss.correction import Correction
from iscorrect.loss.metrics import Metrics
from iscorrect.loss.policy_loss import PolicyLoss

CustomLoss = Callable[[list[Any], list[Tensor]], tuple[Tensor, dict[str, float]]]


def custom_loss(policy_loss: PolicyLoss) -> CustomLoss:
    """What ``training_client.forward_backward_custom`` takes as its loss.

    Each datum's ``loss_fn_inputs`` hold the sampler's "logprobs", "advantages", and a "mask" where
    not every token counts. The ratio is that of the policy being trained.

    Args:
        policy_loss: any.
    """

    def loss_fn(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        def given(name: str) -> list[Tensor]:
            return [datum.loss_fn_inputs[name].to_torch().float() for datum in data]

        log_probs, present = pad_sequences(logprobs)
        if all("mask" in datum.loss_fn_inputs for datum in data):
            present = pad_sequences([x.bool() for x in given("mask")], value=False)[0]
        loss, metrics = policy_loss(
            log_probs, rollout_log_probs=pad_sequences(given("logprobs"))[0],
            advantages=pad_sequences(given("advantages"))[0], mask=present,
        )
        return loss, metrics.to_floats()

    return loss_fn


def corrected_advantages(
    correction: Correction,
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
        correction: any.
        old_log_probs: "t_i" each, log π_old, nats.
        rollout_log_probs: "t_i" each, log μ, nats.
        advantages: "t_i" each.
        masks: bool "t_i" each; None: every token counts.

    >>> old, rollout = [torch.tensor([-1.0, -1.0])], [torch.tensor([-1.0, -3.0])]
    >>> from iscorrect.loss.presets import token_tis
    >>> ready, metrics = corrected_advantages(
    ...     token_tis(cap=2.0), old_log_probs=old, rollout_log_probs=rollout,
    ...     advantages=[torch.tensor([1.0, 1.0])],
    ... )
    >>> ready
    [tensor([1., 2.])]
    """
    padded, present = pad_sequences(advantages)
    counted = present
    if masks is not None:
        counted = pad_sequences([mask.bool() for mask in masks], value=False)[0]
    weights, _, metrics = correction(
        old_log_probs=pad_sequences(old_log_probs)[0],
        rollout_log_probs=pad_sequences(rollout_log_probs)[0], advantages=padded,
        mask=Layout(counted),
    )
    return unpad(torch.where(counted, padded, 0) * weights, present), metrics
