"""NeMo-RL: a ``LossFunction`` for the trainers that take one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from iscorrect.adapters.averages import token_metrics
from iscorrect.adapters.bands import Overflow, check_adds_up, clamp_to
from iscorrect.errors import InputError, check_choice, check_flag, check_number, input_error
from iscorrect.layout import masked
from iscorrect.loss.aggregate import SequenceMeanTokenSum, TokenMean
from iscorrect.loss.bounds import Ignore, Mask
from iscorrect.loss.correction import Correction
from iscorrect.loss.ratios import Level
from iscorrect.loss.rules import RatioOutside
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
            has not scored the responses, or not by the reference of a ``reference_kl``.
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
        if not isinstance(how, (TokenMean, SequenceMeanTokenSum)):
            raise input_error(
                "CorrectedLoss", "policy_loss", expected="one whose micro-batches add up: by tokens"
                " or sequences", got=repr(how), fix="pass aggregation='token-mean'",
            )
        check_adds_up("CorrectedLoss", spec, "a micro-batch")
        check_flag("CorrectedLoss", "use_fused_linear_logprobs", use_fused_linear_logprobs)
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
        scored, reference = {"prev_logprobs": old}, None
        if self.policy_loss.reference_kl is not None:
            reference = _reference(data)
            scored["reference_policy_logprobs"] = reference
        _check_scored(scored, rollout, mask)
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


class _Unscored(NamedTuple):
    """The setting with which NeMo-RL passes zeros for a model's log-probs."""

    setting: str
    expected: str
    fix: str

    def error(self, got: str) -> InputError:
        return input_error("nemo_rl", self.setting, expected=self.expected, got=got, fix=self.fix)


UNSCORED = {
    "prev_logprobs": _Unscored(
        "loss_fn.force_on_policy_ratio",
        "false: with it NeMo-RL passes zeros for the trainer's log-probs",
        "set loss_fn.force_on_policy_ratio=false",
    ),
    "reference_policy_logprobs": _Unscored(
        "loss_fn.reference_policy_kl_penalty",
        "above 0 with a reference_kl: at 0 NeMo-RL has no log-probs of the reference",
        "set loss_fn.reference_policy_kl_penalty above 0, so that NeMo-RL scores the reference",
    ),
}


def _reference(data: Mapping[str, Tensor]) -> Tensor:
    name = "reference_policy_logprobs"
    if name not in data:
        raise UNSCORED[name].error(f"no {name}")
    return data[name][:, 1:]


def _check_scored(scored: dict[str, Tensor], rollout: Tensor, mask: Tensor) -> None:
    """Raise where log-probs are zeros on tokens that the engine was not sure of."""
    unsure = (masked(rollout, mask).abs() > 0.01).any()
    zeros = torch.stack([unsure & ~masked(x, mask).any() for x in scored.values()])
    for name, found in zip(scored, zeros.tolist(), strict=True):
        if found:
            raise UNSCORED[name].error("zeros")


MaskType = Literal["tis", "icepop", "seq-mask-tis"]


def from_nemo_rl(
    use_importance_sampling_correction: bool = False,
    truncated_importance_sampling_ratio: float | None = None,
    truncated_importance_sampling_ratio_min: float | None = None,
    truncated_importance_sampling_type: MaskType | None = None,
    sequence_level_importance_ratios: bool = False,
) -> Correction:
    """NeMo-RL's ``loss_fn`` settings of the same names, with its defaults.

    A ratio that overflows float32 gets weight 0, though it is the heaviest of all.

    Args:
        use_importance_sampling_correction: False for weights of 1.
        truncated_importance_sampling_ratio: upper bound, given exactly where there is a type.
        truncated_importance_sampling_ratio_min: lower bound; None, of "tis" alone, for 0.
        truncated_importance_sampling_type: "tis" clamps, "icepop" masks, "seq-mask-tis" masks
            sequences by their geometric mean and leaves token weights unbounded; None for
            unbounded weights.
        sequence_level_importance_ratios: the weight is the product over the sequence.

    Raises:
        InputError: what NeMo-RL refuses too.

    References:
        nemo_rl/algorithms/loss/loss_functions.py (7ea279abf, 2026-08-22).

    >>> from_nemo_rl(True, 2.0, truncated_importance_sampling_type="tis").bound
    Truncate(cap=2.0)
    """
    for name, flag in {
        "use_importance_sampling_correction": use_importance_sampling_correction,
        "sequence_level_importance_ratios": sequence_level_importance_ratios,
    }.items():
        check_flag("from_nemo_rl", name, flag)
    kind, weighted = truncated_importance_sampling_type, use_importance_sampling_correction
    high, low = truncated_importance_sampling_ratio, truncated_importance_sampling_ratio_min
    _check_truncation(kind, low, high, weighted, sequence_level_importance_ratios)
    if not weighted:
        return Correction(bound=Ignore())
    level: Level = "sequence" if sequence_level_importance_ratios else "token"
    finite = Overflow()
    if kind is None or high is None:
        return Correction(level=level, reject=(finite,))
    if kind == "tis":
        return Correction(level=level, bound=clamp_to(low, high), reject=(finite,))
    if kind == "icepop":
        return Correction(level=level, bound=Mask(low or 0.0, high), reject=(finite,))
    band = RatioOutside(level="geometric", low=low or 0.0, high=high)
    return Correction(level=level, reject=(band, finite))


def _check_truncation(
    kind: MaskType | None, low: float | None, high: float | None, weighted: bool, sequence: bool
) -> None:
    caller, name = "from_nemo_rl", "truncated_importance_sampling_type"
    if kind is None:
        if high is not None:
            raise input_error(
                caller, name, expected="given with a truncated_importance_sampling_ratio",
                got="None", fix=f"pass {name}='tis'",
            )
        return
    check_choice(caller, name, kind, get_args(MaskType))
    if not weighted:
        raise input_error(
            caller, "use_importance_sampling_correction", expected=f"True with type {kind!r}",
            got="False", fix="pass use_importance_sampling_correction=True",
        )
    if kind == "seq-mask-tis" and sequence:
        raise input_error(
            caller, "sequence_level_importance_ratios", expected="False with type 'seq-mask-tis',"
            " whose weights are of tokens", got="True", fix="take 'tis' or 'icepop'",
        )
    name = "truncated_importance_sampling_ratio"
    check_number(caller, name, high, "the upper bound of the ratio", above=0)
    assert high is not None
    check_number(
        caller, f"{name}_min", low, "the lower bound of the ratio", least=0, most=high,
        optional=kind == "tis",
    )
