"""OpenRLHF: a module in the place of its ``PolicyLoss``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iscorrect.adapters.bands import MaskType, truncated
from iscorrect.errors import input_error
from iscorrect.loss.aggregate import SequenceMeanTokenSum, TokenMean
from iscorrect.loss.correction import Correction
from iscorrect.loss.policy_loss import PolicyLoss


class CorrectedPolicyLoss(torch.nn.Module):
    """A loss of this library with the signature of OpenRLHF's ``PolicyLoss``.

    Args:
        policy_loss: aggregated by "token-mean", or by one of "seq-…".

    Raises:
        InputError: another aggregation; at the call: no rollout log-probs.
    """

    def __init__(self, policy_loss: PolicyLoss) -> None:
        super().__init__()
        if not isinstance(policy_loss.aggregation, (TokenMean, SequenceMeanTokenSum)):
            raise input_error(
                "CorrectedPolicyLoss", "policy_loss", expected="one with a denominator",
                got=repr(policy_loss.aggregation), fix="pass aggregation='token-mean'",
            )
        self.policy_loss = policy_loss

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Any = None,
        global_batch_size: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, clipped share, KL of old and current policy, KL of engine and old policy."""
        if rollout_log_probs is None:
            raise input_error(
                "CorrectedPolicyLoss", "rollout_log_probs", expected="the engine's log-probs",
                got="None", fix="start OpenRLHF with --enable_vllm_is_correction",
            )
        by_token = isinstance(self.policy_loss.aggregation, TokenMean)
        count = batch_num_tokens if by_token else global_batch_size
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        loss, metrics = self.policy_loss(
            log_probs, rollout_log_probs=rollout_log_probs, old_log_probs=old_log_probs,
            advantages=advantages, mask=mask.bool(),
            # gradients are averaged over the data-parallel ranks
            normalizer=None if count is None else count / dp_size,
        )
        read = metrics.as_tensors()
        clipped = read.get("policy/clipped", loss.new_zeros(()))
        return loss, clipped, read["policy/kl_k1"], read["mismatch/kl_k1"]


def from_openrlhf(
    vllm_is_correction_type: MaskType = "tis",
    vllm_is_truncated_threshold: tuple[float, float] = (0.5, 5.0),
) -> Correction:
    """OpenRLHF's ``--vllm_is_correction_type`` and ``--vllm_is_truncated_threshold``.

    Its "tis" raises small weights to the lower threshold, which published ablations find harmful;
    its "seq-mask-tis" does not truncate.

    Args:
        vllm_is_correction_type: as for :func:`from_nemo_rl`.
        vllm_is_truncated_threshold: (low, high).

    Raises:
        InputError: an unknown type.

    >>> from_openrlhf().bound
    Clip(low=0.5, high=5.0)
    """
    low, high = vllm_is_truncated_threshold
    return truncated("from_openrlhf", "token", vllm_is_correction_type, low, high, ())
