"""Ready checks of a loss, for anybody's test suite; each fails with the smallest example found.

A loss is called as ``loss_fn(log_probs, *, rollout_log_probs, advantages, mask)``, all "b t"; see
:func:`iscorrect.testing.renamed` for one with other names. How many examples are tried is up to
hypothesis' profile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from hypothesis import Phase, given, settings, strategies as st
from torch import Tensor
from torch.nn.functional import pad

from iscorrect.layout import Layout
from iscorrect.loss.advantages import Baseline
from iscorrect.testing.audit import LossFn, audit
from iscorrect.testing.strategies import Batch, Case, cases, padded_batches, policies
from iscorrect.testing.tabular import TabularPolicy

TOLERANCE = 1e-9
OUTSIDE = (torch.nan, torch.inf, -torch.inf, 1e4)


def check_unbiased(
    loss_fn: LossFn,
    *,
    batch: int = 1,
    group: Baseline | None = None,
    old: bool = False,
    scale: float = 1.0,
) -> None:
    """The expected −∇loss is ∇J, exactly, whatever the policies and the reward.

    Args:
        loss_fn: sums over tokens and averages over sequences.
        batch: sequences per call.
        group: see :func:`iscorrect.testing.audit`.
        old: whether the loss takes ``old_log_probs``, here those of a third policy.
        scale: what multiple of ∇J is expected, such as 1 − 1/G with a group's mean as baseline.

    Raises:
        AssertionError: with the policies and the reward.

    >>> from iscorrect import PolicyLoss, sequence_is
    >>> check_unbiased(PolicyLoss(correction=sequence_is(), aggregation="seq-mean-token-sum"))
    """

    def unbiased(case: Case, third: TabularPolicy) -> None:
        old_policy = third if old else None
        found = audit(loss_fn, *case, batch=batch, group=group, old_policy=old_policy)
        error = found.expected - scale * found.target
        if not error.norm() <= TOLERANCE * max(1.0, found.std):
            _fail(
                "check_unbiased",
                f"the expected gradient is {_shown(found.expected)}, not {scale:g} times ∇J ="
                f" {_shown(found.target)} (nearest multiple {found.scale:.6g}, cosine"
                f" {found.cosine:.6g})",
                logits=case.policy.logits, rollout_logits=case.rollout_policy.logits,
                reward=case.reward, **({"old_logits": third.logits} if old else {}),
            )

    _run(unbiased, cases(vocab=2, length=2), policies(vocab=2, length=2))


def check_identity_when_equal(loss_fn: LossFn, uncorrected_loss_fn: LossFn) -> None:
    """Where both policies agree, the correction changes neither loss nor gradient.

    Args:
        loss_fn: the corrected loss.
        uncorrected_loss_fn: the same loss with every weight 1.

    Raises:
        AssertionError: with the batch.

    >>> from iscorrect import PolicyLoss, icepop, uncorrected
    >>> check_identity_when_equal(
    ...     PolicyLoss(correction=icepop()), PolicyLoss(correction=uncorrected())
    ... )
    """

    def identity(batch: Batch) -> None:
        batch = batch._replace(rollout_log_probs=batch.log_probs)
        _same(
            "check_identity_when_equal", "the corrected loss differs from the uncorrected one",
            _evaluate(loss_fn, batch), _evaluate(uncorrected_loss_fn, batch), batch,
        )

    _run(identity, padded_batches())


def check_invariant_to_padding(loss_fn: LossFn) -> None:
    """Columns outside the mask, on either side, change neither loss nor gradient.

    Raises:
        AssertionError: with the batch before padding.

    >>> from iscorrect import PolicyLoss, sequence_tis
    >>> check_invariant_to_padding(PolicyLoss(correction=sequence_tis()))
    """

    def invariant(batch: Batch, left: int, right: int) -> None:
        mask, width = batch.layout.mask, batch.layout.mask.shape[1]
        wider = batch.each(
            lambda x: pad(x, (left, right), value=-1.0), Layout(pad(mask, (left, right)))
        )
        loss, gradient = _evaluate(loss_fn, wider)
        _same(
            "check_invariant_to_padding",
            f"{left} columns before and {right} after change the loss",
            (loss, gradient[:, left : left + width]), _evaluate(loss_fn, batch), batch,
        )

    _run(invariant, padded_batches(), st.integers(0, 2), st.integers(0, 2))


def check_invariant_to_packing(loss_fn: LossFn) -> None:
    """Sequences one behind the other in a single row give the loss and gradient of padded ones.

    Args:
        loss_fn: takes a :class:`iscorrect.Layout` as its mask. One that takes cumulative lengths
            can read them off ``layout.sequence_starts()``.

    Raises:
        AssertionError: with the padded batch.

    >>> from iscorrect import PolicyLoss, sequence_tis
    >>> check_invariant_to_packing(PolicyLoss(correction=sequence_tis()))
    """

    def invariant(batch: Batch) -> None:
        mask = batch.layout.mask
        rows = torch.arange(len(mask))[:, None].expand(mask.shape)[mask]
        ids = rearrange(rows, "n -> 1 n")
        packed = batch.each(
            lambda x: rearrange(x[mask], "n -> 1 n"),
            Layout(torch.ones_like(ids).bool(), sequence_ids=ids),
        )
        loss, gradient = _evaluate(loss_fn, packed, mask=packed.layout)
        back = torch.zeros_like(batch.log_probs).masked_scatter(mask, gradient)
        _same(
            "check_invariant_to_packing", "the packed loss differs from the padded one",
            (loss, back), _evaluate(loss_fn, batch, mask=batch.layout), batch,
        )

    _run(invariant, padded_batches())


def check_invariant_to_microbatching(
    loss_fn: LossFn, normalizer: Callable[[Tensor], Tensor | float]
) -> None:
    """Row by row, with the whole batch's denominator, the loss adds up to that of the batch.

    Args:
        loss_fn: takes ``normalizer=``.
        normalizer: the denominator of a whole batch, from its bool mask "b t".

    Raises:
        AssertionError: with the whole batch.

    >>> from functools import partial
    >>> from iscorrect import PolicyLoss, global_normalizer, token_tis
    >>> whole = partial(global_normalizer, group=None, gradients="summed")
    >>> check_invariant_to_microbatching(PolicyLoss(correction=token_tis()), whole)
    """

    def invariant(batch: Batch) -> None:
        whole = normalizer(batch.layout.mask)
        parts = [
            _evaluate(loss_fn, batch.row(i), normalizer=whole) for i in range(len(batch.log_probs))
        ]
        losses, gradients = zip(*parts, strict=True)
        _same(
            "check_invariant_to_microbatching", "the parts do not add up to the whole",
            (torch.stack(losses).sum(), torch.cat(gradients)), _evaluate(loss_fn, batch), batch,
        )

    _run(invariant, padded_batches())


def check_no_gradient_outside_mask(loss_fn: LossFn) -> None:
    """NaN, ±inf and large numbers outside the mask reach neither loss nor gradient.

    Raises:
        AssertionError: with the batch and what was put outside its mask.

    >>> from iscorrect import PolicyLoss, sequence_tis
    >>> check_no_gradient_outside_mask(PolicyLoss(correction=sequence_tis()))
    """

    def nothing(batch: Batch, ours: float, theirs: float) -> None:
        mask = batch.layout.mask
        dirty = batch._replace(
            log_probs=torch.where(mask, batch.log_probs, ours),
            rollout_log_probs=torch.where(mask, batch.rollout_log_probs, theirs),
        )
        _same(
            "check_no_gradient_outside_mask",
            f"log_probs={ours} and rollout_log_probs={theirs} outside the mask change the loss",
            _evaluate(loss_fn, dirty), _evaluate(loss_fn, batch), batch,
        )

    filling = st.sampled_from(OUTSIDE)
    _run(nothing, padded_batches(), filling, filling)


def check_finite(loss_fn: LossFn) -> None:
    """Log-ratios of up to a thousand nats leave loss and gradient finite, in float32.

    Raises:
        AssertionError: with the batch.

    >>> from iscorrect import PolicyLoss, sequence_tis
    >>> check_finite(PolicyLoss(correction=sequence_tis()))
    """

    def finite(batch: Batch, factor: float) -> None:
        scaled = batch._replace(
            log_probs=factor * batch.log_probs.float(), advantages=batch.advantages.float(),
            rollout_log_probs=factor * batch.rollout_log_probs.float(),
        )
        loss, gradient = _evaluate(loss_fn, scaled)
        if not (loss.isfinite() and gradient.isfinite().all()):
            problem = f"the loss is {loss}, its gradient {_shown(gradient)}"
            _fail("check_finite", problem, **_named(scaled))

    _run(finite, padded_batches(spread=4.0), st.sampled_from([1.0, 25.0, 250.0]))


def _run(test: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
    # The message shows the example; no need to search for what varies in it.
    phases = [phase for phase in Phase if phase is not Phase.explain]
    settings(deadline=None, database=None, phases=phases)(given(*strategies)(test))()


def _evaluate(
    loss_fn: LossFn, batch: Batch, *, mask: Tensor | Layout | None = None, **others: Any
) -> tuple[Tensor, Tensor]:
    log_probs = batch.log_probs.clone().requires_grad_()
    result = loss_fn(
        log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=batch.layout.mask if mask is None else mask, **others,
    )
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    gradient = torch.autograd.grad(loss, log_probs, allow_unused=True, materialize_grads=True)[0]
    return loss.detach(), gradient


def _same(
    check: str, problem: str, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor],
    batch: Batch,
) -> None:
    for name, a, b in zip(("loss", "gradient"), found, expected, strict=True):
        if not torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE):
            _fail(check, f"{problem}: {name} {_shown(a)}, expected {_shown(b)}", **_named(batch))


def _named(batch: Batch) -> dict[str, Tensor]:
    return batch._asdict() | {"layout": batch.layout.mask}


def _fail(check: str, problem: str, **example: Tensor) -> None:
    lines = [f"    {name} = {_shown(value)}" for name, value in example.items()]
    raise AssertionError("\n".join([f"{check}: {problem}, on", *lines]))


def _shown(x: Tensor) -> str:
    return str(x.tolist() if x.dtype == torch.bool else torch.round(x, decimals=6).tolist())
