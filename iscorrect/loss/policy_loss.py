"""The policy-gradient loss: correction × objective × aggregation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from iscorrect.errors import (
    check_choice,
    check_per_token,
    check_shape,
    describe,
    input_error,
    is_part,
)
from iscorrect.layout import Layout, as_layout, masked
from iscorrect.loss.aggregate import (
    Aggregation,
    Aggregator,
    Name,
    Normalizer,
    check_normalizer,
    named_aggregation,
)
from iscorrect.loss.batch import Batch, Finite
from iscorrect.loss.bounds import Mask
from iscorrect.loss.caps import Limit
from iscorrect.loss.correction import Correction
from iscorrect.loss.evidence import Scope, scope_of, widest
from iscorrect.loss.metrics import Metrics, merge, policy_metrics
from iscorrect.loss.objectives import Objective, PerToken, PPOClip, Reinforce, made
from iscorrect.loss.presets import sequence_is, sequence_tis, token_tis
from iscorrect.loss.ratios import Level
from iscorrect.loss.terms import ReferenceKL

CountOver = Literal["mask", "kept"]

BLOCK = 1 << 17
"""Tokens that are worked on at a time on a CPU: their temporaries stay in its cache."""


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
        objective: callable (log_probs, old_log_probs, advantages, layout) -> :class:`PerToken`, or
            the loss "b t" alone.
        aggregation: a name, see :func:`aggregate`; an :class:`Aggregation`; or any callable
            (per_token, layout) -> "", which then sees the whole batch and takes no normalizer.
        over: what denominators count: the "mask", so that a rejected token weakens the batch, or
            the "kept" tokens, so that it inflates the others.
        horizon: the generation budget, for "seq-mean-token-sum-norm".
        reference_kl: a penalty on the divergence from ``ref_log_probs``.

    Raises:
        InputError: a part of the wrong kind, an unknown aggregation, a horizon missing or idle.

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
    aggregation: Name | Aggregation | Aggregator = "token-mean"
    over: CountOver = "mask"
    horizon: InitVar[int | None] = None
    reference_kl: ReferenceKL | None = None

    def __post_init__(self, horizon: int | None) -> None:
        mine = callable(self.aggregation) and not isinstance(self.aggregation, (Aggregation, type))
        if not mine or horizon is not None:
            spec = named_aggregation("PolicyLoss", self.aggregation, horizon)
            object.__setattr__(self, "aggregation", spec)
        check_choice("PolicyLoss", "over", self.over, get_args(CountOver))
        if not isinstance(self.correction, Correction):
            raise input_error(
                "PolicyLoss", "correction", expected="a Correction", got=repr(self.correction),
                fix="pass token_tis(), with its parentheses, or uncorrected()",
            )
        if not is_part(self.objective):
            raise input_error(
                "PolicyLoss", "objective", expected="a callable on tensors, not a class",
                got=repr(self.objective), fix="pass Reinforce() or PPOClip(), with parentheses",
            )
        if self.reference_kl is not None and not isinstance(self.reference_kl, ReferenceKL):
            raise input_error(
                "PolicyLoss", "reference_kl", expected="a ReferenceKL, or None",
                got=repr(self.reference_kl), fix="pass reference_kl=ReferenceKL(coefficient=1e-3)",
            )

    @property
    def scope(self) -> Scope:
        """How far the loss of one token looks: at itself, its sequence, or the batch."""
        if scope_of(self.aggregation) == "batch" or self.over == "kept":
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
        batch = Batch(
            log_probs, rollout_log_probs, per_token_advantages(advantages, layout), layout,
            old_log_probs, ref_log_probs, extra,
        )
        self.check("PolicyLoss", batch, normalizer, gradient=("log_probs", "extra"))
        return self.evaluate(batch, normalizer)

    def evaluate(self, batch: Batch, normalizer: Normalizer | None) -> LossOutput:
        """The loss of a batch that has been checked, and its metrics.

        Blocks of rows share nothing but the denominator, so that on a CPU they go one by one.
        """
        blocks = batch.blocks(BLOCK) if self._splits(batch) else [batch]
        sums = [self._block(block) for block in blocks]
        metrics = merge([block.metrics for block in sums])
        if not isinstance(self.aggregation, Aggregation):
            return LossOutput(sums[0].total, metrics)
        total = sums[0].total if len(sums) == 1 else torch.stack([x.total for x in sums]).sum()
        counted = batch.layout if self.over == "mask" else sums[0].counted
        return LossOutput(self.aggregation.divide(total, counted, normalizer), metrics)

    def _block(self, batch: Batch) -> _Block:
        finite = batch.finite()
        weighed = self.correction.weigh(finite.evidence)
        terms = self.per_token(finite, weighed.weights)
        metrics = weighed.metrics()
        if finite.before is not None:
            update = finite.log_probs.detach() - finite.before
            metrics = metrics + policy_metrics(update, batch.layout, terms.clipped)
        loss, counted = terms.loss, batch.layout
        if self.over == "kept":
            counted = counted.with_mask(weighed.keep)
            loss = masked(loss, weighed.keep)
        if isinstance(self.aggregation, Aggregation):
            return _Block(self.aggregation.total(loss, counted), counted, metrics)
        assert callable(self.aggregation)
        total = self.aggregation(loss, counted)
        if not isinstance(total, Tensor) or total.ndim:
            raise input_error(
                "PolicyLoss", "aggregation", expected="to return the loss, a tensor of one number",
                got=describe(total), fix="sum or average inside the callable",
            )
        return _Block(total, counted, metrics)

    def per_token(self, batch: Finite, weights: Tensor) -> PerToken:
        """The loss of each token, 0 outside the mask, and what the objective clipped.

            w · objective + β k + extra

        Args:
            batch: finite values.
            weights: "b t", w.
        """
        log_probs, layout = batch.log_probs, batch.evidence.layout
        before = log_probs.detach() if batch.before is None else batch.before
        terms = made(self.objective, log_probs, before, batch.advantages, layout)
        check_shape("PolicyLoss", "objective", terms.loss, layout.mask, "the loss")
        loss = weights * terms.loss
        if self.reference_kl is not None and batch.reference is not None:
            penalty = self.reference_kl(log_probs, *batch.reference)
            loss = loss + (weights * penalty if self.reference_kl.corrected else penalty)
        if batch.extra is not None:
            loss = loss + batch.extra
        return PerToken(loss, terms.clipped)

    def _splits(self, batch: Batch) -> bool:
        """Whether rows are independent of each other, and a CPU gains from that."""
        return (
            not torch.compiler.is_compiling()
            and self.scope != "batch"
            and self.correction.nonfinite != "raise"  # its message names positions in the batch
            and batch.layout.sequence_group is None
            and batch.layout.mask.device.type == "cpu"
            and batch.layout.mask.ndim == 2
            and batch.layout.mask.numel() > BLOCK
        )

    def check(
        self, caller: str, batch: Batch, normalizer: object, gradient: Sequence[str]
    ) -> None:
        """Raise unless the inputs fit each other and this loss.

        Args:
            caller: what the message begins with.
            batch: the inputs.
            normalizer: as given.
            gradient: names of the inputs that may carry gradient.
        """
        check_per_token(
            caller, batch.layout.mask, gradient=gradient,
            optional=("old_log_probs", "ref_log_probs", "extra"), log_probs=batch.log_probs,
            rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
            old_log_probs=batch.old_log_probs, ref_log_probs=batch.ref_log_probs,
            extra=batch.extra,
        )
        if (self.reference_kl is None) != (batch.ref_log_probs is None):
            given = "a tensor" if self.reference_kl is None else "None"
            raise input_error(
                caller, "ref_log_probs", expected="given exactly where there is a reference_kl",
                got=given, fix="pass reference_kl=ReferenceKL(...) and ref_log_probs together",
            )
        check_normalizer(caller, normalizer, self.aggregation)
        if not torch.compiler.is_compiling():
            self._warn(caller, batch, normalizer)

    def _warn(self, caller: str, batch: Batch, normalizer: object) -> None:
        """Say what is allowed, and hardly ever meant."""
        if batch.old_log_probs is None and isinstance(self.objective, PPOClip):
            warnings.warn(
                f"{caller}: without `old_log_probs` the ratio of PPOClip is 1, so nothing is ever"
                " clipped. Pass old_log_probs, those of before the update (for two policies"
                " rollout_log_probs), or take Reinforce(), which has the same gradient.",
                stacklevel=4,
            )
        if normalizer is not None and self.over == "kept":
            warnings.warn(
                f"{caller}: over='kept' divides by how many tokens or sequences are kept, and"
                " `normalizer` stands in the place of that count. Let it count what is kept in the"
                " whole batch, from Weights.keep; global_normalizer counts the mask it is given.",
                stacklevel=4,
            )
        alone = batch.layout.batch_group is None and normalizer is not None
        if alone and self.correction.scope == "batch":
            warnings.warn(
                f"{caller}: the correction looks at the whole batch and is given a part of it, as"
                " `normalizer` says: micro-batches will not add up. Pass Layout(batch_group=...)"
                " for ranks; under accumulation take a correction that looks at tokens or"
                " sequences; to a part of your own that does so add scope = 'token'.",
                stacklevel=4,
            )


class _Block(NamedTuple):
    """Some rows: the sum of their losses, what their denominator counts, and their metrics."""

    total: Tensor
    counted: Layout
    metrics: Metrics


def per_token_advantages(advantages: Tensor, layout: Layout) -> Tensor:
    """Advantages "b t" from "b", one per row; others as they are."""
    if isinstance(advantages, Tensor) and advantages.shape == layout.mask.shape[:-1]:
        return advantages.unsqueeze(-1).expand(layout.mask.shape)
    return advantages


def token_tis_loss(
    log_probs: Tensor,
    *,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | Layout,
    old_log_probs: Tensor | None = None,
    cap: Limit = 2.0,
    objective: Objective = Reinforce(),
    aggregation: Name | Aggregation = "token-mean",
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
    aggregation: Name | Aggregation = "token-mean",
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
    aggregation: Name | Aggregation = "seq-mean-token-sum",
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
