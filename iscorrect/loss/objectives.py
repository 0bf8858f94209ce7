"""Objectives: per-token losses of the policy being trained.

An objective is any callable ``(log_probs, old_log_probs, advantages, layout) -> PerToken`` on "b t"
tensors that are finite, and 0 outside the mask. Its loss carries the gradient, by plain autograd;
importance weights multiply it afterwards. One that clips nothing may return the loss alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from iscorrect.errors import check_number, input_error
from iscorrect.gradients import with_gradient
from iscorrect.layout import Layout, masked
from iscorrect.loss.evidence import Scope, level_scope
from iscorrect.loss.ratios import Level, at_level, check_band, check_level, difference, ratio


class PerToken(NamedTuple):
    """What an objective makes of each token.

    Attributes:
        loss: "b t", with gradient.
        clipped: bool "b t", the tokens that it clipped; None where it clips nothing.
    """

    loss: Tensor
    clipped: Tensor | None = None


Objective = Callable[[Tensor, Tensor, Tensor, Layout], PerToken | Tensor]


def made(
    objective: Objective, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor,
    layout: Layout,
) -> PerToken:
    """What an objective makes of the tokens, also where it returns the loss alone."""
    loss = objective(log_probs, old_log_probs, advantages, layout)
    return loss if isinstance(loss, PerToken) else PerToken(loss)


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """The policy gradient itself.

        loss = −A log π

    With ``old_log_probs`` omitted and plain token weights its gradient is that of −A π/μ, which is
    importance sampling through the ratio.
    """

    scope: ClassVar[Scope] = "token"

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, layout: Layout
    ) -> PerToken:
        return PerToken(-advantages * log_probs)


@dataclass(frozen=True, kw_only=True)
class PPOClip:
    """PPO's clipped surrogate on the update ratio r = π/π_old.

        loss = −min(r A, clip(r, a, b) A), for A < 0 and ``dual`` c: at most −c A

    Args:
        low: a in [0, 1], on the ratio itself: 0.8, not 0.2. None: no lower clip.
        high: b ≥ 1. None: no upper clip.
        level: whose ratio r is; "geometric" is GSPO (bounds 1 − 3e-4 and 1 + 4e-4 there).
        dual: c ≥ 1, an upper bound on the ratio of negative examples. None: none.

    Raises:
        InputError: bounds that do not enclose 1, or an unknown level.

    References:
        Schulman et al. (arXiv 1707.06347); GSPO (arXiv 2507.18071); dual clip (arXiv 1912.09729).

    >>> PPOClip(low=0.8, high=1.28)
    PPOClip(low=0.8, high=1.28, level='token', dual=None)
    """

    low: float | None = 0.8
    high: float | None = 1.2
    level: Level = "token"
    dual: float | None = None

    def __post_init__(self) -> None:
        check_level("PPOClip", self.level)
        _check_encloses_one("PPOClip", self.low, self.high)
        what = f"at least high={self.high!r}, a bound on the ratio of negative examples"
        check_number(
            "PPOClip", "dual", self.dual, what, least=self.high or 1, optional=True,
            fix="pass dual=3.0",
        )

    @property
    def scope(self) -> Scope:
        """"sequence" at every level but the token's."""
        return level_scope(self.level)

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, layout: Layout
    ) -> PerToken:
        log_r = at_level(difference(log_probs, old_log_probs), layout, self.level)
        with torch.no_grad():
            r = ratio(log_r)
            loss = plain = -advantages * r
            if self.low is not None or self.high is not None:
                loss = torch.maximum(loss, -advantages * r.clamp(self.low, self.high))
            if self.dual is not None:
                # −c A is an upper bound for A < 0 only; for A ≥ 0, |A| c ≥ 0 ≥ the loss.
                loss = torch.minimum(loss, self.dual * advantages.abs())
            clipped = (loss - plain).bool()
            # A clipped token keeps its value and loses its gradient; −A r is its own in log r.
            slope = masked(plain, ~clipped)
        return PerToken(with_gradient(loss, (log_r, slope)), clipped)


@dataclass(frozen=True, kw_only=True)
class CISPO:
    """Clipped importance-sampling weights on the update ratio; every token keeps its gradient.

        loss = −sg(clip(r, a, b)) A log π,  r = π/π_old

    Args:
        low: a in [0, 1]; None: no lower bound, as in practice.
        high: b ≥ 1. The report prints no value.

    Raises:
        InputError: bounds that do not enclose 1.

    References:
        MiniMax-M1 (arXiv 2506.13585, eq. 4 and 5). It truncates the update's ratio, not the
        engine's: with ``old_log_probs=rollout_log_probs`` it truncates their product.
    """

    low: float | None = None
    high: float = 5.0
    scope: ClassVar[Scope] = "token"

    def __post_init__(self) -> None:
        _check_encloses_one("CISPO", self.low, self.high)

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, layout: Layout
    ) -> PerToken:
        r = ratio(difference(log_probs.detach(), old_log_probs))
        weight = r.clamp(self.low, self.high)
        return PerToken(-weight * advantages * log_probs, (weight - r).bool())


def _check_encloses_one(caller: str, low: float | None, high: float | None) -> None:
    check_band(caller, low, high)
    if low is not None and low > 1:
        raise input_error(
            caller, "low", expected="at most 1, since it bounds the ratio itself", got=repr(low),
            fix="pass low=0.8 for a clip range of 0.2 below",
        )
    if high is not None and high < 1:
        raise input_error(
            caller, "high", expected="at least 1, since it bounds the ratio itself",
            got=repr(high), fix=f"pass high={1 + high!r} for a clip range of {high!r} above",
        )


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "reinforce": Reinforce, "ppo-clip": PPOClip, "cispo": CISPO,
}
"""Objectives by the names that the command line and configuration files use."""
