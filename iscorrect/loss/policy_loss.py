"""The policy-gradient loss: correction × objective × aggregation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from iscorrect.errors import check_per_token, describe, input_error
from iscorrect.gradients import with_gradient
from iscorrect.layout import Layout, as_layout, masked
from iscorrect.loss.aggregate import (
    Aggregation,
    Aggregator,
    Normalizer,
    aggregate_masked,
    check_aggregation,
    denominator,
)
from iscorrect.loss.bounds import Mask
from iscorrect.loss.caps import Limit
from iscorrect.loss.correction import Correction
from iscorrect.loss.evidence import Scope, scope_of, widest
from iscorrect.loss.metrics import Metrics, merge, policy_metrics
from iscorrect.loss.objectives import Objective, Reinforce, with_clipped
from iscorrect.loss.presets import sequence_is, sequence_tis, token_tis
from iscorrect.loss.ratios import Level, difference, is_finite
from iscorrect.loss.terms import ReferenceKL

Over = Literal["mask", "kept"]

BLOCK = 1 << 17
"""Tokens of a block on the CPU: temporaries of this size stay in the second-level cache."""


class LossOutput(NamedTuple):
    """What a loss returns.

    Attributes:
        loss: "", differentiable in ``log_probs``.
        metrics: see :class:`Metrics`.
    """

    loss: Tensor
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """A corrected policy-gradient loss, called like a function.

        loss = aggregate(w · objective(log π, log π_old, A) + β k(log π_ref − log π))

    Args:
        correction: gives w from π_old/μ.
        objective: callable (log_probs, old_log_probs, advantages, layout) -> loss "b t".
        aggregation: see :func:`aggregate`, or a callable (per_token, layout) -> "".
        over: what denominators count: the "mask", so that a rejected token weakens the batch, or
            the "kept" tokens, so that it inflates the others.
        horizon: the generation budget, for "seq-mean-token-sum-norm".
        reference_kl: a penalty on the divergence from ``ref_log_probs``.

    Raises:
        InputError: an unknown aggregation, or a horizon missing or idle.

    >>> loss_fn = PolicyLoss(correction=token_tis(cap=2.0))
    >>> log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> mask, rollout = torch.tensor([[True, True]]), torch.tensor([[-1.0, -4.0]])
    >>> loss, metrics = loss_fn(
    ...     log_probs, rollout_log_probs=rollout, advantages=torch.ones(1, 2), mask=mask
    ... )
    >>> loss.backward()
    >>> log_probs.grad
    tensor([[-0.5000, -1.0000]])
    """

    correction: Correction = Correction()
    objective: Objective = Reinforce()
    aggregation: Aggregation | Aggregator = "token-mean"
    over: Over = "mask"
    horizon: int | None = None
    reference_kl: ReferenceKL | None = None

    def __post_init__(self) -> None:
        if not callable(self.aggregation):
            check_aggregation("PolicyLoss", self.aggregation, self.horizon)
        if self.over not in get_args(Over):
            raise input_error(
                "PolicyLoss", "over", expected="'mask' or 'kept'", got=repr(self.over),
                fix="pass over='mask'",
            )
        if not isinstance(self.correction, Correction):
            raise input_error(
                "PolicyLoss", "correction", expected="a Correction", got=repr(self.correction),
                fix="pass token_tis(), with its parentheses, or uncorrected()",
            )
        if not callable(self.objective):
            raise input_error(
                "PolicyLoss", "objective", expected="a callable", got=repr(self.objective),
                fix="pass Reinforce() or PPOClip()",
            )

    @property
    def scope(self) -> Scope:
        """How far the loss of one token looks: at itself, its sequence, or the batch."""
        if callable(self.aggregation) or self.over == "kept":
            return "batch"
        return widest(self.correction.scope, scope_of(self.objective))

    def __call__(
        self,
        log_probs: Tensor,
        *,
        rollout_log_probs: Tensor,
        advantages: Tensor,
        mask: Tensor | Layout,
        old_log_probs: Tensor | None = None,
        ref_log_probs: Tensor | None = None,
        extra: Tensor | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics.

        Args:
            log_probs: "b t", log π, nats, with gradient.
            rollout_log_probs: "b t", log μ, nats, as the engine reported.
            advantages: "b t", or "b" for one per row.
            mask: bool "b t", or a layout. Other positions may hold anything, NaN included.
            old_log_probs: "b t", log π_old. None: π itself, without gradient.
            ref_log_probs: "b t", log π_ref, where there is a ``reference_kl``.
            extra: "b t", a per-token loss that no weight multiplies, such as
                :func:`score_centering` or an entropy bonus.
            normalizer: the whole batch's count, where this is a micro-batch or one rank's share.

        Raises:
            InputError: shapes, dtypes or devices differ; a tensor but ``log_probs`` and ``extra``
                carries gradient; ``ref_log_probs`` and ``reference_kl`` do not come together.
        """
        layout = as_layout("PolicyLoss", mask)
        if isinstance(advantages, Tensor) and advantages.shape == layout.mask.shape[:-1]:
            advantages = advantages.unsqueeze(-1).expand(layout.mask.shape)
        batch = _Batch(
            log_probs, rollout_log_probs, advantages, layout, old_log_probs, ref_log_probs, extra
        )
        self._check(batch, normalizer)
        if self._splits(batch):
            return self._by_blocks(batch, normalizer)
        return self._evaluate(batch, normalizer)[0]

    def _evaluate(
        self, batch: _Batch, normalizer: Normalizer | None, differentiate: bool = False
    ) -> tuple[LossOutput, Tensor]:
        """The loss, and the log-probs it was taken on: finite everywhere.

        With ``differentiate`` these are a leaf, whose gradient is that of ``batch.log_probs``.
        """
        layout, mask = batch.layout, batch.layout.mask
        current, old = batch.log_probs.detach(), batch.old_log_probs
        wide = torch.promote_types(current.dtype, torch.float32)
        present = mask & is_finite(current if old is None else difference(current, old))
        weights, keep, metrics = self.correction(
            # A token whose current log-prob is not finite has no ratio either: x − x is 0 or NaN.
            old_log_probs=current if old is None else old + (current - current),
            rollout_log_probs=batch.rollout_log_probs, mask=layout, advantages=batch.advantages,
        )
        if self.correction.nonfinite == "neutral":
            weights = masked(weights, present)
        # Inputs are made finite everywhere, so that a weight of 0 is enough to silence a token.
        log_probs = masked(batch.log_probs.to(wide), present)
        if differentiate:
            log_probs.requires_grad_()
        advantages = masked(batch.advantages, mask)
        before = log_probs.detach() if old is None else masked(old.to(wide), present)
        value, clipped = with_clipped(self.objective, log_probs, before, advantages, layout)
        if old is not None:
            metrics = metrics + policy_metrics(log_probs.detach() - before, layout, clipped)
        per_token = weights * value
        if self.reference_kl is not None and batch.ref_log_probs is not None:
            known = layout.with_mask(present & is_finite(batch.ref_log_probs))
            penalty = self.reference_kl(log_probs, batch.ref_log_probs, known)
            per_token = per_token + (weights * penalty if self.reference_kl.corrected else penalty)
        if batch.extra is not None:
            per_token = per_token + masked(batch.extra, mask)
        counted = layout if self.over == "mask" else layout.with_mask(keep)
        loss = self._aggregate(per_token, counted, normalizer)
        return LossOutput(loss, metrics), log_probs

    def _aggregate(
        self, per_token: Tensor, layout: Layout, normalizer: Normalizer | None
    ) -> Tensor:
        if callable(self.aggregation):
            return self.aggregation(per_token, layout)
        per_token = per_token if self.over == "mask" else masked(per_token, layout.mask)
        return aggregate_masked(per_token, layout, self.aggregation, normalizer, self.horizon)

    def _splits(self, batch: _Batch) -> bool:
        """Whether blocks of rows give the same loss, and gain from it.

        On a CPU the temporaries of a block stay in cache. A compiler fuses by itself, and a GPU
        wants one large kernel.
        """
        return (
            not torch.compiler.is_compiling()
            and self.scope != "batch"
            and batch.layout.sequence_group is None
            and batch.layout.mask.device.type == "cpu"
            and batch.layout.mask.ndim == 2
            and batch.layout.mask.numel() > BLOCK
            and not (batch.extra is not None and batch.extra.requires_grad)
        )

    def _by_blocks(self, batch: _Batch, normalizer: Normalizer | None) -> LossOutput:
        """Micro-batches of a few rows, each with its gradient; exact by what a normalizer means."""
        if normalizer is None and not callable(self.aggregation) and self.aggregation != "sum":
            normalizer = denominator(batch.layout, self.aggregation)
        differentiate = batch.log_probs.requires_grad and torch.is_grad_enabled()
        gradient = torch.empty_like(batch.log_probs)
        total = torch.zeros((), dtype=torch.float64)
        metrics = []
        rows = max(1, BLOCK // batch.layout.mask.shape[1])
        for start in range(0, len(gradient), rows):
            part = batch.rows(start, start + rows)
            (loss, seen), leaf = self._evaluate(part, normalizer, differentiate)
            if differentiate:
                (gradient[start : start + rows],) = torch.autograd.grad(loss, leaf)
            total += loss.detach()
            metrics.append(seen)
        total = total.to(torch.promote_types(gradient.dtype, torch.float32))
        if differentiate:
            total = with_gradient(total, (batch.log_probs, gradient))
        return LossOutput(total, merge(metrics))

    def _check(self, batch: _Batch, normalizer: Normalizer | None) -> None:
        check_per_token(
            "PolicyLoss", batch.layout.mask, gradient=("log_probs", "extra"),
            log_probs=batch.log_probs, rollout_log_probs=batch.rollout_log_probs,
            advantages=batch.advantages, old_log_probs=batch.old_log_probs,
            ref_log_probs=batch.ref_log_probs, extra=batch.extra,
        )
        if (self.reference_kl is None) != (batch.ref_log_probs is None):
            given = "a tensor" if self.reference_kl is None else "None"
            raise input_error(
                "PolicyLoss", "ref_log_probs",
                expected="given exactly where there is a reference_kl", got=given,
                fix="pass reference_kl=ReferenceKL(...) and ref_log_probs together",
            )
        if normalizer is not None and callable(self.aggregation):
            raise input_error(
                "PolicyLoss", "normalizer", expected="None for a callable aggregation",
                got=describe(normalizer), fix="divide inside the callable",
            )
        if isinstance(normalizer, (int, float)) and not normalizer > 0:
            raise input_error(
                "PolicyLoss", "normalizer", expected="> 0", got=repr(normalizer),
                fix="pass global_normalizer(...)",
            )


class _Batch(NamedTuple):
    log_probs: Tensor
    rollout_log_probs: Tensor
    advantages: Tensor
    layout: Layout
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    extra: Tensor | None

    def rows(self, start: int, stop: int) -> _Batch:
        """Some of the rows, log_probs without its history."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start:stop]

        return _Batch(
            self.log_probs.detach()[start:stop], self.rollout_log_probs[start:stop],
            self.advantages[start:stop], self.layout.rows(start, stop), cut(self.old_log_probs),
            cut(self.ref_log_probs), cut(self.extra),
        )


def token_tis_loss(
    log_probs: Tensor,
    *,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | Layout,
    old_log_probs: Tensor | None = None,
    cap: Limit = 2.0,
    objective: Objective = Reinforce(),
    aggregation: Aggregation = "token-mean",
    normalizer: Normalizer | None = None,
) -> LossOutput:
    """Policy-gradient loss with truncated importance weights per token.

        loss = aggregate(min(ρ_t, C) · objective)

    Args:
        log_probs: "b t", log π, nats, with gradient.
        rollout_log_probs: "b t", log μ, nats, as the engine reported.
        advantages: "b t", or "b" for one per row.
        mask: bool "b t", or a layout.
        old_log_probs: "b t", log π_old. None: π itself, without gradient.
        cap: C.
        objective: callable (log_probs, old_log_probs, advantages, layout) -> loss "b t".
        aggregation: see :func:`aggregate`.
        normalizer: the whole batch's count, where this is a micro-batch.

    Returns:
        loss "" and metrics.

    Raises:
        InputError: see :class:`PolicyLoss`.

    References:
        Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025).

    >>> log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> loss, metrics = token_tis_loss(
    ...     log_probs, rollout_log_probs=torch.tensor([[-1.0, -4.0]]), advantages=torch.ones(1),
    ...     mask=torch.tensor([[True, True]]),
    ... )
    >>> loss.backward()
    >>> log_probs.grad
    tensor([[-0.5000, -1.0000]])
    """
    loss_fn = PolicyLoss(correction=token_tis(cap), objective=objective, aggregation=aggregation)
    return loss_fn(
        log_probs, rollout_log_probs=rollout_log_probs, advantages=advantages, mask=mask,
        old_log_probs=old_log_probs, normalizer=normalizer,
    )


def masked_is_loss(
    log_probs: Tensor,
    *,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | Layout,
    old_log_probs: Tensor | None = None,
    low: float = 0.5,
    high: float | None = 5.0,
    level: Level = "token",
    objective: Objective = Reinforce(),
    aggregation: Aggregation = "token-mean",
    normalizer: Normalizer | None = None,
) -> LossOutput:
    """Policy-gradient loss with importance weights that are 0 outside a band.

        loss = aggregate(ρ 1{a ≤ ρ ≤ b} · objective)

    Args:
        log_probs: "b t", log π, nats, with gradient.
        rollout_log_probs: "b t", log μ, nats, as the engine reported.
        advantages: "b t", or "b" for one per row.
        mask: bool "b t", or a layout.
        old_log_probs: "b t", log π_old. None: π itself, without gradient.
        low: a; 0 for one-sided masking.
        high: b; None for none.
        level: whose ratio ρ is; with "token" and the defaults this is IcePop.
        objective: callable (log_probs, old_log_probs, advantages, layout) -> loss "b t".
        aggregation: see :func:`aggregate`.
        normalizer: the whole batch's count, where this is a micro-batch.

    Returns:
        loss "" and metrics.

    Raises:
        InputError: see :class:`PolicyLoss`.

    References:
        IcePop (Ring-1T, arXiv 2510.18855); sequence-MIS (arXiv 2510.26788).

    >>> log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> loss, metrics = masked_is_loss(
    ...     log_probs, rollout_log_probs=torch.tensor([[-1.0, -4.0]]), advantages=torch.ones(1),
    ...     mask=torch.tensor([[True, True]]),
    ... )
    >>> loss.backward()
    >>> log_probs.grad
    tensor([[-0.5000, -0.0000]])
    """
    correction = Correction(level=level, bound=Mask(low, high))
    loss_fn = PolicyLoss(correction=correction, objective=objective, aggregation=aggregation)
    return loss_fn(
        log_probs, rollout_log_probs=rollout_log_probs, advantages=advantages, mask=mask,
        old_log_probs=old_log_probs, normalizer=normalizer,
    )


def sequence_is_loss(
    log_probs: Tensor,
    *,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | Layout,
    old_log_probs: Tensor | None = None,
    cap: Limit | None = None,
    objective: Objective = Reinforce(),
    aggregation: Aggregation = "seq-mean-token-sum",
    normalizer: Normalizer | None = None,
) -> LossOutput:
    """Policy-gradient loss with the importance weight of the whole sequence.

        loss = aggregate(min(Π_t ρ_t, C) · objective)

    Unbiased without a cap, under the default objective and aggregation; its variance grows
    exponentially in length.

    Args:
        log_probs: "b t", log π, nats, with gradient.
        rollout_log_probs: "b t", log μ, nats, as the engine reported.
        advantages: "b t", or "b" for one per row.
        mask: bool "b t", or a layout.
        old_log_probs: "b t", log π_old. None: π itself, without gradient.
        cap: C; None for none.
        objective: callable (log_probs, old_log_probs, advantages, layout) -> loss "b t".
        aggregation: see :func:`aggregate`.
        normalizer: the whole batch's count, where this is a micro-batch.

    Returns:
        loss "" and metrics.

    Raises:
        InputError: see :class:`PolicyLoss`.

    References:
        arXiv 2510.26788, as PG-Seq-IS.

    >>> log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> loss, metrics = sequence_is_loss(
    ...     log_probs, rollout_log_probs=torch.tensor([[-1.5, -1.5]]), advantages=torch.ones(1),
    ...     mask=torch.tensor([[True, True]]),
    ... )
    >>> loss.backward()
    >>> log_probs.grad
    tensor([[-1., -1.]])
    """
    correction = sequence_is() if cap is None else sequence_tis(cap)
    loss_fn = PolicyLoss(correction=correction, objective=objective, aggregation=aggregation)
    return loss_fn(
        log_probs, rollout_log_probs=rollout_log_probs, advantages=advantages, mask=mask,
        old_log_probs=old_log_probs, normalizer=normalizer,
    )
