"""Objectives: per-token losses of the policy being trained, and the terms that go beside them.

An objective is any callable ``(log_probs, old_log_probs, advantages, layout) -> loss`` on "b t"
tensors that are finite, and 0 outside the mask. It carries the gradient; importance weights
multiply it afterwards. One that clips may also have ``with_clipped``, which returns the loss and
the tokens that it clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.divergences import Estimator, estimator
from iscorrect.errors import describe, input_error
from iscorrect.gradients import with_gradient
from iscorrect.layout import Layout, masked
from iscorrect.ratios import (
    Level,
    Scope,
    at_level,
    check_bounds,
    check_level,
    difference,
    level_scope,
    log_ratio,
    ratio,
)

Objective = Callable[[Tensor, Tensor, Tensor, Layout], Tensor]


def with_clipped(
    objective: Objective, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor | None]:
    """An objective's loss "b t", and the tokens that it clipped, bool "b t", where it tells."""
    both = getattr(objective, "with_clipped", None)
    if both is None:
        return objective(log_probs, old_log_probs, advantages, layout), None
    loss, clipped = both(log_probs, old_log_probs, advantages, layout)
    return loss, clipped


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
    ) -> Tensor:
        return -advantages * log_probs


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
        if self.dual is not None and not self.dual >= (self.high or 1):
            raise input_error(
                "PPOClip", "dual", expected=f"at least high={self.high!r}", got=repr(self.dual),
                fix="pass dual=3.0",
            )

    @property
    def scope(self) -> Scope:
        """"sequence" at every level but the token's."""
        return level_scope(self.level)

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, layout: Layout
    ) -> Tensor:
        return self.with_clipped(log_probs, old_log_probs, advantages, layout)[0]

    def with_clipped(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the tokens whose gradient the clip removes, bool "b t"."""
        log_r = at_level(difference(log_probs, old_log_probs), layout, self.level)
        r = ratio(log_r.detach())
        loss = plain = -advantages * r
        if self.low is not None or self.high is not None:
            loss = torch.maximum(loss, -advantages * r.clamp(self.low, self.high))
        if self.dual is not None:
            # −c A is an upper bound for A < 0 only; for A ≥ 0, |A| c ≥ 0 ≥ the loss.
            loss = torch.minimum(loss, self.dual * advantages.abs())
        clipped = (loss - plain).bool()
        # A clipped token keeps its value and loses its gradient; −A r is its own in log r.
        return with_gradient(loss, (log_r, masked(plain, ~clipped))), clipped


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
    ) -> Tensor:
        return self.with_clipped(log_probs, old_log_probs, advantages, layout)[0]

    def with_clipped(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the tokens whose update ratio the bounds change, bool "b t"."""
        r = ratio(difference(log_probs.detach(), old_log_probs))
        weight = r.clamp(self.low, self.high)
        return -weight * advantages * log_probs, (weight - r).bool()


@dataclass(frozen=True, kw_only=True)
class ReferenceKL:
    """A penalty on the divergence from a reference policy, added to the objective.

        loss += β k(log π_ref − log π)

    The estimators agree in value and differ in gradient: for tokens that π samples, that of k1 has
    mean zero, that of k2 has the gradient of KL(π‖π_ref) as its mean, that of k3 the gradient of
    KL(π_ref‖π) in the tokens.

    Args:
        coefficient: β ≥ 0.
        estimator: "k1", "k2", "k3", or a callable on log π_ref − log π.
        corrected: whether the importance weights multiply the penalty too. The tokens come from μ,
            so without them the penalty is an expectation under μ.

    Raises:
        InputError: a negative coefficient, or an unknown estimator.

    References:
        GRPO (arXiv 2402.03300) uses k3, uncorrected.
    """

    coefficient: float = 1e-3
    estimator: str | Estimator = "k3"
    corrected: bool = False

    def __post_init__(self) -> None:
        check_bounds("ReferenceKL", coefficient=self.coefficient)
        estimator("ReferenceKL", self.estimator)

    def __call__(self, log_probs: Tensor, ref_log_probs: Tensor, layout: Layout) -> Tensor:
        d = log_ratio(ref_log_probs, log_probs, layout)
        return self.coefficient * estimator("ReferenceKL", self.estimator)(d)


def score_centering(
    head_log_probs: Tensor,
    rollout_head_log_probs: Tensor,
    advantages: Tensor,
    *,
    cap: float = 2.0,
) -> Tensor:
    """Per-token loss that takes the mean score out of a truncated gradient.

        loss = A Σ_{v ∈ H} sg(q_v w(p_v/q_v) − α p_v) log p_v,
        w(ρ) = min(ρ, C),  α = ρ_H w(1/ρ_H),  ρ_H = (1 − Σ_H q)/(1 − Σ_H p)

    Added to −A w log π it makes the token's gradient Cov_q(A, w ∇log π): zero-mean in A whatever
    the truncation. Pass it as ``extra=`` to a :class:`PolicyLoss` with the same cap.

    Args:
        head_log_probs: "b t k", log p of the head H, the rollout's k likeliest tokens, normalised
            over the whole vocabulary; carries gradient. −inf fills short heads.
        rollout_head_log_probs: "b t k", log q of the same tokens, with the whole vocabulary's mass,
            after temperature, without top-p or top-k.
        advantages: "b t".
        cap: C of the weights it goes with.

    Returns:
        "b t", float32 or wider.

    Raises:
        InputError: shapes differ, or the cap is not positive.

    References:
        arXiv 2609.20807. Exact if the ratio is constant outside the head, so in particular where
        the head is the sampler's whole support.

    >>> p = torch.tensor([[[0.4, 0.4]]]).log()
    >>> q = torch.tensor([[[0.5, 0.3]]]).log()
    >>> score_centering(p, q, torch.ones(1, 1)).shape
    torch.Size([1, 1])
    """
    check_bounds("score_centering", cap=cap)
    if head_log_probs.shape != rollout_head_log_probs.shape:
        raise input_error(
            "score_centering", "rollout_head_log_probs",
            expected=f"of shape {tuple(head_log_probs.shape)} like `head_log_probs`",
            got=describe(rollout_head_log_probs), fix="gather both at the same token ids",
        )
    if head_log_probs.shape[:-1] != advantages.shape:
        raise input_error(
            "score_centering", "advantages",
            expected=f"of shape {tuple(head_log_probs.shape[:-1])}", got=describe(advantages),
            fix="pass one advantage per token",
        )
    wide = torch.promote_types(head_log_probs.dtype, torch.float32)
    head = head_log_probs.to(wide)
    p, q = head.detach().exp(), rollout_head_log_probs.to(wide).exp()
    rest_p = (1 - p.sum(-1)).clamp(min=0)
    rest_q = (1 - q.sum(-1)).clamp(min=0)
    # ρ min(1/ρ, C) = min(1, C ρ); a full head leaves 0/0, where nothing is left to scale.
    rest = torch.where(rest_p > 0, rest_q / rest_p, 1)
    alpha = rearrange((cap * rest).clamp(max=1), "... -> ... 1")
    coefficient = torch.minimum(p, cap * q) - alpha * p
    finite = torch.where(head.isfinite(), head, 0)
    return advantages * (coefficient * finite).sum(-1)


def _check_encloses_one(caller: str, low: float | None, high: float | None) -> None:
    check_bounds(caller, low=low, high=high)
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
