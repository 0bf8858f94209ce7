"""Bounds and rules as other frameworks hold them, for what they do that corrections do not."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from iscorrect.errors import check_choice
from iscorrect.layout import masked
from iscorrect.loss.bounds import Bound, Clip, Mask, Truncate
from iscorrect.loss.correction import Correction
from iscorrect.loss.evidence import Evidence, Scope, scope_of, widest
from iscorrect.loss.ratios import Level, at_level
from iscorrect.loss.rules import Over, RatioOutside, Rule

MaskType = Literal["tis", "icepop", "seq-mask-tis"]

SAFETY = 20.0
"""Nats at which verl and slime clamp log-ratios."""

LEVELS: dict[Over, Level] = {"token": "token", "sum": "sequence", "mean": "geometric"}
"""The level whose log-ratio is a reduction of the tokens' log-ratios."""


@dataclasses.dataclass(frozen=True)
class NormalizedAfter:
    """Weights divided by their mean after the bound, so that they may exceed it.

        w = b(ρ) / mean b(ρ),  over the units of the level; b(ρ) where that mean is at most 1e-8

    The mean counts what rules reject. ``Correction(normalize=True)`` divides before the bound.

    Args:
        bound: b.
    """

    bound: Bound

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        weights = self.bound(ratio, evidence)
        units = evidence.units
        mean = masked(weights, units).sum() / torch.count_nonzero(units).clamp(min=1)
        return weights / torch.where(mean > 1e-8, mean, 1)


@dataclasses.dataclass(frozen=True)
class HeldBound:
    """A bound that is shown ratios within e^±limit.

    Args:
        bound: any bound; None for plain ratios.
        limit: nats.
    """

    bound: Bound | None
    limit: float = SAFETY

    @property
    def scope(self) -> Scope:
        """The bound's own."""
        return "token" if self.bound is None else scope_of(self.bound)

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        held = ratio.clamp(math.exp(-self.limit), math.exp(self.limit))
        return held if self.bound is None else self.bound(held, evidence)


@dataclasses.dataclass(frozen=True)
class HeldRule:
    """A rule that is shown log-ratios clamped token by token.

    Args:
        rule: any rule.
        limit: nats.
    """

    rule: Rule
    limit: float = SAFETY

    @property
    def scope(self) -> Scope:
        """The rule's own."""
        return scope_of(self.rule)

    def __call__(self, evidence: Evidence) -> Tensor:
        held = evidence.log_ratio.clamp(-self.limit, self.limit)
        return self.rule(dataclasses.replace(evidence, log_ratio=held))


@dataclasses.dataclass(frozen=True)
class Overflow:
    """Drop what float32 cannot hold as a ratio at the correction's level: log ρ above 88.7."""

    scope: ClassVar[Scope] = "sequence"

    def __call__(self, evidence: Evidence) -> Tensor:
        limit = math.log(torch.finfo(torch.float32).max)
        return at_level(evidence.log_ratio, evidence.layout, evidence.level) <= limit


@dataclasses.dataclass(frozen=True)
class ClipWhere:
    """Weights clipped where a rule would reject, raw elsewhere.

    Args:
        rule: what would reject.
        bound: what clips.
    """

    rule: Rule
    bound: Bound

    @property
    def scope(self) -> Scope:
        """The wider of the two."""
        return widest(scope_of(self.rule), scope_of(self.bound))

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        return torch.where(self.rule(evidence), ratio, self.bound(ratio, evidence))


def truncated(
    caller: str, level: Level, kind: MaskType, low: float | None, high: float,
    rules: tuple[Rule, ...],
) -> Correction:
    """One of the three kinds of OpenRLHF and NeMo-RL, as a correction."""
    check_choice(caller, "type", kind, get_args(MaskType))
    if kind == "tis":
        return Correction(level=level, bound=clamp_to(low, high), reject=rules)
    if kind == "icepop":
        return Correction(level=level, bound=Mask(low or 0.0, high), reject=rules)
    band = RatioOutside(level="geometric", low=low or 0.0, high=high)
    return Correction(level=level, reject=(band, *rules))


def clamp_to(low: float | None, high: float | None) -> Bound | None:
    """The bound that holds ratios in a band; None where it has no ends."""
    if high is None:
        return Clip(low, math.inf) if low else None
    return Clip(low, high) if low else Truncate(high)
