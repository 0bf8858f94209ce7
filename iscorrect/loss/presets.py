"""The published corrections, one line each, and their names on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from iscorrect.loss.bounds import (
    ConfidenceCap,
    Ignore,
    Mask,
    ParetoSmooth,
    SignedTruncate,
    Truncate,
)
from iscorrect.loss.caps import Limit
from iscorrect.loss.correction import Correction
from iscorrect.loss.ratios import Level
from iscorrect.loss.rules import (
    BinaryKL,
    DivergenceAbove,
    OffPolicyNegative,
    ProbabilityShift,
    RatioOutside,
    SecondMomentAbove,
)


def uncorrected() -> Correction:
    """Every weight 1: an estimate of the rollout policy's gradient.

    >>> uncorrected()
    Correction(level='token', bound=Ignore(), reject=(), normalize=False, nonfinite='drop')
    """
    return Correction(bound=Ignore())


def token_is() -> Correction:
    """W = ρ_t: the gradient of the token-level surrogate, unbounded."""
    return Correction(level="token")


def token_tis(cap: Limit = 2.0) -> Correction:
    """W = min(ρ_t, C): truncated importance sampling (Yao et al. 2025).

    >>> token_tis(cap=3.0).bound
    Truncate(cap=3.0)
    """
    return Correction(level="token", bound=Truncate(cap))


def token_mis(low: float = 0.0, high: Limit | None = 3.0) -> Correction:
    """W = ρ_t 1{a ≤ ρ_t ≤ b}: masked importance sampling; one-sided as TRL's ``token_mask``."""
    return Correction(level="token", bound=Mask(low, high))


def icepop(low: float = 0.5, high: float = 5.0) -> Correction:
    """W = ρ_t 1{α ≤ ρ_t ≤ β}: token masking on both sides (Ring-1T, arXiv 2510.18855)."""
    return Correction(level="token", bound=Mask(low, high))


def confidence_is(slope: float = 2.3, floor: float = 5e-3) -> Correction:
    """W = min(ρ_t, 1 + λ max(1 − p, κ)): CIS (arXiv 2609.32444)."""
    return Correction(level="token", bound=ConfidenceCap(slope, floor))


def kpop(limit: float = 0.1) -> Correction:
    """W = ρ_t where the binary KL is at most φ both ways: KPop (2026)."""
    return Correction(level="token", reject=(BinaryKL(limit=limit),))


def dppo(
    limit: float = 0.15, divergence: Literal["tv", "kl"] = "tv", cap: float = 10.0
) -> Correction:
    """W = min(ρ_t, C), tokens pushed too far dropped: DPPO (arXiv 2602.04879).

    Omit ``old_log_probs``, so that the ratio is that of the policy being trained.
    """
    rule = ProbabilityShift(limit=limit, divergence=divergence)
    return Correction(level="token", bound=Truncate(cap), reject=(rule,))


def ipo(limit: float = 0.3, cap: float = 1e4) -> Correction:
    """W = min(ρ_t, C) where |p − q| ≤ ε: prime-rl's default, on both sides of the probability.

    Omit ``old_log_probs``, so that the ratio is that of the policy being trained; its gradient is
    then that of ρ_t itself, held at C.
    """
    rule = DivergenceAbove(limit=limit, estimator="tv", over="token")
    return Correction(level="token", bound=Truncate(cap), reject=(rule,))


def flash_reinforce(limit: float = 5e-3) -> Correction:
    """W = ρ_t where the sequence's mean binary KL is at most δ: FlashREINFORCE (2026)."""
    rule = DivergenceAbove(limit=limit, estimator="binary-kl", over="mean")
    return Correction(level="token", reject=(rule,))


def m2po(limit: float = 0.04) -> Correction:
    """W = ρ_t, the largest log-ratios dropped until their mean square is τ (arXiv 2510.01161).

    Omit ``old_log_probs``, so that the ratio is that of the policy being trained.
    """
    return Correction(level="token", reject=(SecondMomentAbove(limit=limit),))


def sequence_is() -> Correction:
    """W = Π_t ρ_t: the only unbiased one, with a variance that grows exponentially in length."""
    return Correction(level="sequence")


def sequence_tis(cap: Limit = 2.0) -> Correction:
    """W = min(Π_t ρ_t, C)."""
    return Correction(level="sequence", bound=Truncate(cap))


def sequence_mis(low: float = 0.0, high: Limit | None = 3.0) -> Correction:
    """W = Π_t ρ_t 1{a ≤ Π_t ρ_t ≤ b} (arXiv 2510.26788); TRL's default, ``sequence_mask``."""
    return Correction(level="sequence", bound=Mask(low, high))


def geometric_rs(low: float = 0.999, high: float = 1.001) -> Correction:
    """W = 1 where the geometric mean of the sequence's ratios lies in a band: Geo-RS.

    A band means nothing without the KL per token that it is meant for.
    """
    return Correction(
        bound=Ignore(), reject=(RatioOutside(level="geometric", low=low, high=high),)
    )


def trust_region_mask(max_k2: float = 0.05, mean_k3: float = 1e-3) -> Correction:
    """W = 1 where the sequence's largest k2 and mean k3 stay small (arXiv 2512.23075).

    Sampled proxies for the method's exact token KL, so without its guarantee.
    """
    return Correction(
        bound=Ignore(),
        reject=(
            DivergenceAbove(limit=max_k2, estimator="k2", over="max"),
            DivergenceAbove(limit=mean_k3, estimator="k3", over="mean"),
        ),
    )


def off_policy_negative(limit: float = 0.5) -> Correction:
    """W = 1, negative examples of strayed sequences dropped (DeepSeek-V3.2, arXiv 2512.02556)."""
    return Correction(bound=Ignore(), reject=(OffPolicyNegative(limit=limit),))


def pareto_is(level: Level = "sequence") -> Correction:
    """W = ρ, its upper tail Pareto-smoothed (Vehtari et al. 2024)."""
    return Correction(level=level, bound=ParetoSmooth())


def topr(cap: float = 1.0) -> Correction:
    """W = 1 for positive examples, min(Π_t ρ_t, C) for negative ones (arXiv 2503.14286)."""
    return Correction(level="sequence", bound=SignedTruncate(cap))


PRESETS: dict[str, Callable[..., Correction]] = {
    preset.__name__.replace("_", "-"): preset
    for preset in (
        uncorrected, token_is, token_tis, token_mis, icepop, confidence_is, kpop, dppo, ipo,
        flash_reinforce, m2po, sequence_is, sequence_tis, sequence_mis, geometric_rs,
        trust_region_mask, off_policy_negative, pareto_is, topr,
    )
}
"""Presets by the names that the command line and configuration files use."""
