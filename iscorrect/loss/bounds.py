"""Bounds: from a ratio to a weight.

A bound is any callable ``(ratio, evidence) -> weights`` on "b t" tensors. Bounds act on the ratio
π_old/μ itself, never on its inverse or its logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from iscorrect.errors import check_number, input_error, is_part
from iscorrect.loss.caps import Limit
from iscorrect.loss.divergences import expm1
from iscorrect.loss.evidence import Evidence, Scope, scope_of, widest
from iscorrect.loss.pareto import pareto_tail
from iscorrect.loss.ratios import check_band

Bound = Callable[[Tensor, Evidence], Tensor]


@dataclass(frozen=True)
class Ignore:
    """Weight 1 whatever the ratio: the uncorrected gradient, or rejection alone.

    w = 1
    """

    scope: ClassVar[Scope] = "token"

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        return torch.ones_like(ratio)


@dataclass(frozen=True)
class Truncate:
    """Truncated importance sampling: large weights become the cap, small ones stay.

        w = min(ρ, C)

    Args:
        cap: C > 0, or a callable (ratio, evidence) -> "" such as ``IonidesCap()``.

    Raises:
        InputError: the cap is not a number > 0.

    References:
        Ionides (2008); Yao et al., "Your efficient RL framework secretly brings you off-policy RL
        training" (2025), as TIS.
    """

    cap: Limit = 2.0

    def __post_init__(self) -> None:
        _check_limit("Truncate", "cap", self.cap)

    @property
    def scope(self) -> Scope:
        """"batch" where the cap depends on the data."""
        return _limit_scope(self.cap)

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        return ratio.clamp(max=_limit(self.cap, ratio, evidence))


@dataclass(frozen=True)
class Clip:
    """Weights held inside a band: small ratios are raised to ``low``.

        w = min(max(ρ, a), b)

    Raising small weights trains on tokens that the trainer's policy finds unlikely; published
    ablations find it harmful.

    Args:
        low: a ≥ 0.
        high: b ≥ a.

    Raises:
        InputError: a negative bound, low > high, or a bound that is no number.

    References:
        slime's example `mis.py`, mode "clip"; OpenRLHF "tis" with its defaults 0.5 and 5.
    """

    low: float = 0.5
    high: float = 2.0
    scope: ClassVar[Scope] = "token"

    def __post_init__(self) -> None:
        check_band("Clip", self.low, self.high)
        for name, value in {"low": self.low, "high": self.high}.items():
            check_number("Clip", name, value, "a bound on the ratio itself", least=0)

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        return ratio.clamp(self.low, self.high)


@dataclass(frozen=True)
class Mask:
    """Masked importance sampling: weights outside a band become 0, the others stay.

        w = ρ · 1{a ≤ ρ ≤ b}

    Args:
        low: a ≥ 0.
        high: b ≥ a, a callable (ratio, evidence) -> "", or None for no upper bound.

    Raises:
        InputError: a negative bound, or low > high.

    References:
        IcePop (Ring-1T report, arXiv 2510.18855) at token level, 0.5 and 5; sequence-MIS (Qi et
        al., arXiv 2510.26788).
    """

    low: float = 0.0
    high: Limit | None = None

    def __post_init__(self) -> None:
        if self.high is not None:
            _check_limit("Mask", "high", self.high)
        check_number("Mask", "low", self.low, "a bound on the ratio itself", least=0)
        check_band("Mask", self.low, None if callable(self.high) else self.high)

    @property
    def scope(self) -> Scope:
        """"batch" where the upper bound depends on the data."""
        return _limit_scope(self.high)

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        if self.high is None:
            return torch.where(ratio >= self.low, ratio, 0)
        inside = ratio <= _limit(self.high, ratio, evidence)
        return torch.where(inside if self.low == 0 else inside & (ratio >= self.low), ratio, 0)


@dataclass(frozen=True)
class ConfidenceCap:
    """Truncation whose cap closes in on 1 as the trainer grows confident of the token.

        w = min(ρ, 1 + λ max(1 − p, κ)),  p = π_old(token)

    Noise on the logits moves ρ by about 1 − p, so one cap for all tokens is too loose for the
    confident ones. A rule for single tokens: at other levels p remains the token's.

    Args:
        slope: λ ≥ 0.
        floor: κ ≥ 0.

    Raises:
        InputError: a negative number.

    References:
        Yu et al., "Rethinking TIM in LLM RL" (arXiv 2609.32444), as CIS.
    """

    slope: float = 2.3
    floor: float = 5e-3
    scope: ClassVar[Scope] = "token"

    def __post_init__(self) -> None:
        what = "how much of 1 − p is added to a cap of 1"
        check_number("ConfidenceCap", "slope", self.slope, what, least=0)
        check_number("ConfidenceCap", "floor", self.floor, "the least value of 1 − p", least=0)

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        doubt = -expm1(evidence.old_log_probs)
        return torch.minimum(ratio, 1 + self.slope * doubt.clamp(min=self.floor))


@dataclass(frozen=True)
class ParetoSmooth:
    """Pareto-smoothed importance sampling: the largest weights become their expected size.

        the M = min(S/5, 3 √S) largest of S weights -> quantiles of a fitted generalised Pareto

    Order is kept and no weight exceeds the sample's largest. Weights stay as they are where the
    tail is too short to fit.

    References:
        Vehtari et al., "Pareto smoothed importance sampling", JMLR 25 (2024).
    """

    scope: ClassVar[Scope] = "batch"

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        tail = pareto_tail(ratio.log(), evidence.units, group=evidence.layout.batch_group)
        flat = ratio.flatten()
        raw = flat.gather(0, tail.positions)
        changed = torch.where(tail.members, tail.smoothed.exp().to(ratio.dtype), raw)
        smooth = flat.scatter(0, tail.positions, changed).view(ratio.shape)
        if evidence.level in ("token", "prefix"):
            return smooth
        # One token stands for each sequence or segment; the others take its weight.
        layout = evidence.layout.with_mask(evidence.units)
        total = layout.segment_total if evidence.level == "segment" else layout.sequence_total
        return total(smooth)


@dataclass(frozen=True)
class SignedTruncate:
    """Truncation of negative examples alone: positive ones keep weight 1.

        w = 1 if A > 0 else min(ρ, C)

    Args:
        cap: C > 0.

    Raises:
        InputError: the cap is not a number > 0; at the call: no advantages were given.

    References:
        TOPR (Le Roux et al., arXiv 2503.14286), with cap 1 and the ratio of whole sequences.
    """

    cap: float = 1.0
    scope: ClassVar[Scope] = "token"

    def __post_init__(self) -> None:
        what = "a cap on the ratio itself, not on its log"
        check_number("SignedTruncate", "cap", self.cap, what, above=0)

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        positive = evidence.advantages("SignedTruncate") > 0
        return torch.where(positive, 1, ratio.clamp(max=self.cap))


@dataclass(frozen=True, kw_only=True)
class ByAge:
    """One bound for tokens up to an age, another for older ones.

        w = fresh(ρ) if age ≤ limit else stale(ρ)

    A rule for single tokens: at other levels a sequence of several versions has several weights.

    Args:
        limit: the greatest age that is fresh, ≥ 0.
        fresh: callable (ratio, evidence) -> weights.
        stale: likewise; another ``ByAge`` for more than two.

    Raises:
        InputError: a negative limit, or bounds that are not callable; at the call: the layout has
            no ages.

    >>> ByAge(limit=1, fresh=Truncate(2.0), stale=Mask(0.5, 2.0)).scope
    'token'
    """

    limit: int
    fresh: Bound
    stale: Bound

    def __post_init__(self) -> None:
        what = "a number of versions"
        check_number("ByAge", "limit", self.limit, what, least=0, fix="pass limit=0")
        for name, bound in {"fresh": self.fresh, "stale": self.stale}.items():
            if not is_part(bound):
                raise input_error(
                    "ByAge", name, expected="a callable (ratio, evidence) -> weights",
                    got=repr(bound), fix=f"pass {name}=Truncate(2.0)",
                )

    @property
    def scope(self) -> Scope:
        """That of the bound that looks farther."""
        return widest(scope_of(self.fresh), scope_of(self.stale))

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        fresh = evidence.age("ByAge") <= self.limit
        return torch.where(fresh, self.fresh(ratio, evidence), self.stale(ratio, evidence))


def _check_limit(caller: str, name: str, limit: object) -> None:
    if not is_part(limit):
        what = "a cap on the ratio itself, not on its log; or a callable (ratio, evidence) -> cap"
        check_number(caller, name, limit, what, above=0, fix=f"pass {name}=2.0")


def _limit_scope(limit: Limit | None) -> Scope:
    return "batch" if callable(limit) else "token"


def _limit(limit: Limit, ratio: Tensor, evidence: Evidence) -> float | Tensor:
    return limit(ratio, evidence) if callable(limit) else limit
