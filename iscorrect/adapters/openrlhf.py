"""OpenRLHF: a module in the place of its ``PolicyLoss``."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from torch import Tensor

from iscorrect.adapters.bands import check_no_reference, clamp_to
from iscorrect.dumps import DumpWriter
from iscorrect.errors import check_choice, check_flag, input_error
from iscorrect.loss.aggregate import SequenceMeanTokenSum, TokenMean
from iscorrect.loss.bounds import Ignore, Mask
from iscorrect.loss.correction import Correction
from iscorrect.loss.rules import DivergenceAbove, Over, RatioOutside, Rule
from iscorrect.loss.specs import LossConfig, parse_loss

LEVEL = "--algo.advantage.is_correction_level"


def install(policy_loss: LossConfig, dumps: DumpWriter | None = None) -> None:
    """Let OpenRLHF's actor build :class:`CorrectedPolicyLoss` where it builds ``PolicyLoss``.

    To be called in every Ray worker, as a ``worker_process_setup_hook``.

    Args:
        policy_loss: or its text; aggregated by "token-mean", or by one of "seq-…".
        dumps: writes both log-probs of every call, counted from 0.

    Raises:
        InputError: another aggregation, or a ``reference_kl``; when the actor is made: a setting of
            OpenRLHF would pass no rollout log-probs, or be ignored.
    """
    from openrlhf.trainer.ray import ppo_actor

    CorrectedPolicyLoss(policy_loss)

    def build(
        *,
        is_correction_level: str = "off",
        policy_loss_type: str = "ppo",
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        **_: Any,
    ) -> CorrectedPolicyLoss:
        if is_correction_level == "off":
            raise input_error(
                "openrlhf", LEVEL, expected="on: without it no rollout log-probs are passed",
                got="'off'", fix=f"start OpenRLHF with {LEVEL} token",
            )
        idle = {
            "--actor.policy_loss_type": (policy_loss_type, "ppo", "PPOClip(level='geometric')"),
            "--actor.dual_clip": (dual_clip, None, "PPOClip(dual=...)"),
        }
        for setting, (value, default, part) in idle.items():
            if value != default:
                raise input_error(
                    "openrlhf", setting, expected=f"{default!r}, since the policy_loss decides",
                    got=repr(value), fix=f"drop it, and pass objective={part}",
                )
        loss_fn = CorrectedPolicyLoss(policy_loss, dumps)
        check_flag("openrlhf", "token_level_loss", token_level_loss)
        if loss_fn.by_token != token_level_loss:
            how = "token-mean" if token_level_loss else "seq-mean-token-mean"
            raise input_error(
                "openrlhf", "--actor.loss_agg_mode", expected="as the policy_loss aggregates, which"
                " decides", got=f"{how!r}, and {loss_fn.policy_loss.aggregation!r}",
                fix=f"pass aggregation={how!r}, or another --actor.loss_agg_mode",
            )
        return loss_fn

    setattr(ppo_actor, "PolicyLoss", build)  # noqa: B010


class CorrectedPolicyLoss(torch.nn.Module):
    """A loss of this library with the signature of OpenRLHF's ``PolicyLoss``.

    Args:
        policy_loss: or its text; aggregated by "token-mean", or by one of "seq-…".
        dumps: writes both log-probs of every call, counted from 0.

    Raises:
        InputError: another aggregation, or a ``reference_kl``; at the call: no rollout log-probs.
    """

    def __init__(self, policy_loss: LossConfig, dumps: DumpWriter | None = None) -> None:
        super().__init__()
        spec = parse_loss(policy_loss)
        if not isinstance(spec.aggregation, (TokenMean, SequenceMeanTokenSum)):
            raise input_error(
                "CorrectedPolicyLoss", "policy_loss", expected="one with a denominator",
                got=repr(spec.aggregation), fix="pass aggregation='token-mean'",
            )
        check_no_reference("CorrectedPolicyLoss", spec, "start OpenRLHF with --algo.kl.use_loss")
        self.by_token = isinstance(spec.aggregation, TokenMean)
        self.policy_loss, self.dumps, self.calls = spec, dumps, itertools.count()

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Loss, clipped share, KL of old and current policy, KL of engine and old policy, rejected.

        The last is the share of tokens whose weight is 0.
        """
        if rollout_log_probs is None:
            raise input_error(
                "CorrectedPolicyLoss", "rollout_log_probs", expected="the engine's log-probs",
                got="None", fix=f"start OpenRLHF with {LEVEL} token",
            )
        count = batch_num_tokens if self.by_token else global_batch_size
        mask = (torch.ones_like(log_probs) if action_mask is None else action_mask).bool()
        if self.dumps is not None:
            self.dumps.write(
                step=next(self.calls), mask=mask, rollout_log_probs=rollout_log_probs,
                old_log_probs=old_log_probs, advantages=advantages,
            )
        loss, metrics = self.policy_loss(
            log_probs, rollout_log_probs=rollout_log_probs, old_log_probs=old_log_probs,
            advantages=advantages, mask=mask,
            # gradients are averaged over the data-parallel ranks; an empty batch has loss 0
            normalizer=None if count is None else torch.as_tensor(count).clamp(min=1) / dp_size,
        )
        read = metrics.as_tensors()
        clipped = read.get("policy/clipped", loss.new_zeros(()))
        return (
            loss, clipped, read["policy/kl_k1"], read["mismatch/kl_k1"], read["is/rejected"]
        )


def from_openrlhf(
    is_correction_level: Literal["off", "token", "seq"] = "off",
    is_correction_mode: Literal["mask", "clip"] = "mask",
    is_correction_gating: Literal["ratio", "binary_kl", "tv"] = "ratio",
    is_correction_threshold: tuple[float, ...] = (0.5, 5.0),
) -> Correction:
    """OpenRLHF's ``--algo.advantage.is_correction_…``.

    "clip" raises small weights to the lower threshold, which published ablations find harmful; a
    sequence's ratio is the geometric mean, and the sequences that are kept have the token's own
    weights, without a bound. Where the policies agree, OpenRLHF's binary KL is often below 0 by
    rounding and drops the token; here it is at least 0 and keeps it.

    Args:
        is_correction_level: "off" for weights of 1.
        is_correction_mode: "mask" drops what leaves the thresholds, "clip" holds ratios inside.
        is_correction_gating: what the thresholds are on: the ratio, or KL(μ‖π_old) or total
            variation between two outcomes: the sampled token and all others.
        is_correction_threshold: (low, high), or (high,) alone.

    Raises:
        InputError: what OpenRLHF refuses too.

    References:
        openrlhf/models/loss.py (0.11.2).

    >>> from_openrlhf("token", "clip").bound
    Clip(low=0.5, high=5.0)
    """
    choices = {
        "is_correction_level": (is_correction_level, ("off", "token", "seq")),
        "is_correction_mode": (is_correction_mode, ("mask", "clip")),
        "is_correction_gating": (is_correction_gating, ("ratio", "binary_kl", "tv")),
    }
    for name, (value, known) in choices.items():
        check_choice("from_openrlhf", name, value, known)
    *lower, high = is_correction_threshold
    low = lower[0] if lower else 0.0
    if is_correction_level == "off":
        return Correction(bound=Ignore())
    divergence = is_correction_gating != "ratio"
    if is_correction_mode == "clip" and (is_correction_level == "seq" or divergence):
        raise input_error(
            "from_openrlhf", "is_correction_mode", got="'clip'",
            expected="'mask' with level 'seq' or a divergence",
            fix="only a token's ratio can be clipped",
        )
    if divergence and low > 0:
        raise input_error(
            "from_openrlhf", "is_correction_threshold", expected="one upper bound of a divergence",
            got=repr(is_correction_threshold), fix="pass (0.003,)",
        )
    if is_correction_mode == "clip":
        return Correction(bound=clamp_to(low, high))
    if is_correction_level == "token" and not divergence:
        return Correction(bound=Mask(low, high))
    rule: Rule
    if divergence:
        over: Over = "mean" if is_correction_level == "seq" else "token"
        kind = is_correction_gating.replace("_", "-")
        rule = DivergenceAbove(limit=high, estimator=kind, over=over)
    else:
        rule = RatioOutside(level="geometric", low=low, high=high)
    return Correction(reject=(rule,))
