"""Ready checks of a loss, for anybody's test suite; each fails with the smallest example found.

A loss is called as ``loss_fn(log_probs, *, rollout_log_probs, advantages, mask)``, all "b t", and
with ``old_log_probs`` where a check is told ``old=True``; see :func:`iscorrect.testing.renamed` for
one with other names. It is given float64. What it returns must agree with what is expected to

    |found − expected| ≤ tolerance · max(1, |expected|)

where the tolerance, if it is not told, is that of the dtype in which the loss computes
(:data:`TOLERANCES`): float32 where any of its intermediate results is narrower than float64, a
16-bit dtype where that is what it returns. How many examples are tried is up to hypothesis'
profile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from hypothesis import Phase, given, settings, strategies as st
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from iscorrect.layout import Layout
from iscorrect.loss.advantages import Baseline
from iscorrect.testing.audit import LossFn, audit, checked_loss
from iscorrect.testing.strategies import (
    Case,
    LossInputs,
    batches,
    cases,
    padded_batches,
    policies,
    tensors,
)
from iscorrect.testing.tabular import TabularPolicy

__all__ = [
    "TOLERANCES",
    "check_finite",
    "check_identity_when_equal",
    "check_invariant_to_microbatching",
    "check_invariant_to_packing",
    "check_invariant_to_padding",
    "check_monotone",
    "check_no_gradient_outside_mask",
    "check_same_as",
    "check_sign",
    "check_unbiased",
    "check_weights",
]

TOLERANCES = {
    torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2
}
"""Relative to the larger of 1 and the number expected, by the dtype in which a loss computes."""

__tracebackhide__ = True  # pytest shows the caller's line alone

OUTSIDE = (torch.nan, torch.inf, -torch.inf, 1e4)


def check_same_as(
    loss_fn: LossFn,
    reference: LossFn,
    *,
    old: bool = False,
    packed: bool = False,
    tolerance: float | None = None,
) -> None:
    """A loss has the value and the gradient of another.

    The inputs reach every branch: ratios far beyond the usual caps on both sides, both signs of
    the advantage, update ratios inside and outside the clip, holes in the mask, three policies
    apart, log-probs that 16 bits cannot hold.

    Args:
        loss_fn: the loss under test.
        reference: a :class:`iscorrect.PolicyLoss`, or any other callable.
        old: whether both take ``old_log_probs``.
        packed: whether both take a :class:`iscorrect.Layout` as their mask; it then also has
            several sequences in a row, and rows without any.
        tolerance: see :mod:`iscorrect.testing.checks`.

    Raises:
        AssertionError: with the inputs.

    >>> from iscorrect import PolicyLoss, token_tis
    >>> def mine(log_probs, *, rollout_log_probs, advantages, mask):
    ...     weights = (log_probs - rollout_log_probs).detach().exp().clamp(max=2)
    ...     return -(weights * advantages * log_probs)[mask].mean()
    >>> check_same_as(mine, PolicyLoss(correction=token_tis(cap=2.0)))
    """
    loss_fn = checked_loss("check_same_as", loss_fn)
    reference = checked_loss("check_same_as", reference, "reference")
    limit = _Tolerance(tolerance, loss_fn, old)

    def same(inputs: LossInputs) -> None:
        mask = inputs.layout if packed else inputs.layout.mask
        _agree(
            "check_same_as", "it differs from the reference",
            _evaluate(loss_fn, inputs, old=old, mask=mask),
            _evaluate(reference, inputs, old=old, mask=mask), inputs, old,
            limit(inputs, mask=mask),
        )

    _run(same, batches() if packed else padded_batches())


def check_weights(
    loss_fn: LossFn,
    weight_fn: Callable[..., Any],
    *,
    old: bool = False,
    tolerance: float | None = None,
) -> None:
    """The importance weights of a loss, seen from outside, are those of a correction.

        w_t = (∂loss/∂log π_t) / (∂loss/∂log π_t where μ = π_old)

    Denominators and the objective cancel, so only the weights must be known. Tokens without a
    gradient where the policies agree, such as clipped ones, must have none elsewhere.

    Args:
        loss_fn: the loss under test.
        weight_fn: a :class:`iscorrect.Correction`, or a callable with its arguments; returns
            weights "b t", or a tuple that begins with them.
        old: whether the loss takes ``old_log_probs``; otherwise π_old is π.
        tolerance: see :mod:`iscorrect.testing.checks`.

    Raises:
        AssertionError: with the inputs.

    >>> from iscorrect import PolicyLoss, PPOClip, sequence_mis
    >>> check_weights(PolicyLoss(correction=sequence_mis()), sequence_mis())
    >>> def weights(*, old_log_probs, rollout_log_probs, mask, advantages):
    ...     d = torch.where(mask, old_log_probs - rollout_log_probs, 0).sum(-1, keepdim=True)
    ...     return torch.where(d.exp() <= 3, d.exp(), 0)
    >>> check_weights(PolicyLoss(correction=sequence_mis(high=3.0)), weights)
    """
    loss_fn = checked_loss("check_weights", loss_fn)
    limit = _Tolerance(tolerance, loss_fn, old)

    def weighted(inputs: LossInputs) -> None:
        mask = inputs.layout.mask
        before = inputs.old_log_probs if old else inputs.log_probs
        _, gradient = _evaluate(loss_fn, inputs, old=old)
        _, plain = _evaluate(loss_fn, inputs._replace(rollout_log_probs=before), old=old)
        weights = weight_fn(
            old_log_probs=before, rollout_log_probs=inputs.rollout_log_probs, mask=mask,
            advantages=inputs.advantages,
        )
        weights = weights[0] if isinstance(weights, tuple) else weights
        shares = plain.double()
        expected = torch.where(mask & (shares != 0), weights, 0).double()
        found = gradient.double() / torch.where(shares != 0, shares, 1)
        _close("check_weights", "weights", "the weights are others", found, expected,
               limit(inputs), _named(inputs, old))

    _run(weighted, padded_batches())


def check_sign(loss_fn: LossFn, *, old: bool = False, tolerance: float | None = None) -> None:
    """No token with A > 0 is made less likely, none with A < 0 more, and none with A = 0 either.

    Holds for importance weights of any kind and for clipped objectives; not for a loss with a
    penalty or a bonus beside.

    Args:
        loss_fn: the loss under test.
        old: whether it takes ``old_log_probs``.
        tolerance: see :mod:`iscorrect.testing.checks`.

    Raises:
        AssertionError: with the inputs.

    >>> from iscorrect import PolicyLoss, PPOClip, token_tis
    >>> check_sign(PolicyLoss(correction=token_tis(), objective=PPOClip()), old=True)
    """
    loss_fn = checked_loss("check_sign", loss_fn)
    limit = _Tolerance(tolerance, loss_fn, old)

    def pushes(inputs: LossInputs) -> None:
        gradient = _evaluate(loss_fn, inputs, old=old)[1].double()
        wrong = torch.where(
            inputs.advantages == 0, gradient.abs(), gradient * inputs.advantages.sign()
        )
        largest = max(1.0, _largest(gradient))
        if not wrong.amax() <= limit(inputs) * largest:
            _fail(
                "check_sign",
                f"the gradient of the loss is {_shown(gradient)}, and −gradient · A < 0 at"
                f" {_place(wrong)}, or the gradient is not 0 where A is", **_named(inputs, old),
            )

    _run(pushes, padded_batches())


def check_monotone(loss_fn: LossFn, *, old: bool = False, tolerance: float | None = None) -> None:
    """A token that the engine found less likely gets no smaller a weight.

    Holds for truncation and plain importance sampling at every level; not for corrections that
    mask or reject.

    Args:
        loss_fn: the loss under test.
        old: whether it takes ``old_log_probs``.
        tolerance: see :mod:`iscorrect.testing.checks`.

    Raises:
        AssertionError: with the inputs.

    >>> from iscorrect import PolicyLoss, sequence_tis
    >>> check_monotone(PolicyLoss(correction=sequence_tis()))
    """
    loss_fn = checked_loss("check_monotone", loss_fn)
    limit = _Tolerance(tolerance, loss_fn, old)

    def monotone(inputs: LossInputs, step: float) -> None:
        lower = inputs._replace(rollout_log_probs=inputs.rollout_log_probs - step)
        _, gradient = _evaluate(loss_fn, inputs, old=old)
        _, raised = _evaluate(loss_fn, lower, old=old)
        fall = gradient.double().abs() - raised.double().abs()
        largest = max(1.0, _largest(gradient))
        if not fall.amax() <= limit(inputs) * largest:
            _fail(
                "check_monotone",
                f"with rollout_log_probs {step:g} lower, so that every ratio is larger, the"
                f" gradient falls from {_shown(gradient)} to {_shown(raised)} at {_place(fall)}",
                **_named(inputs, old),
            )

    _run(monotone, padded_batches(), st.sampled_from([0.125, 1.0]))


def check_unbiased(
    loss_fn: LossFn,
    *,
    batch: int = 1,
    group: Baseline | None = None,
    old: bool = False,
    scale: float = 1.0,
    tolerance: float | None = None,
) -> None:
    """The expected −∇loss is ∇J, exactly, whatever the policies and the reward.

    Rewards have both signs and pass 1; sequences have one length or several.

    Truncated, masked and clipped losses are biased by design: compare those with
    :func:`check_same_as` or :func:`check_weights`.

    Args:
        loss_fn: sums over tokens and averages over sequences.
        batch: sequences per call.
        group: see :func:`iscorrect.testing.audit`.
        old: whether the loss takes ``old_log_probs``, here those of a third policy.
        scale: what multiple of ∇J is expected, such as 1 − 1/G with a group's mean as baseline.
        tolerance: see :mod:`iscorrect.testing.checks`; relative to the standard deviation of −∇loss
            where that is larger than 1.

    Raises:
        AssertionError: with the policies and the reward.

    >>> from iscorrect import PolicyLoss, sequence_is
    >>> check_unbiased(PolicyLoss(correction=sequence_is(), aggregation="seq-mean-token-sum"))
    """
    loss_fn = checked_loss("check_unbiased", loss_fn)
    limit = _Tolerance(tolerance, loss_fn, old)

    def unbiased(inputs: tuple[Case, TabularPolicy]) -> None:
        case, third = inputs
        old_policy = third if old else None
        found = audit(loss_fn, *case, batch=batch, group=group, old_policy=old_policy)
        expected = scale * found.target
        error = found.expected - expected
        scale_of = max(1.0, found.std)
        if not error.norm() <= limit(_first_batch(case, batch)) * scale_of:
            _fail(
                "check_unbiased",
                f"the expected gradient is {_shown(found.expected, expected)}, not {scale:g} times"
                f" ∇J = {_shown(expected, found.expected)} (‖difference‖"
                f" {float(error.norm()):.3g}, nearest multiple {found.scale:.6g}, cosine"
                f" {found.cosine:.6g}), with length={case.policy.length}, eos={case.policy.eos}",
                logits=case.policy.logits, rollout_logits=case.rollout_policy.logits,
                reward=case.reward, **({"old_logits": third.logits} if old else {}),
            )

    _run(unbiased, _cases_with_a_third())


def check_identity_when_equal(
    loss_fn: LossFn,
    uncorrected_loss_fn: LossFn,
    *,
    old: bool = False,
    tolerance: float | None = None,
) -> None:
    """Where engine and trainer agree, the correction changes neither loss nor gradient.

    Args:
        loss_fn: the corrected loss.
        uncorrected_loss_fn: the same loss with every weight 1.
        old: whether both take ``old_log_probs``; those are then what the engine agrees with.
        tolerance: see :mod:`iscorrect.testing.checks`.

    Raises:
        AssertionError: with the inputs.

    >>> from iscorrect import PolicyLoss, icepop, uncorrected
    >>> check_identity_when_equal(
    ...     PolicyLoss(correction=icepop()), PolicyLoss(correction=uncorrected())
    ... )
    """
    loss_fn = checked_loss("check_identity_when_equal", loss_fn)
    uncorrected_loss_fn = checked_loss(
        "check_identity_when_equal", uncorrected_loss_fn, "uncorrected_loss_fn"
    )
    limit = _Tolerance(tolerance, loss_fn, old)

    def identity(inputs: LossInputs) -> None:
        before = inputs.old_log_probs if old else inputs.log_probs
        inputs = inputs._replace(rollout_log_probs=before)
        _agree(
            "check_identity_when_equal", "the corrected loss differs from the uncorrected one",
            _evaluate(loss_fn, inputs, old=old), _evaluate(uncorrected_loss_fn, inputs, old=old),
            inputs, old, limit(inputs),
        )

    _run(identity, padded_batches())


def check_invariant_to_padding(
    loss_fn: LossFn, *, old: bool = False, tolerance: float | None = None
) -> None:
    """Columns outside the mask, on either side, change neither loss nor gradient.

    Args:
        loss_fn: the loss under test.
        old: whether it takes ``old_log_probs``.
        tolerance: see :mod:`iscorrect.testing.checks`.

    Raises:
        AssertionError: with the inputs before padding.

    >>> from iscorrect import PolicyLoss, sequence_tis
    >>> check_invariant_to_padding(PolicyLoss(correction=sequence_tis()))
    """
    loss_fn = checked_loss("check_invariant_to_padding", loss_fn)
    limit = _Tolerance(tolerance, loss_fn, old)

    def invariant(inputs: LossInputs, left: int, right: int) -> None:
        mask, width = inputs.layout.mask, inputs.layout.mask.shape[1]
        wider = inputs.each(
            lambda x: pad(x, (left, right), value=-1.0), Layout(pad(mask, (left, right)))
        )
        loss, gradient = _evaluate(loss_fn, wider, old=old)
        _agree(
            "check_invariant_to_padding",
            f"{left} columns before and {right} after change the loss",
            (loss, gradient[:, left : left + width]), _evaluate(loss_fn, inputs, old=old), inputs,
            old, limit(inputs),
        )

    _run(invariant, padded_batches(), st.integers(0, 2), st.integers(0, 2))


def check_invariant_to_packing(
    loss_fn: LossFn, *, old: bool = False, tolerance: float | None = None
) -> None:
    """Sequences one behind the other in a single row give the loss and gradient of padded ones.

    Args:
        loss_fn: takes a :class:`iscorrect.Layout` as its mask. One that takes cumulative lengths
            can read them off ``layout.sequence_starts()``.
        old: whether it takes ``old_log_probs``.
        tolerance: see :mod:`iscorrect.testing.checks`.

    Raises:
        AssertionError: with the padded inputs.

    >>> from iscorrect import PolicyLoss, sequence_tis
    >>> check_invariant_to_packing(PolicyLoss(correction=sequence_tis()))
    """
    loss_fn = checked_loss("check_invariant_to_packing", loss_fn)
    limit = _Tolerance(tolerance, loss_fn, old)

    def invariant(inputs: LossInputs) -> None:
        mask = inputs.layout.mask
        rows = torch.arange(len(mask))[:, None].expand(mask.shape)[mask]
        ids = rearrange(rows, "n -> 1 n")
        packed = inputs.each(
            lambda x: rearrange(x[mask], "n -> 1 n"),
            Layout(torch.ones_like(ids).bool(), sequence_ids=ids),
        )
        loss, gradient = _evaluate(loss_fn, packed, old=old, mask=packed.layout)
        back = torch.zeros_like(inputs.log_probs).masked_scatter(mask, gradient)
        _agree(
            "check_invariant_to_packing", "the packed loss differs from the padded one",
            (loss, back), _evaluate(loss_fn, inputs, old=old, mask=inputs.layout), inputs, old,
            limit(inputs, mask=inputs.layout),
        )

    _run(invariant, padded_batches())


def check_invariant_to_microbatching(
    loss_fn: LossFn,
    normalizer: Callable[[Tensor], Tensor | float],
    *,
    old: bool = False,
    tolerance: float | None = None,
) -> None:
    """Row by row, with the whole batch's denominator, the loss adds up to that of the batch.

    Args:
        loss_fn: takes ``normalizer=``.
        normalizer: the denominator of a whole batch, from its bool mask "b t".
        old: whether the loss takes ``old_log_probs``.
        tolerance: see :mod:`iscorrect.testing.checks`.

    Raises:
        AssertionError: with the whole batch.

    >>> from functools import partial
    >>> from iscorrect import PolicyLoss, global_normalizer, token_tis
    >>> whole = partial(global_normalizer, group=None, gradients="summed")
    >>> check_invariant_to_microbatching(PolicyLoss(correction=token_tis()), whole)
    """
    loss_fn = checked_loss("check_invariant_to_microbatching", loss_fn)
    limit = _Tolerance(tolerance, loss_fn, old)

    def invariant(inputs: LossInputs) -> None:
        whole = normalizer(inputs.layout.mask)
        parts = [
            _evaluate(loss_fn, inputs.row(i), old=old, normalizer=whole)
            for i in range(len(inputs.log_probs))
        ]
        losses, gradients = zip(*parts, strict=True)
        _agree(
            "check_invariant_to_microbatching", "the parts do not add up to the whole",
            (torch.stack(losses).sum(), torch.cat(gradients)),
            _evaluate(loss_fn, inputs, old=old), inputs, old,
            limit(inputs),
        )

    _run(invariant, padded_batches())


def check_no_gradient_outside_mask(
    loss_fn: LossFn, *, old: bool = False, tolerance: float | None = None
) -> None:
    """NaN, ±inf and large numbers outside the mask reach neither loss nor gradient.

    Args:
        loss_fn: the loss under test.
        old: whether it takes ``old_log_probs``.
        tolerance: see :mod:`iscorrect.testing.checks`.

    Raises:
        AssertionError: with the inputs and what was put outside their mask.

    >>> from iscorrect import PolicyLoss, sequence_tis
    >>> check_no_gradient_outside_mask(PolicyLoss(correction=sequence_tis()))
    """
    loss_fn = checked_loss("check_no_gradient_outside_mask", loss_fn)
    limit = _Tolerance(tolerance, loss_fn, old)

    def nothing(inputs: LossInputs, ours: float, theirs: float) -> None:
        mask = inputs.layout.mask
        dirty = inputs._replace(
            log_probs=torch.where(mask, inputs.log_probs, ours),
            old_log_probs=torch.where(mask, inputs.old_log_probs, ours),
            rollout_log_probs=torch.where(mask, inputs.rollout_log_probs, theirs),
            advantages=torch.where(mask, inputs.advantages, ours),
        )
        _agree(
            "check_no_gradient_outside_mask",
            f"log_probs=advantages={ours} and rollout_log_probs={theirs} outside the mask change"
            " the loss",
            _evaluate(loss_fn, dirty, old=old), _evaluate(loss_fn, inputs, old=old), inputs, old,
            limit(inputs),
        )

    filling = st.sampled_from(OUTSIDE)
    _run(nothing, padded_batches(), filling, filling)


def check_finite(loss_fn: LossFn, *, old: bool = False) -> None:
    """Log-ratios of up to a thousand nats leave loss and gradient finite, in float32.

    Args:
        loss_fn: the loss under test.
        old: whether it takes ``old_log_probs``.

    Raises:
        AssertionError: with the inputs.

    >>> from iscorrect import PolicyLoss, sequence_tis
    >>> check_finite(PolicyLoss(correction=sequence_tis()))
    """
    loss_fn = checked_loss("check_finite", loss_fn)

    def finite(inputs: LossInputs, factor: float) -> None:
        scaled = inputs.each(lambda x: factor * x.float(), inputs.layout)
        scaled = scaled._replace(advantages=inputs.advantages.float())
        loss, gradient = _evaluate(loss_fn, scaled, old=old)
        if not (loss.isfinite() and gradient.isfinite().all()):
            problem = f"the loss is {loss}, its gradient {_shown(gradient)}"
            _fail("check_finite", problem, **_named(scaled, old))

    _run(finite, padded_batches(spread=4.0), st.sampled_from([250.0, 25.0]))


def _run(test: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
    # The message shows the example; no need to search for what varies in it.
    chosen = settings()
    phases = [phase for phase in chosen.phases if phase is not Phase.explain]
    run = settings(chosen, deadline=None, database=None, phases=phases)(given(*strategies)(test))
    try:
        run()
    except AssertionError as error:
        # Hypothesis adds notes that show the example a second time.
        message = str(error)
    else:
        return
    raise AssertionError(message)


def _evaluate(
    loss_fn: Callable[..., Tensor], inputs: LossInputs, *, old: bool,
    mask: Tensor | Layout | None = None, **others: Any,
) -> tuple[Tensor, Tensor]:
    log_probs = inputs.log_probs.clone().requires_grad_()
    if old:
        others["old_log_probs"] = inputs.old_log_probs.clone()
    mask = inputs.layout.mask if mask is None else mask
    # copies, or a loss that changes its inputs would change what it is compared with
    copied = mask.clone() if isinstance(mask, Tensor) else mask.with_mask(mask.mask.clone())
    loss = loss_fn(
        log_probs, rollout_log_probs=inputs.rollout_log_probs.clone(),
        advantages=inputs.advantages.clone(), mask=copied, **others,
    )
    if not loss.requires_grad:
        return loss, torch.zeros_like(log_probs)
    gradient = torch.autograd.grad(loss, log_probs, allow_unused=True, materialize_grads=True)[0]
    return loss.detach(), gradient


@st.composite
def _cases_with_a_third(draw: st.DrawFn) -> tuple[Case, TabularPolicy]:
    """Two policies with a reward, and a third policy of the same sequences."""
    length, eos = draw(st.sampled_from([(2, None), (3, 1)]))
    case = draw(cases(vocab=2, length=length, eos=eos))
    reward = draw(tensors(case.reward.shape, low=-2, high=2))
    return case._replace(reward=reward), draw(policies(vocab=2, length=length, eos=eos))


def _first_batch(case: Case, batch: int) -> LossInputs:
    rows = [0] * batch
    ours, theirs = case.policy.log_probs[rows], case.rollout_policy.reported_log_probs[rows]
    layout = Layout(case.policy.sequences.mask[rows])
    return LossInputs(ours, ours, theirs, torch.ones_like(ours), layout)


class _Narrower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether any operation returns a floating dtype narrower than float64."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
                self.seen = True
        return result


class _Tolerance:
    """The tolerance of a loss: told, or found on the first inputs it is called with."""

    def __init__(self, told: float | None, loss_fn: Callable[..., Tensor], old: bool) -> None:
        self.limit, self.loss_fn, self.old = told, loss_fn, old

    def __call__(self, inputs: LossInputs, **others: Any) -> float:
        if self.limit is None:
            mode = _Narrower()  # type: ignore[no-untyped-call]
            with mode:
                loss, _ = _evaluate(self.loss_fn, inputs, old=self.old, **others)
            narrow = loss.dtype == torch.float64 and mode.seen
            self.limit = TOLERANCES[torch.float32 if narrow else loss.dtype]
        return self.limit


def _agree(
    check: str, problem: str, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor],
    inputs: LossInputs, old: bool, limit: float,
) -> None:
    for what, a, b in zip(("loss", "gradient"), found, expected, strict=True):
        _close(check, what, problem, a, b, limit, _named(inputs, old))


def _close(
    check: str, what: str, problem: str, found: Tensor, expected: Tensor, limit: float,
    example: dict[str, Tensor],
) -> None:
    found, expected = found.double(), expected.double()
    difference = (found - expected).abs()
    excess = difference - limit * expected.abs().clamp(min=1)
    if excess.numel() and not excess.amax() <= 0:
        at = _place(excess)
        _fail(
            check,
            f"{problem}: {what} {_shown(found, expected)}, expected {_shown(expected, found)},"
            f" {float(difference[_argmax(excess)]):.3g} apart{at and ' at ' + at}"
            f" (tolerance {limit:g})",
            **example,
        )


def _argmax(x: Tensor) -> tuple[int, ...]:
    """Where the largest entry is, NaN counting as largest."""
    flat = int(torch.where(x.isnan(), torch.inf, x).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), x.shape))


def _place(x: Tensor) -> str:
    where = _argmax(x)
    return f"row {where[0]}, token {where[1]}" if where else ""


def _largest(x: Tensor) -> float:
    return float(x.double().abs().amax()) if x.numel() else 0.0


def _named(inputs: LossInputs, old: bool) -> dict[str, Tensor]:
    names = inputs._asdict()
    names["mask"] = names.pop("layout").mask
    if len(set(inputs.layout.sequence_starts().sum(-1).tolist()) - {0, 1}) > 0:
        names["sequence_starts"] = inputs.layout.sequence_starts()
    if not old:
        del names["old_log_probs"]
    return names


def _fail(check: str, problem: str, **example: Tensor) -> None:
    lines = [f"    {name} = {_shown(value)}" for name, value in example.items()]
    raise AssertionError("\n".join([f"{check}: {problem}, on", *lines]))


def _shown(x: Tensor, other: Tensor | None = None) -> str:
    """Six decimals, or all of them where six do not tell two tensors apart."""
    if x.dtype == torch.bool:
        return str(x.tolist())
    short = torch.round(x, decimals=6)
    if other is not None and torch.equal(short, torch.round(other, decimals=6)):
        return str(x.tolist())
    return str(short.tolist())
