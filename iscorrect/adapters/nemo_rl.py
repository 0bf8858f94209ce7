"""NeMo-RL: a ``LossFunction`` for the trainers that take one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iscorrect.adapters.averages import token_metrics
from iscorrect.adapters.bands import MaskType, Overflow, truncated
from iscorrect.errors import input_error
from iscorrect.layout import masked
from iscorrect.loss.aggregate import SequenceMeanTokenSum, TokenMean
from iscorrect.loss.bounds import Ignore
from iscorrect.loss.correction import Correction
from iscorrect.loss.ratios import Level
from iscorrect.loss.specs import LossConfig, parse_loss

MEANS = (
    "mismatch/kl_k1", "mismatch/kl_k3", "mismatch/log_prob_diff/mean", "is/rejected", "is/nonfinite"
)
"""Metrics that are means over tokens, and so add up over micro-batches when scaled."""


class CorrectedLoss:
    """A loss of this library with the signature of NeMo-RL's ``LossFunction``.

    Args:
        policy_loss: or its text; aggregated by "token-mean" or one of "seq-…", over NeMo-RL's
            global counts.
        use_fused_linear_logprobs: as ``policy.megatron_cfg.use_fused_linear_logprobs`` says.

    Raises:
        InputError: another aggregation, or parts that look across the batch; at the call: NeMo-RL
            has not scored the responses.
    """

    def __init__(
        self, policy_loss: LossConfig, use_fused_linear_logprobs: bool = False
    ) -> None:
        from nemo_rl.algorithms.loss.interfaces import (
            LossInputType,
            LossType,
            MetricNormalizer,
        )

        spec = parse_loss(policy_loss)
        how = spec.aggregation
        if not isinstance(how, (TokenMean, SequenceMeanTokenSum)) or spec.scope == "batch":
            raise input_error(
                "CorrectedLoss", "policy_loss", expected="one whose micro-batches add up: by tokens"
                " or sequences, with bounds that do not look across the batch",
                got=repr(spec), fix="pass aggregation='token-mean' and a fixed bound",
            )
        self.policy_loss = spec
        self.by_token = isinstance(how, TokenMean)
        self.loss_type = LossType.TOKEN_LEVEL if self.by_token else LossType.SEQUENCE_LEVEL
        self.input_type = LossInputType.LOGPROB
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        by = MetricNormalizer
        self.metric_normalizations = dict.fromkeys(
            (*MEANS, "gen_kl_error", "token_mult_prob_error"), by.TOKENS
        ) | {"loss": by.TOKENS if self.by_token else by.SEQUENCES, "num_valid_samples": by.NONE}

    def __call__(
        self,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        next_token_logprobs: Tensor,
        **_: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        """The micro-batch's share of the loss, and of the metrics; both add up.

        Args:
            data: "b s" each, of which the first position predicts nothing.
            global_valid_seqs: "", of the whole batch.
            global_valid_toks: "", of the whole batch.
            next_token_logprobs: "b s-1", with gradient.
        """
        mask = data["token_mask"][:, 1:].bool() & data["sample_mask"].bool()[:, None]
        old, rollout = data["prev_logprobs"][:, 1:], data["generation_logprobs"][:, 1:]
        if not masked(old, mask).any() and (masked(rollout, mask).abs() > 0.01).any():
            raise input_error(
                "nemo_rl", "loss_fn.force_on_policy_ratio", expected="false: with it NeMo-RL passes"
                " zeros for the trainer's log-probs", got="zeros",
                fix="set loss_fn.force_on_policy_ratio=false",
            )
        reference = None
        if self.policy_loss.reference_kl is not None:
            reference = data["reference_policy_logprobs"][:, 1:]
        count = global_valid_toks if self.by_token else global_valid_seqs
        loss, metrics = self.policy_loss(
            next_token_logprobs, rollout_log_probs=rollout, old_log_probs=old,
            advantages=data["advantages"][:, 1:], ref_log_probs=reference, mask=mask,
            normalizer=count.clamp(min=1),
        )
        read, tokens = metrics.to_floats(), max(float(global_valid_toks), 1.0)
        share = read["batch/tokens"] / tokens
        logged = {name: read[name] * share for name in MEANS}
        difference = token_metrics(
            old_log_probs=old, rollout_log_probs=rollout, mask=mask, weights=mask, keep=mask
        )["mismatch/log_prob_diff"]
        return loss, logged | {
            "loss": loss.item(), "num_valid_samples": data["sample_mask"].sum().item(),
            # read by the trainers themselves
            "gen_kl_error": logged["mismatch/kl_k3"],
            "token_mult_prob_error": masked(difference.exp(), mask).sum().item() / tokens,
        }


def from_nemo_rl(
    use_importance_sampling_correction: bool = True,
    truncated_importance_sampling_ratio: float | None = None,
    truncated_importance_sampling_ratio_min: float | None = None,
    truncated_importance_sampling_type: MaskType | None = "tis",
    sequence_level_importance_ratios: bool = False,
) -> Correction:
    """NeMo-RL's ``loss_fn`` settings of the same names.

    A ratio that overflows float32 gets weight 0, though it is the heaviest of all.

    Args:
        use_importance_sampling_correction: False for weights of 1.
        truncated_importance_sampling_ratio: upper bound; None for unbounded weights.
        truncated_importance_sampling_ratio_min: lower bound; None for 0.
        truncated_importance_sampling_type: "tis" clamps, "icepop" masks, "seq-mask-tis" masks
            sequences by their geometric mean and leaves token weights unbounded.
        sequence_level_importance_ratios: the weight is the product over the sequence.

    Raises:
        InputError: an unknown type.

    >>> from_nemo_rl(truncated_importance_sampling_ratio=2.0).bound
    Truncate(cap=2.0)
    """
    if not use_importance_sampling_correction:
        return Correction(bound=Ignore())
    level: Level = "sequence" if sequence_level_importance_ratios else "token"
    high, low = truncated_importance_sampling_ratio, truncated_importance_sampling_ratio_min
    if high is None:
        return Correction(level=level, reject=(Overflow(),))
    kind = truncated_importance_sampling_type or "tis"
    return truncated("from_nemo_rl", level, kind, low, high, (Overflow(),))
