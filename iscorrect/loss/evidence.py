"""What bounds and rules may look at, and how far each of them looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from iscorrect.errors import input_error
from iscorrect.layout import Layout, masked
from iscorrect.loss.ratios import Level, units
from iscorrect.ranks import sum_over

Scope = Literal["token", "sequence", "batch"]
"""How far a part looks: at each token alone, at whole sequences, or across the batch.

A part says so in an attribute ``scope``; one that does not is taken to look at the whole batch.
"""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a bound or a rejection rule may look at; values that are not finite are made neutral.

    Attributes:
        layout: which tokens count and which sequence they belong to.
        level: the level of the ratio that the bound is given.
        finite: bool "b t", counted tokens whose log-ratio is finite.
        usable: bool "b t", counted tokens whose ratio at the level rests on finite tokens alone.
        log_ratio: "b t", nats, token level, before any bound; 0 where not finite.
    """

    layout: Layout
    level: Level
    finite: Tensor
    usable: Tensor
    log_ratio: Tensor
    raw_log_probs: Tensor
    raw_rollout_log_probs: Tensor
    raw_advantages: Tensor | None = None

    @property
    def log_probs(self) -> Tensor:
        """Log π_old "b t", nats; 0 where not finite."""
        return masked(self.raw_log_probs.to(self.log_ratio.dtype), self.finite)

    @property
    def rollout_log_probs(self) -> Tensor:
        """Log μ "b t", nats; 0 where not finite."""
        return masked(self.raw_rollout_log_probs.to(self.log_ratio.dtype), self.finite)

    @property
    def units(self) -> Tensor:
        """Bool "b t": one token for each usable unit of the level."""
        return units(self.layout, self.level) & self.usable

    def batch_count(self) -> Tensor:
        """How many usable units the whole batch has, on all its ranks; float ""."""
        count = torch.count_nonzero(self.units).to(self.log_ratio.dtype)
        return sum_over(count, self.layout.batch_group)

    def batch_mean(self, x: Tensor) -> Tensor:
        """Mean of "b t" over the usable units of the whole batch, on all its ranks; ""."""
        total = sum_over(masked(x, self.units).sum(), self.layout.batch_group)
        return total / self.batch_count().clamp(min=1)

    def advantages(self, caller: str) -> Tensor:
        """Advantages "b t", 0 outside the mask.

        Raises:
            InputError: the caller of the correction gave none.
        """
        if self.raw_advantages is None:
            raise input_error(
                caller, "advantages", expected="given, since this rule depends on their sign",
                got="None", fix="pass advantages= to the correction",
            )
        return masked(self.raw_advantages, self.layout.mask)


def scope_of(part: object) -> Scope:
    """How far a part looks, as its attribute ``scope`` says; "batch" for one that is silent."""
    scope: Scope = getattr(part, "scope", "batch")
    return scope


def widest(*scopes: Scope) -> Scope:
    """The farthest-looking of several scopes.

    >>> widest("token", "sequence")
    'sequence'
    """
    order: tuple[Scope, ...] = get_args(Scope)
    return order[max(map(order.index, scopes))]


def level_scope(level: Level) -> Scope:
    """How far the ratio at a level looks."""
    return "token" if level == "token" else "sequence"
