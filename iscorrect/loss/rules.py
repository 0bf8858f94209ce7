"""Rejection rules: which tokens, or whose sequences, leave the loss.

A rule is any callable ``(evidence) -> keep``, bool "b t". Each looks at the raw evidence, not at
what another rule has left, so that their order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from iscorrect.errors import check_choice, check_number
from iscorrect.layout import Layout
from iscorrect.loss.divergences import PAIRS, Estimator, binary_kl, estimator, probability_gap
from iscorrect.loss.evidence import Evidence, Scope, level_scope
from iscorrect.loss.ratios import Level, at_level, check_band, check_level, ratio as ratio_of
from iscorrect.ranks import accumulator, gather_over

Rule = Callable[[Evidence], Tensor]
Over = Literal["token", "mean", "sum", "max"]


def reduced(x: Tensor, layout: Layout, over: Over) -> Tensor:
    """Values "b t" as what they come to over their sequence, on each of its tokens.

    >>> reduced(torch.tensor([[1.0, 3.0]]), Layout(torch.ones(1, 2, dtype=torch.bool)), "mean")
    tensor([[2., 2.]])
    """
    if over == "mean":
        return layout.sequence_mean(x)
    if over == "sum":
        return layout.sequence_total(x)
    return layout.sequence_max(x) if over == "max" else x


@dataclass(frozen=True, kw_only=True)
class RatioOutside:
    """Drop every unit whose ratio leaves a band.

        keep = 1{a ≤ ρ_level ≤ b}

    Args:
        level: whose ratio is looked at, independent of the level of the weights.
        low: a ≥ 0.
        high: b ≥ a; None for no upper bound.

    Raises:
        InputError: a negative bound, low > high, or an unknown level.

    References:
        Geometric: Liu et al., "When speed kills stability" (2025), as Geo-RS; verl's
        ``seq_mean_k1`` with the bounds meant for ρ.

    >>> RatioOutside(level="geometric", low=0.999, high=1.001)
    RatioOutside(level='geometric', low=0.999, high=1.001)
    """

    level: Level = "geometric"
    low: float = 0.0
    high: float | None = None

    def __post_init__(self) -> None:
        check_level("RatioOutside", self.level)
        check_number("RatioOutside", "low", self.low, "a bound on the ratio itself", least=0)
        check_band("RatioOutside", self.low, self.high)

    @property
    def scope(self) -> Scope:
        """"sequence" at every level but the token's."""
        return level_scope(self.level)

    def __call__(self, evidence: Evidence) -> Tensor:
        ratio = ratio_of(at_level(evidence.log_ratio, evidence.layout, self.level))
        keep = ratio >= self.low
        return keep if self.high is None else keep & (ratio <= self.high)


@dataclass(frozen=True, kw_only=True)
class DivergenceAbove:
    """Drop tokens or sequences where the two policies are farther apart than a limit.

        keep = 1{R_t D_t ≤ limit},  R: the token's own, or its sequence's mean, sum or max,
        D = k(log ρ), an estimate of KL(μ‖π_old), or of {token, any other}
            KL_bin(q‖p) ("binary-kl") or |p − q| ("tv"),  p = π_old(token), q = μ(token)

    Args:
        limit: nats, a probability for "tv"; per token for "token", "mean" and "max", per sequence
            for "sum".
        estimator: "k1", "k2", "k3", "binary-kl", "tv", or a callable on log-ratios.
        over: R. With k1 opposite signs cancel in a mean.

    Raises:
        InputError: an unknown estimator or reduction, or a limit that is no number.

    References:
        Trust-region masking (arXiv 2512.23075): k2 over "max", k3 over "mean". OpenRLHF 0.11 and
        molt gate by "binary-kl" and "tv" over "token" and "mean", FlashREINFORCE by "binary-kl"
        over "mean" (3e-3 to 5e-3). prime-rl's IPO is "tv" over "token" (0.3).

    >>> DivergenceAbove(limit=0.3, estimator="tv", over="token").scope
    'token'
    """

    limit: float
    estimator: str | Estimator = "k3"
    over: Over = "mean"

    def __post_init__(self) -> None:
        if not self._of_pairs():
            estimator("DivergenceAbove", self.estimator, PAIRS)
        check_choice("DivergenceAbove", "over", self.over, get_args(Over))
        check_number("DivergenceAbove", "limit", self.limit, "a divergence in nats")

    @property
    def scope(self) -> Scope:
        """"sequence" unless over="token"."""
        return "token" if self.over == "token" else "sequence"

    def __call__(self, evidence: Evidence) -> Tensor:
        value = reduced(self._divergence(evidence), evidence.layout, self.over)
        return value <= self.limit

    def _of_pairs(self) -> bool:
        return isinstance(self.estimator, str) and self.estimator in PAIRS

    def _divergence(self, evidence: Evidence) -> Tensor:
        if self._of_pairs():
            pair = PAIRS[str(self.estimator)]
            return pair(evidence.rollout_log_probs, evidence.old_log_probs)
        return estimator("DivergenceAbove", self.estimator, PAIRS)(evidence.log_ratio)


@dataclass(frozen=True, kw_only=True)
class Veto:
    """Drop the whole sequence if a single token's ratio is out of all proportion.

        keep = 1{a ≤ min_t ρ_t and max_t ρ_t ≤ b}

    Args:
        low: a ≥ 0.
        high: b ≥ a; None for no upper bound.

    Raises:
        InputError: a negative bound, or low > high.

    References:
        slime's example `mis.py` (low 1e-4), SkyRL's outlier mask (both sides). It guards against
        wrong tokens, not against rounding.
    """

    low: float = 1e-4
    high: float | None = None
    scope: ClassVar[Scope] = "sequence"

    def __post_init__(self) -> None:
        check_number("Veto", "low", self.low, "a bound on the ratio itself", least=0)
        check_band("Veto", self.low, self.high)

    def __call__(self, evidence: Evidence) -> Tensor:
        ratio = ratio_of(evidence.log_ratio)
        outside = ratio < self.low
        if self.high is not None:
            outside = outside | (ratio > self.high)
        return evidence.layout.sequence_max(outside.to(ratio.dtype)) <= 0


@dataclass(frozen=True, kw_only=True)
class BinaryKL:
    """Drop tokens whose two-outcome KL is large in either direction.

        keep = 1{KL_bin(p‖q) ≤ φ and KL_bin(q‖p) ≤ φ},  p = π_old(token), q = μ(token)

    Args:
        limit: φ ≥ 0, nats.

    Raises:
        InputError: a negative limit.

    References:
        KPop (Ant Group and NUS, 2026), φ = 0.1.
    """

    limit: float = 0.1
    scope: ClassVar[Scope] = "token"

    def __post_init__(self) -> None:
        check_number("BinaryKL", "limit", self.limit, "a divergence in nats", least=0)

    def __call__(self, evidence: Evidence) -> Tensor:
        p, q = evidence.old_log_probs, evidence.rollout_log_probs
        return (binary_kl(p, q) <= self.limit) & (binary_kl(q, p) <= self.limit)


@dataclass(frozen=True, kw_only=True)
class ProbabilityShift:
    """Drop tokens that the update has already pushed far the way it would push them again.

        drop = (A > 0 and p > q or A < 0 and p < q) and D(q, p) > δ,
        D = |p − q| ("tv") or KL_bin(q‖p) ("kl"),  p = π_old(token), q = μ(token)

    Args:
        limit: δ ≥ 0.
        divergence: "tv" or "kl".

    Raises:
        InputError: a negative limit, an unknown divergence; at the call: no advantages were given.

    References:
        DPPO (arXiv 2602.04879): 0.15 to 0.2 for "tv", 0.05 for "kl". Its p is the policy being
        trained: omit ``old_log_probs``.
    """

    limit: float = 0.15
    divergence: Literal["tv", "kl"] = "tv"
    scope: ClassVar[Scope] = "token"

    def __post_init__(self) -> None:
        check_choice("ProbabilityShift", "divergence", self.divergence, ("tv", "kl"))
        what = "a distance of probabilities" if self.divergence == "tv" else "a divergence in nats"
        check_number("ProbabilityShift", "limit", self.limit, what, least=0)

    def __call__(self, evidence: Evidence) -> Tensor:
        advantages = evidence.advantages("ProbabilityShift")
        p, q = evidence.old_log_probs, evidence.rollout_log_probs
        pushed = ((advantages > 0) & (p > q)) | ((advantages < 0) & (p < q))
        shift = probability_gap(p, q) if self.divergence == "tv" else binary_kl(q, p)
        return ~(pushed & (shift > self.limit))


@dataclass(frozen=True, kw_only=True)
class OffPolicyNegative:
    """Drop negative examples of sequences that the policy has moved away from.

        drop = A < 0 and mean_t (log μ − log π_old) > δ

    Args:
        limit: δ, nats per token.

    Raises:
        InputError: a negative limit; at the call: no advantages were given.

    References:
        DeepSeek-V3.2 (arXiv 2512.02556, §3.1), which prints no δ; TRL's documentation suggests 0.5.
    """

    limit: float = 0.5
    scope: ClassVar[Scope] = "sequence"

    def __post_init__(self) -> None:
        check_number("OffPolicyNegative", "limit", self.limit, "nats per token", least=0)

    def __call__(self, evidence: Evidence) -> Tensor:
        negative = evidence.advantages("OffPolicyNegative") < 0
        return ~(negative & (-evidence.layout.sequence_mean(evidence.log_ratio) > self.limit))


@dataclass(frozen=True, kw_only=True)
class SecondMomentAbove:
    """Drop the tokens with the largest log-ratios until the second moment of the rest is small.

        drop the largest (log ρ)² until the mean of those left is ≤ τ

    Only tokens that the update has already moved the way it would move them again are looked at:
    A > 0 and ρ > 1, or A < 0 and ρ < 1. Equal ones stay or go together.

    Args:
        limit: τ ≥ 0, nats².
        over: "pushed" as above, or "all" tokens whatever their sign.

    Raises:
        InputError: a negative limit, an unknown ``over``; at the call: no advantages were given,
            which "pushed" needs.

    References:
        M2PO (arXiv 2510.01161), τ = 0.04; AReaL's ``m2_threshold`` looks at "all".

    >>> SecondMomentAbove().scope
    'batch'
    """

    limit: float = 0.04
    over: Literal["pushed", "all"] = "pushed"
    scope: ClassVar[Scope] = "batch"

    def __post_init__(self) -> None:
        check_number("SecondMomentAbove", "limit", self.limit, "a mean of squared nats", least=0)
        check_choice("SecondMomentAbove", "over", self.over, ("pushed", "all"))

    def __call__(self, evidence: Evidence) -> Tensor:
        d, looked_at = evidence.log_ratio, evidence.finite
        if self.over == "pushed":
            looked_at = looked_at & (evidence.advantages("SecondMomentAbove") * d > 0)
        square = d.to(accumulator(d.device)).square()
        here = torch.where(looked_at, square, torch.inf).flatten()
        values = gather_over(here, evidence.layout.batch_group)[0].sort().values
        means = values.cumsum(0) / torch.arange(1, len(values) + 1, device=values.device)
        ends = torch.cat([values, values.new_full((1,), torch.inf)])
        smallest_dropped = ends.gather(0, torch.count_nonzero(means <= self.limit).view(1))
        return ~looked_at | (square < smallest_dropped)


@dataclass(frozen=True, kw_only=True)
class AgeAbove:
    """Drop tokens that a policy of too many versions ago sampled.

        keep = 1{age ≤ limit}

    Args:
        limit: the greatest age, ≥ 0; 0 keeps fresh tokens alone.

    Raises:
        InputError: a negative limit; at the call: the layout has no ages.

    References:
        prime-rl's ``max_off_policy_steps`` (8), AReaL's ``max_head_offpolicyness``, SkyRL's
        ``max_staleness_steps`` (4), which hold for sequences.

    >>> AgeAbove(limit=4)
    AgeAbove(limit=4)
    """

    limit: int = 8
    scope: ClassVar[Scope] = "token"

    def __post_init__(self) -> None:
        what = "a number of versions"
        check_number("AgeAbove", "limit", self.limit, what, least=0, fix="pass limit=8")

    def __call__(self, evidence: Evidence) -> Tensor:
        return evidence.age("AgeAbove") <= self.limit
