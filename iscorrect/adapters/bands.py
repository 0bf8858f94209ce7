"""Bounds and rules as other frameworks hold them, for what they do that corrections do not.

And what none of them can be given.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from iscorrect.errors import input_error
from iscorrect.layout import masked
from iscorrect.loss.bounds import Bound, Clip, Truncate
from iscorrect.loss.correction import Correction
from iscorrect.loss.evidence import Evidence, Scope, scope_of, widest
from iscorrect.loss.policy_loss import PolicyLoss
from iscorrect.loss.ratios import Level, at_level
from iscorrect.loss.rules import Over, Rule

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


def clamp_to(low: float | None, high: float | None) -> Bound | None:
    """The bound that holds ratios in a band; None where it has no ends."""
    if high is None:
        return Clip(low, math.inf) if low else None
    return Clip(low, high) if low else Truncate(high)


def check_adds_up(caller: str, spec: Correction | PolicyLoss, shown: str) -> None:
    """Raise where a part looks across the batch, of which the trainer shows less.

    Args:
        caller: what the message begins with.
        spec: what the trainer is to use.
        shown: what it shows at a time.
    """
    if spec.scope == "batch":
        raise input_error(
            caller, "correction" if isinstance(spec, Correction) else "policy_loss",
            expected="one that looks at tokens or sequences",
            got=f"{spec!r}, which looks across a batch of which {shown} is shown",
            fix="use a fixed bound and normalize=False; a part of your own that looks no farther"
            " says so by scope = 'token'",
        )


def check_no_reference(caller: str, spec: PolicyLoss, own: str) -> None:
    """Raise where a loss wants log-probs of a reference, which the trainer does not pass.

    Args:
        caller: what the message begins with.
        spec: what the trainer is to use.
        own: how the trainer is told to penalise, as the fix.
    """
    if spec.reference_kl is not None:
        raise input_error(
            caller, "policy_loss", expected="one without a reference_kl: a loss is passed no"
            " log-probs of the reference", got=repr(spec.reference_kl),
            fix=f"drop reference_kl, and {own}",
        )
