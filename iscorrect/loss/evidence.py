"""What bounds and rules may look at, and how far each of them looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from iscorrect.errors import check_choice, input_error
from iscorrect.layout import Layout, masked
from iscorrect.loss.ratios import Level, at_level, difference, units
from iscorrect.ranks import sum_over

Scope = Literal["token", "sequence", "batch"]
"""How far a part looks: at each token alone, at whole sequences, or across the batch.

A part says so in an attribute ``scope``; one that does not is taken to look at the whole batch.
"""


class Given(NamedTuple):
    """What the evidence was made from, as the caller gave it; "b t" each."""

    old_log_probs: Tensor
    rollout_log_probs: Tensor
    advantages: Tensor | None


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a bound or a rejection rule may look at; values that are not finite are made neutral.

    Attributes:
        layout: which tokens count and which sequence they belong to.
        given: log-probs and advantages as they were given, anything outside the mask.
        present: bool "b t", counted tokens that may have a weight, whatever the engine reported.
        finite: bool "b t", those of them with a log-ratio.
        log_ratio: "b t", nats, token level, before any bound; 0 where not finite.
        level: the level of the ratio that the bound is given.
        usable: bool "b t", counted tokens whose ratio at the level rests on finite tokens alone.
    """

    layout: Layout
    given: Given
    present: Tensor
    finite: Tensor
    log_ratio: Tensor
    level: Level
    usable: Tensor

    @classmethod
    def of(cls, given: Given, layout: Layout, *, present: Tensor, finite: Tensor) -> Evidence:
        """Evidence at the level of tokens.

        Args:
            given: log-probs and advantages.
            layout: which tokens count.
            present: as above.
            finite: as above.
        """
        log_ratio = masked(difference(given.old_log_probs, given.rollout_log_probs), finite)
        return cls(layout, given, present, finite, log_ratio, "token", finite)

    def at(self, level: Level, *, neutral: bool) -> Evidence:
        """The evidence for a ratio at a level.

        Args:
            level: as above.
            neutral: whether a token that is not finite stands for a ratio of 1, rather than making
                the ratio of its whole unit unusable.
        """
        if neutral:
            usable = self.layout.mask
        elif level == "token":
            return self
        else:
            missing = (self.layout.mask & ~self.finite).to(self.log_ratio.dtype)
            usable = self.layout.mask & (at_level(missing, self.layout, level) == 0)
        return Evidence(
            self.layout, self.given, self.present, self.finite, self.log_ratio, level, usable
        )

    @property
    def old_log_probs(self) -> Tensor:
        """Log π_old "b t", nats; 0 where not finite."""
        return masked(self.given.old_log_probs.to(self.log_ratio.dtype), self.finite)

    @property
    def rollout_log_probs(self) -> Tensor:
        """Log μ "b t", nats; 0 where not finite."""
        return masked(self.given.rollout_log_probs.to(self.log_ratio.dtype), self.finite)

    def advantages(self, caller: str) -> Tensor:
        """Advantages "b t", 0 outside the mask.

        Args:
            caller: the bound or rule that asks, for the message.

        Raises:
            InputError: the caller of the correction gave none.
        """
        if self.given.advantages is None:
            raise input_error(
                caller, "advantages", expected="given, since their sign matters here", got="None",
                fix="pass advantages= to the correction",
            )
        return masked(self.given.advantages, self.layout.mask)

    def age(self, caller: str) -> Tensor:
        """Versions between the policy that sampled a token and the trainer's; int "b t".

        Args:
            caller: the bound or rule that asks, for the message.

        Raises:
            InputError: the layout has no ages.
        """
        if self.layout.age is None:
            raise input_error(
                caller, "mask", expected="a Layout with the age of each token, which matters here",
                got="one without",
                fix="pass mask=Layout(mask, age=trainer_version - versions), or a dump with step"
                " and version in numbers",
            )
        return self.layout.age

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
    for scope in scopes:
        check_choice("a part", "scope", scope, order)
    return order[max(map(order.index, scopes))]


def level_scope(level: Level) -> Scope:
    """How far the ratio at a level looks."""
    return "token" if level == "token" else "sequence"
