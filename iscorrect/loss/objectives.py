"""Objectives: per-token losses of the policy being trained.

An objective is any callable ``(log_probs, old_log_probs, advantages, layout) -> PerToken`` on "b t"
tensors that are finite, and 0 outside the mask. Its loss carries the gradient, by plain autograd;
importance weights multiply it afterwards. One that clips nothing may return the loss alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from iscorrect.errors import check_number, describe, input_error
from iscorrect.gradients import with_gradient
from iscorrect.layout import Layout, masked
from iscorrect.loss.divergences import expm1
from iscorrect.loss.evidence import Scope, level_scope
from iscorrect.loss.ratios import (
    Level,
    at_level,
    check_band,
    check_level,
    difference,
    ratio,
    saturated,
)


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
    if isinstance(loss, PerToken):
        return loss
    if not isinstance(loss, Tensor):
        raise input_error(
            "PolicyLoss", "objective", expected="to return the loss `b t`, or a PerToken",
            got=describe(loss), fix="return PerToken(loss, clipped)",
        )
    return PerToken(loss)


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
        cap: an upper bound on r itself, ≥ ``high``: beyond it r stays there and keeps its gradient,
            −cap A per log r. None: none.

    Raises:
        InputError: bounds that do not enclose 1, or an unknown level.

    References:
        Schulman et al. (arXiv 1707.06347); GSPO (arXiv 2507.18071); dual clip (arXiv 1912.09729).
        ``cap`` is prime-rl's ``max_importance_ratio`` (1e4): without clips, its IPO.

    >>> PPOClip(low=0.8, high=1.28)
    PPOClip(low=0.8, high=1.28, level='token', dual=None, cap=None)
    """

    low: float | None = 0.8
    high: float | None = 1.2
    level: Level = "token"
    dual: float | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        check_level("PPOClip", self.level)
        _check_encloses_one("PPOClip", self.low, self.high)
        what = f"at least high={self.high!r}, a bound on the ratio of negative examples"
        check_number(
            "PPOClip", "dual", self.dual, what, least=self.high or 1, optional=True,
            fix="pass dual=3.0",
        )
        what = f"at least high={self.high!r}, a bound on the ratio that keeps its gradient"
        check_number(
            "PPOClip", "cap", self.cap, what, least=self.high or 1, optional=True,
            fix="pass cap=1e4",
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
            if self.cap is not None:
                r = r.clamp(max=self.cap)
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
        what = "an upper bound on the ratio itself"
        check_number("CISPO", "high", self.high, what, least=1, fix="pass high=5.0")

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, layout: Layout
    ) -> PerToken:
        r = ratio(difference(log_probs.detach(), old_log_probs))
        weight = r.clamp(self.low, self.high)
        return PerToken(-weight * advantages * log_probs, (weight - r).bool())


@dataclass(frozen=True, kw_only=True)
class SAPO:
    """A soft gate on the update ratio in place of PPO's clip.

        loss = −A (4/τ) σ(τ (r − 1)),  r = π/π_old,  τ = τ₊ if A > 0 else τ₋

    The gradient is that of −A r times 4 σ (1 − σ): 1 at r = 1, and falling to 0 on either side.

    Args:
        tau_positive: τ₊ > 0.
        tau_negative: τ₋ > 0.

    Raises:
        InputError: a temperature that is no number > 0.

    References:
        arXiv 2511.20347.

    >>> SAPO()
    SAPO(tau_positive=1.0, tau_negative=1.05)
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    scope: ClassVar[Scope] = "token"

    def __post_init__(self) -> None:
        what = "how sharply the gate closes"
        for name in ("tau_positive", "tau_negative"):
            check_number("SAPO", name, getattr(self, name), what, above=0, fix=f"pass {name}=1.0")

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, layout: Layout
    ) -> PerToken:
        r = ratio(difference(log_probs, old_log_probs))
        # of the dtype of r, which `where` of two numbers would not be
        tau = torch.full_like(r, self.tau_negative).masked_fill(advantages > 0, self.tau_positive)
        return PerToken(-advantages * torch.sigmoid(tau * (r - 1)) * 4 / tau)


@dataclass(frozen=True, kw_only=True)
class GMPO:
    """The geometric mean of a sequence's clipped update ratios.

        loss = −A exp(mean_t log r'_t),  r' = min(r, b) if A ≥ 0 else max(r, a),  r = π/π_old

    Every token of the sequence has this loss, so its aggregation is "seq-mean-token-mean".

    Args:
        low: a in (0, 1], on the ratio itself.
        high: b ≥ 1.

    Raises:
        InputError: bounds that do not enclose 1.

    References:
        arXiv 2507.20673, with bounds e^−0.4 and e^0.4.

    >>> GMPO(low=0.7, high=1.5)
    GMPO(low=0.7, high=1.5)
    """

    low: float = math.exp(-0.4)
    high: float = math.exp(0.4)
    scope: ClassVar[Scope] = "sequence"

    def __post_init__(self) -> None:
        what = "a bound on the ratio itself"
        check_number("GMPO", "low", self.low, what, above=0, most=1, fix="pass low=0.67")
        check_number("GMPO", "high", self.high, what, least=1, fix="pass high=1.5")

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, layout: Layout
    ) -> PerToken:
        log_r = difference(log_probs, old_log_probs)
        above, below = log_r.clamp(max=math.log(self.high)), log_r.clamp(min=math.log(self.low))
        held = torch.where(advantages >= 0, above, below)
        loss = -advantages * ratio(layout.sequence_mean(held))
        return PerToken(loss, (held - log_r).detach().bool())


@dataclass(frozen=True, kw_only=True)
class VESPO:
    """The policy gradient under a smooth kernel of the sequence's update ratio.

        loss = −sg(φ(W)) A log π,  φ(W) = W^k e^{λ (1 − W)},  W = Π_t π/π_old,
        k, λ = k₊, λ₊ if A ≥ 0 else k₋, λ₋

    φ(1) = 1, and φ is largest at W = k/λ. With ``old_log_probs=rollout_log_probs`` W holds the
    engine's mismatch too, and the correction's weights are 1.

    Args:
        k_positive: k₊ ≥ 0, how fast φ falls towards W = 0.
        lambda_positive: λ₊ ≥ 0, how fast it falls beyond its largest.
        k_negative: k₋ ≥ 0.
        lambda_negative: λ₋ ≥ 0.

    Raises:
        InputError: a negative number.

    References:
        arXiv 2602.10693.

    >>> VESPO(k_positive=2.0).lambda_positive
    3.0
    """

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0
    scope: ClassVar[Scope] = "sequence"

    def __post_init__(self) -> None:
        for name in ("k_positive", "lambda_positive", "k_negative", "lambda_negative"):
            check_number(
                "VESPO", name, getattr(self, name), "an exponent", least=0, fix=f"pass {name}=2.0"
            )

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, layout: Layout
    ) -> PerToken:
        log_w = at_level(difference(log_probs.detach(), old_log_probs), layout, "sequence")
        # 1 − W without the digits that W loses near 1
        fall = -expm1(saturated(log_w))
        positive = self.k_positive * log_w + self.lambda_positive * fall
        negative = self.k_negative * log_w + self.lambda_negative * fall
        kernel = ratio(torch.where(advantages >= 0, positive, negative))
        return PerToken(-kernel * advantages * log_probs)


@dataclass(frozen=True, kw_only=True)
class ASPO:
    """PPO's clip with the update ratio of positive examples turned over.

        loss = −A min(1/r, c) for A > 0 and r ≤ b,  −A max(r, a) for A ≤ 0,  r = π/π_old

    The weight of a positive example falls as the policy learns it. The gradient in log r is the
    loss itself, also where c holds the weight; it is 0 where PPO clips: for A > 0 beyond b, for
    A < 0 below a.

    Args:
        low: a in [0, 1], on the ratio itself.
        high: b ≥ 1.
        cap: c ≥ 1, on the weight of positive examples.

    Raises:
        InputError: bounds that do not enclose 1, or a cap below 1.

    References:
        arXiv 2510.06062, whose soft dual clip is c.

    >>> ASPO(high=1.28)
    ASPO(low=0.8, high=1.28, cap=3.0)
    """

    low: float = 0.8
    high: float = 1.2
    cap: float = 3.0
    scope: ClassVar[Scope] = "token"

    def __post_init__(self) -> None:
        what = "a bound on the ratio itself"
        check_number("ASPO", "low", self.low, what, least=0, most=1, fix="pass low=0.8")
        check_number("ASPO", "high", self.high, what, least=1, fix="pass high=1.2")
        what = "a bound on the weight of positive examples"
        check_number("ASPO", "cap", self.cap, what, least=1, fix="pass cap=3.0")

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, layout: Layout
    ) -> PerToken:
        log_r = difference(log_probs, old_log_probs)
        with torch.no_grad():
            r, turned = ratio(log_r), ratio(-log_r)
            positive = advantages > 0
            weight = torch.where(positive, turned.clamp(max=self.cap), r)
            clipped = torch.where(positive, r > self.high, (advantages < 0) & (r < self.low))
            loss = -advantages * torch.where(clipped, r.clamp(self.low, self.high), weight)
            slope = masked(loss, ~clipped)
            capped = positive & (turned > self.cap)
        return PerToken(with_gradient(loss, (log_r, slope)), clipped | capped)


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
    "reinforce": Reinforce, "ppo-clip": PPOClip, "cispo": CISPO, "sapo": SAPO, "gmpo": GMPO,
    "vespo": VESPO, "aspo": ASPO,
}
"""Objectives by the names that the command line and configuration files use."""
