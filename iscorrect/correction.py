"""Corrections: level × bound × rejection, and the published methods as presets."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from iscorrect.bounds import (
    Bound,
    ConfidenceCap,
    Ignore,
    Mask,
    ParetoSmooth,
    SignedTruncate,
    Truncate,
)
from iscorrect.errors import check_per_token, input_error
from iscorrect.layout import Layout, as_layout, masked
from iscorrect.metrics import Metrics, correction_metrics
from iscorrect.ratios import (
    Evidence,
    Level,
    Scope,
    at_level,
    check_level,
    difference,
    is_finite,
    level_scope,
    ratio,
    scope_of,
    widest,
)
from iscorrect.reject import (
    BinaryKL,
    DivergenceAbove,
    OffPolicyNegative,
    ProbabilityShift,
    RatioOutside,
    Rule,
)
from iscorrect.thresholds import Limit

Nonfinite = Literal["drop", "neutral", "raise"]


class Weights(NamedTuple):
    """What a correction returns.

    Attributes:
        weights: "b t", float32 or wider, 0 outside ``keep``, without gradient.
        keep: bool "b t", the mask less what has weight 0.
        metrics: `mismatch/…` and `is/…`.
    """

    weights: Tensor
    keep: Tensor
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Importance weights for tokens that another policy sampled.

        w = bound(ρ_level) · Π_rules keep,  ρ = π_old/μ

    Args:
        level: whose ratio becomes the weight.
        bound: callable (ratio, evidence) -> weights; None for plain importance sampling.
        reject: callables (evidence) -> keep; a token must pass all of them.
        normalize: divide by the mean raw ratio over the batch's units, before the bound, so that a
            cap stays a cap.
        nonfinite: tokens of the mask with a NaN or infinite log-prob: "drop" gives them (at other
            levels their sequence, segment, or the rest of it) weight 0, "neutral" a ratio of 1,
            "raise" an error that names them, at the price of a synchronisation.

    Raises:
        InputError: an unknown level, or parts that are not callable.

    >>> from iscorrect.bounds import Truncate
    >>> correct = Correction(level="token", bound=Truncate(cap=2.0))
    >>> mask = torch.tensor([[True, True, False]])
    >>> old, rollout = torch.tensor([[-1.0, -1.0, 0.0]]), torch.tensor([[-1.0, -3.0, 0.0]])
    >>> correct(old_log_probs=old, rollout_log_probs=rollout, mask=mask).weights
    tensor([[1., 2., 0.]])
    """

    level: Level = "token"
    bound: Bound | None = None
    reject: tuple[Rule, ...] = ()
    normalize: bool = False
    nonfinite: Nonfinite = "drop"

    def __post_init__(self) -> None:
        check_level("Correction", self.level)
        if self.nonfinite not in get_args(Nonfinite):
            raise input_error(
                "Correction", "nonfinite", expected="'drop', 'neutral' or 'raise'",
                got=repr(self.nonfinite), fix="pass nonfinite='drop'",
            )
        if self.bound is not None and not callable(self.bound):
            raise input_error(
                "Correction", "bound", expected="None or a callable (ratio, evidence) -> weights",
                got=repr(self.bound), fix="pass Truncate(cap=2.0)",
            )
        if not isinstance(self.reject, tuple) or not all(map(callable, self.reject)):
            raise input_error(
                "Correction", "reject", expected="a tuple of callables (evidence) -> keep",
                got=repr(self.reject), fix="pass reject=(Veto(),), with its comma",
            )

    @property
    def scope(self) -> Scope:
        """How far the weights look: each token alone, whole sequences, or across the batch."""
        parts = [*self.reject] if self.bound is None else [self.bound, *self.reject]
        scope = widest(level_scope(self.level), *map(scope_of, parts))
        return "batch" if self.normalize else scope

    def __call__(
        self,
        *,
        old_log_probs: Tensor,
        rollout_log_probs: Tensor,
        mask: Tensor | Layout,
        advantages: Tensor | None = None,
    ) -> Weights:
        """Weights, what is kept, and metrics.

        Args:
            old_log_probs: "b t", log π_old, nats, the trainer's policy at the rollout's weights.
            rollout_log_probs: "b t", log μ, nats, as the engine reported.
            mask: bool "b t", or a layout.
            advantages: "b t", for parts that look at their sign.

        Raises:
            InputError: shapes, dtypes or devices differ; a tensor carries gradient.
        """
        layout = as_layout("Correction", mask)
        check_per_token(
            "Correction", layout.mask, old_log_probs=old_log_probs,
            rollout_log_probs=rollout_log_probs, advantages=advantages,
        )
        with torch.no_grad():
            evidence = self._evidence(old_log_probs, rollout_log_probs, layout, advantages)
            level_log_ratio = at_level(evidence.log_ratio, layout, self.level)
            rho = ratio(level_log_ratio)
            if self.normalize:
                mean = evidence.batch_mean(rho)
                rho = rho / torch.where(mean > 0, mean, 1)
            weights = rho if self.bound is None else self.bound(rho, evidence)
            bounded = (weights - rho).bool()
            keep = evidence.usable & weights.bool()
            for rule in self.reject:
                keep = keep & rule(evidence)
            weights = masked(weights, keep)
            metrics = correction_metrics(
                evidence, log_ratio=level_log_ratio, bounded=bounded, weights=weights, keep=keep
            )
        return Weights(weights, keep, metrics)

    def _evidence(
        self, old: Tensor, rollout: Tensor, layout: Layout, advantages: Tensor | None
    ) -> Evidence:
        d = difference(old, rollout)
        finite = is_finite(d) & layout.mask
        if self.nonfinite == "raise":
            _raise_nonfinite(layout.mask & ~finite)
        if self.nonfinite == "neutral":
            usable = layout.mask
        elif self.level == "token":
            usable = finite
        else:
            bad = (layout.mask & ~finite).to(d.dtype)
            usable = layout.mask & (at_level(bad, layout, self.level) == 0)
        return Evidence(
            layout=layout, level=self.level, finite=finite, usable=usable,
            log_ratio=masked(d, finite), raw_log_probs=old,
            raw_rollout_log_probs=rollout, raw_advantages=advantages,
        )


def _raise_nonfinite(where: Tensor) -> None:
    positions = where.nonzero().tolist()
    if positions:
        shown = ", ".join(str(tuple(p)) for p in positions[:8])
        more = f" and {len(positions) - 8} more" if len(positions) > 8 else ""
        raise input_error(
            "Correction", "old_log_probs, rollout_log_probs", expected="finite under the mask",
            got=f"NaN or ±inf at {shown}{more}",
            fix="mask these tokens, or pass nonfinite='drop' to give them weight 0",
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
        uncorrected, token_is, token_tis, token_mis, icepop, confidence_is, kpop, dppo,
        sequence_is, sequence_tis, sequence_mis, geometric_rs, trust_region_mask,
        off_policy_negative, pareto_is, topr,
    )
}
"""Presets by the names that the command line and configuration files use."""


def parse(text: str) -> Correction:
    """A correction from ``name`` or ``name:key=value,key=value``.

    Args:
        text: a preset's kebab-case name and its arguments; "none" stands for None.

    Raises:
        InputError: an unknown preset or argument, or a value that the preset refuses.

    >>> parse("sequence-mis:high=3").bound
    Mask(low=0.0, high=3.0)
    """
    name, _, arguments = text.partition(":")
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise input_error(
            "parse", "preset", expected="one of " + ", ".join(PRESETS), got=repr(name),
            fix=f"did you mean {near[0]!r}?" if near else "choose one of these names",
        )
    known = inspect.signature(PRESETS[name]).parameters
    values: dict[str, object] = {}
    for argument in filter(None, arguments.split(",")):
        key, equals, value = argument.partition("=")
        if key not in known or not equals:
            raise input_error(
                "parse", f"argument of {name}",
                expected="key=value with key one of " + (", ".join(known) or "none at all"),
                got=repr(argument), fix=f"see help(iscorrect.{name.replace('-', '_')})",
            )
        values[key] = _value(value)
    return PRESETS[name](**values)


def _value(text: str) -> float | str | None:
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        return text
