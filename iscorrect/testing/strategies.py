"""Hypothesis strategies for policies, batches, layouts, corrections and losses.

Numbers are drawn from coarse grids, so that a failing example shrinks to one that can be read.

>>> from hypothesis import given
>>> @given(batches())
... def log_ratios_vanish_where_policies_agree(batch):
...     d = batch.log_probs - batch.log_probs
...     assert not batch.layout.total(d)
>>> log_ratios_vanish_where_policies_agree()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from iscorrect.layout import Layout, pad_sequences
from iscorrect.loss.aggregate import AGGREGATIONS, Aggregation, SequenceMeanTokenSumNorm
from iscorrect.loss.bounds import (
    Bound,
    ByAge,
    Clip,
    ConfidenceCap,
    Ignore,
    Mask,
    ParetoSmooth,
    SignedTruncate,
    Truncate,
)
from iscorrect.loss.caps import ESSCap, IonidesCap, MSEOptimalCap
from iscorrect.loss.correction import Correction
from iscorrect.loss.objectives import OBJECTIVES, Objective, PPOClip
from iscorrect.loss.policy_loss import PolicyLoss
from iscorrect.loss.presets import PRESETS
from iscorrect.loss.ratios import Level
from iscorrect.loss.rules import (
    AgeAbove,
    BinaryKL,
    DivergenceAbove,
    OffPolicyNegative,
    ProbabilityShift,
    RatioOutside,
    Rule,
    SecondMomentAbove,
    Veto,
)
from iscorrect.testing.tabular import TabularPolicy, sequences

__all__ = [
    "Case",
    "LossInputs",
    "batches",
    "bounds",
    "cases",
    "corrections",
    "layouts",
    "levels",
    "log_prob_pairs",
    "log_probs",
    "losses",
    "masks",
    "objectives",
    "padded_batches",
    "policies",
    "rules",
    "tensors",
]


class LossInputs(NamedTuple):
    """What a loss is given.

    Attributes:
        log_probs: "b t", log π.
        old_log_probs: "b t", log π_old.
        rollout_log_probs: "b t", log μ.
        advantages: "b t", equal within a sequence.
        layout: which tokens count.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    rollout_log_probs: Tensor
    advantages: Tensor
    layout: Layout

    def each(self, change: Callable[[Tensor], Tensor], layout: Layout) -> LossInputs:
        """The same with every tensor changed alike."""
        ours, old, rollout, advantages, _ = self
        return LossInputs(change(ours), change(old), change(rollout), change(advantages), layout)

    def row(self, i: int) -> LossInputs:
        """One row as a batch of its own."""
        return self.each(lambda x: x[i : i + 1], self.layout.rows(i, i + 1))


class Case(NamedTuple):
    """What an audit is given.

    Attributes:
        policy: π.
        rollout_policy: μ, over the same sequences and with full support.
        reward: "n" in [0, 1].
    """

    policy: TabularPolicy
    rollout_policy: TabularPolicy
    reward: Tensor


def tensors(
    shape: Sequence[int], *, low: float, high: float, step: float = 0.125
) -> st.SearchStrategy[Tensor]:
    """Float64 tensors of multiples of ``step``; they shrink towards 0."""
    size = torch.Size(shape).numel()
    number = st.integers(round(low / step), round(high / step)).map(lambda i: i * step)
    return st.lists(number, min_size=size, max_size=size).map(
        lambda values: torch.tensor(values, dtype=torch.float64).view(*shape)
    )


def log_probs(shape: Sequence[int]) -> st.SearchStrategy[Tensor]:
    """Log-probs down to −4 nats; float64."""
    return tensors(shape, low=-4, high=0)


@st.composite
def log_prob_pairs(
    draw: st.DrawFn, shape: Sequence[int], spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Both log π and log μ of the same tokens, at most ``spread`` nats apart; float64."""
    old = draw(log_probs(shape))
    return old, (old - draw(tensors(shape, low=-spread, high=spread))).clamp(max=0)


def masks(rows: int, length: int) -> st.SearchStrategy[Tensor]:
    """Bool masks "b t" with holes, empty rows, and now and then nothing at all."""
    row = st.lists(st.booleans(), min_size=length, max_size=length) | st.just([True] * length)
    return st.lists(row, min_size=rows, max_size=rows).map(
        lambda rows: torch.tensor(rows, dtype=torch.bool)
    )


@st.composite
def layouts(draw: st.DrawFn, max_rows: int = 3, max_length: int = 4) -> Layout:
    """Padded and packed rows, with and without segments, and an age for each token."""
    rows, length = draw(st.integers(1, max_rows)), draw(st.integers(1, max_length))
    mask = draw(masks(rows, length))
    start = st.integers(0, 3).map(lambda i: i == 3)
    row = st.lists(start, min_size=length, max_size=length)
    starts = st.lists(row, min_size=rows, max_size=rows).map(
        lambda rows: torch.tensor(rows).long().cumsum(-1)
    )
    ages = st.lists(st.integers(0, 20), min_size=mask.numel(), max_size=mask.numel())
    return Layout(
        mask,
        sequence_ids=draw(st.none() | starts),
        segment_ids=draw(st.none() | starts),
        age=torch.tensor(draw(ages)).view(mask.shape),
    )


@st.composite
def batches(
    draw: st.DrawFn, layout: st.SearchStrategy[Layout] | None = None, spread: float = 3.0
) -> LossInputs:
    """Inputs of a loss: three policies, one advantage per sequence.

    Args:
        draw: hypothesis passes it.
        layout: where tokens lie; None: :func:`layouts`, padded and packed, with holes.
        spread: the largest log π_old/μ, nats; 3 passes a cap of 20. The update moves the policy
            by up to 1 nat, beyond the usual clips on either side.
    """
    where = draw(layouts() if layout is None else layout)
    size = where.mask.numel()
    mismatch = draw(_mismatches(spread))
    tokens = draw(st.lists(_tokens(mismatch), min_size=size, max_size=size))
    table = torch.tensor(tokens, dtype=torch.float64).view(*where.mask.shape, 3)
    ours, old, rollout = table.unbind(-1)
    values = draw(tensors(where.mask.shape, low=-2, high=2, step=0.5))
    first = where.with_mask(torch.ones_like(where.mask))
    advantages = first.sequence_total(torch.where(first.sequence_starts(), values, 0.0))
    return LossInputs(ours, old, rollout, advantages, where)


@st.composite
def padded_batches(
    draw: st.DrawFn, max_rows: int = 3, max_length: int = 4, spread: float = 3.0
) -> LossInputs:
    """Inputs of a loss in which each row is one sequence with at least one token, then padding.

    Holes in the mask hold numbers as other tokens do; the padding holds zeros.

    Args:
        draw: hypothesis passes it.
        max_rows: sequences at most.
        max_length: tokens of a sequence at most, holes included.
        spread: as :func:`batches` has it.
    """
    token = st.tuples(st.booleans(), _tokens(draw(_mismatches(spread))))
    row = st.tuples(
        st.integers(-4, 4),
        st.lists(token, min_size=1, max_size=max_length).filter(
            lambda tokens: not all(hole for hole, _ in tokens)
        ),
    )
    rows = draw(st.lists(row, min_size=1, max_size=max_rows))
    numbers = [torch.tensor([t for _, t in tokens], dtype=torch.float64) for _, tokens in rows]
    ours, old, rollout = (pad_sequences([x[:, i] for x in numbers])[0] for i in range(3))
    mask, _ = pad_sequences([torch.tensor([not hole for hole, _ in tokens]) for _, tokens in rows])
    advantages = torch.tensor([[value / 2] for value, _ in rows], dtype=torch.float64)
    return LossInputs(ours, old, rollout, advantages.expand(mask.shape).clone(), Layout(mask))


def _mismatches(spread: float) -> st.SearchStrategy[st.SearchStrategy[float]]:
    """What log π_old/μ may be in a batch: anything up to ``spread``, small, or far."""
    steps = round(8 * spread)
    small = min(4, steps)
    anything = st.integers(-small, small) | st.integers(-steps, steps)
    # Small and above 0: a sequence whose product passes a cap that none of its tokens passes.
    drift = st.integers(min(1, steps), small)
    far = st.integers(small, steps) | st.integers(-steps, -small)
    kinds = [x.map(lambda i: i / 8) for x in (anything, drift, far)]
    return st.sampled_from(kinds)


def _tokens(mismatch: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[float, float, float]]:
    """Log π, log π_old and log μ of one token: multiples of 1/8, now and then of 1/1024.

    The finer ones take more bits than a 16-bit format has; all are exact in float32.
    """
    old = st.integers(-32, 0).map(lambda i: i / 8) | st.integers(-4096, 0).map(lambda i: i / 1024)
    update = st.integers(-8, 8).map(lambda i: i / 8)
    return st.builds(
        lambda old, mismatch, update: (min(old + update, 0.0), old, min(old - mismatch, 0.0)),
        old, mismatch, update,
    )


@st.composite
def policies(
    draw: st.DrawFn, vocab: int | None = None, length: int | None = None, eos: int | None = None
) -> TabularPolicy:
    """Tabular policies with logits in [−2, 2], of 2 or 3 tokens and up to 3 steps if not told."""
    vocab = draw(st.integers(2, 3)) if vocab is None else vocab
    length = draw(st.integers(1, 3)) if length is None else length
    shape = sequences(vocab, length, eos).seen.shape
    return TabularPolicy(draw(tensors(shape, low=-2, high=2, step=0.25)), length, eos)


@st.composite
def cases(
    draw: st.DrawFn, vocab: int | None = None, length: int | None = None, eos: int | None = None
) -> Case:
    """Inputs of an audit: two policies with the same sequences, and a reward in [0, 1]."""
    policy = draw(policies(vocab, length, eos))
    change = draw(tensors(policy.logits.shape, low=-1, high=1, step=0.25))
    rollout = TabularPolicy(policy.logits + change, policy.length, policy.eos)
    return Case(policy, rollout, draw(tensors(policy.probabilities.shape, low=0, high=1)))


_caps = st.sampled_from([0.5, 1.0, 1.5, 2.0, 5.0])
_lows = st.sampled_from([0.0, 0.5, 0.9])
_ages = st.integers(0, 4)


def bounds() -> st.SearchStrategy[Bound | None]:
    """Every bound of the library, and none; one needs a layout with ages."""
    return st.one_of(
        st.none(), st.just(Ignore()), _caps.map(Truncate), st.builds(Mask, _lows, st.none()),
        caps().map(Truncate), _caps.map(SignedTruncate),
        st.builds(lambda low, width: Mask(low, low + width), _lows, _caps),
        st.builds(lambda low, width: Clip(low, low + width), _lows, _caps),
        st.builds(ConfidenceCap), st.builds(ParetoSmooth),
        st.builds(
            lambda limit, cap: ByAge(limit=limit, fresh=Truncate(cap), stale=Mask(0.5, 2.0)),
            _ages, _caps,
        ),
    )


def caps() -> st.SearchStrategy[IonidesCap | MSEOptimalCap | ESSCap]:
    """Every cap that depends on the data."""
    return st.sampled_from([IonidesCap(), MSEOptimalCap(), ESSCap()])


def rules() -> st.SearchStrategy[Rule]:
    """Every rejection rule of the library; one needs a layout with ages."""
    limits = st.sampled_from([0.01, 0.1, 0.5])
    return st.one_of(
        st.builds(
            lambda level, low, width: RatioOutside(level=level, low=low, high=low + width),
            levels(), _lows, _caps,
        ),
        st.builds(
            lambda limit, kind, over: DivergenceAbove(limit=limit, estimator=kind, over=over),
            limits, st.sampled_from(["k1", "k2", "k3", "binary-kl", "tv"]),
            st.sampled_from(["token", "mean", "sum", "max"]),
        ),
        st.builds(lambda low: Veto(low=low), st.sampled_from([1e-4, 0.5])),
        limits.map(lambda limit: BinaryKL(limit=limit)),
        limits.map(lambda limit: ProbabilityShift(limit=limit)),
        limits.map(lambda limit: OffPolicyNegative(limit=limit)),
        st.builds(
            lambda limit, over: SecondMomentAbove(limit=limit, over=over),
            limits, st.sampled_from(["pushed", "all"]),
        ),
        _ages.map(lambda limit: AgeAbove(limit=limit)),
    )


def levels() -> st.SearchStrategy[Level]:
    """The five levels."""
    return st.sampled_from(["token", "sequence", "geometric", "prefix", "segment"])


def corrections() -> st.SearchStrategy[Correction]:
    """Presets, and combinations of level, bound, up to two rules, and normalisation."""
    combined = st.builds(
        lambda level, bound, reject, normalize: Correction(
            level=level, bound=bound, reject=tuple(reject), normalize=normalize
        ),
        levels(), bounds(), st.lists(rules(), max_size=2), st.booleans(),
    )
    return st.sampled_from(list(PRESETS.values())).map(lambda preset: preset()) | combined


def objectives() -> st.SearchStrategy[Objective]:
    """Every objective of the library."""
    return st.sampled_from([
        *(make() for make in OBJECTIVES.values()), PPOClip(dual=3.0),
        PPOClip(low=1 - 3e-4, high=1 + 4e-4, level="geometric"),
        PPOClip(low=None, high=None, cap=2.0),
    ])


def aggregations() -> st.SearchStrategy[Aggregation]:
    """Every aggregation of the library."""
    return st.sampled_from(list(AGGREGATIONS.values())).map(
        lambda make: make(horizon=8) if make is SequenceMeanTokenSumNorm else make()
    )


@st.composite
def losses(draw: st.DrawFn) -> PolicyLoss:
    """Corrections with objectives, aggregations and either denominator."""
    return PolicyLoss(
        correction=draw(corrections()), objective=draw(objectives()),
        aggregation=draw(aggregations()),
        over=draw(st.sampled_from(["mask", "kept"])),
    )
