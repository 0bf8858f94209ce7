"""Log-probs of a batch and the gradients of its loss, the logits computed once.

A chunk's exponentials wait until the loss has said what its derivative is. What looks farther than
a chunk is left to two passes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.head.inputs import Head, Tokens
from iscorrect.head.reader import Gradients, Reader, Reading, default_step
from iscorrect.layout import Layout
from iscorrect.loss.aggregate import Normalizer, aggregate
from iscorrect.loss.correction import Correction
from iscorrect.loss.evidence import Scope, scope_of, widest
from iscorrect.loss.objectives import Reinforce
from iscorrect.loss.policy_loss import PolicyLoss
from iscorrect.loss.presets import uncorrected
from iscorrect.ranks import Group, first_over


class Batch(NamedTuple):
    """What a loss knows of each token beside its log-prob."""

    rollout_log_probs: Tensor
    advantages: Tensor
    layout: Layout
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    normalizer: Normalizer | None


@torch.no_grad()
def in_one_pass(
    loss_fn: PolicyLoss, batch: Batch, head: Head, tokens: Tokens, *, chunk_size: int | None,
    sequence_scratch: bool, wanted: list[bool],
) -> tuple[Tensor, list[Tensor | None]] | None:
    """Log-probs "b t" and the gradients of hidden, weight, bias and extra; None if it takes two."""
    known = batch.old_log_probs is not None
    scope = _scope(loss_fn, known=known)
    shared = batch.layout.sequence_group is not None and scope == "sequence"
    if scope == "batch" or shared:  # other ranks hold tokens of these sequences
        return None
    tokens, busy = _idle_last(loss_fn, batch, tokens, scope, head.group)
    into = Gradients.of(head, tokens, hidden=wanted[0], weight=wanted[1], bias=wanted[2])
    reader, size = Reader(head, tokens), chunk_size
    if size is None:
        size = default_chunk_size(busy, tokens.index.device, weight=wanted[1])
    room = _Room(reader, into, size)
    if scope == "sequence":
        by_factor = sequence_scratch and loss_fn.reference_kl is None
        parts = _whole_sequences(batch.layout, tokens[:busy], room, by_factor=by_factor)
        if not by_factor and any(len(tokens[part]) > room.at(i) for i, part in enumerate(parts)):
            return None
    else:
        parts = room.parts(busy)
    held = parts[-1].stop if parts else 0
    scale = _scale(loss_fn, batch, head.wide(tokens.hidden))
    derivative = _Derivative.of(loss_fn, batch, tokens.index, scope, scale, head.group)
    log_probs = scale.new_zeros(scale.numel())
    scratch = None
    with torch.autocast(tokens.hidden.device.type, enabled=False):
        for i, part in enumerate(parts):
            chunk = tokens[part]
            if len(chunk) <= room.at(i):
                reading = reader.read(chunk, keep=room.take(len(chunk)))
                coefficient = derivative[part](reading.log_probs)
                reader.differentiate(chunk, reading, coefficient, into)
            else:
                scratch = scratch or room.another()
                reading = _long_sequence(reader, chunk, derivative[part], room, scratch)
            log_probs[chunk.index] = reading.log_probs
        if held < len(tokens):
            rest = slice(held, len(tokens))
            reading = reader.score(tokens[rest], room.step)
            log_probs[tokens[rest].index] = reading.log_probs
            coefficient = derivative[rest](reading.log_probs)
            reader.differentiate_all(tokens[rest], reading, coefficient, into, room.step)
    if known and loss_fn.correction.scope != "token" and not bool(log_probs.isfinite().all()):
        # A token that is not finite takes its sequence with it, which was not known beforehand.
        return None
    return log_probs.view(scale.shape), [*into.total(), scale if wanted[3] else None]


def _idle_last(
    loss_fn: PolicyLoss, batch: Batch, tokens: Tokens, scope: Scope, group: Group
) -> tuple[Tokens, int]:
    """Tokens, or sequences, without any advantage come last; how many tokens are not among them.

    They rarely have a derivative, so that their logits need not be kept.
    """
    if loss_fn.reference_kl is not None:
        return tokens, len(tokens)
    advantage = batch.advantages.abs()
    if scope == "sequence":
        advantage = batch.layout.sequence_max(advantage)
    idle = first_over(advantage.flatten()[tokens.index] == 0, group)
    count = int(idle.sum())
    if not count:
        return tokens, len(tokens)
    return tokens[idle.int().argsort(stable=True)], len(tokens) - count


def _scope(loss_fn: PolicyLoss, *, known: bool) -> Scope:
    """How far a token's loss looks at log-probs of the policy being trained."""
    if callable(loss_fn.aggregation) or loss_fn.over == "kept":
        return "batch"
    # With old log-probs, weights do not depend on the policy being trained.
    return widest(scope_of(loss_fn.objective), "token" if known else loss_fn.correction.scope)


def default_chunk_size(tokens: int, device: torch.device, *, weight: bool) -> int:
    """Tokens whose exponentials a buffer holds: one in 40, so that memory stays in the background.

    At least 80 on a CPU and 1024 on a GPU, at most 4096. No buffer where computing logits twice is
    faster than reading and writing the gradient of the weight for fewer than 192 tokens at a time.

    >>> default_chunk_size(16384, torch.device("cpu"), weight=True)
    409
    """
    size = min(max(tokens // 40, 80 if device.type == "cpu" else 1024), 4096)
    return 0 if weight and size < 192 else size


class _Room:
    """Where the exponentials "v c" of a chunk wait until its derivative is known.

    For the first chunk that is where the gradient of the weight is going to be: each block of rows
    is written when its exponentials have been read for the last time. For the others it is a buffer
    of ``size`` tokens, or there are no others if that is 0.
    """

    def __init__(self, reader: Reader, into: Gradients, size: int):
        self.reader, self.into, self.size = reader, into, size
        self.step = default_step(reader.head)
        self._buffer: Tensor | None = None

    def another(self) -> _Room:
        """The room that another gradient of the weight has."""
        return _Room(self.reader, self.into.another(), self.size)

    def at(self, i: int) -> int:
        """Tokens of which the i-th chunk may be."""
        gradient = self.into.weight
        return self.size if i or gradient is None else max(self.size, gradient.shape[1])

    def parts(self, n: int) -> list[slice]:
        """Chunks, of n tokens or as many of them as there is room for."""
        parts: list[slice] = []
        start = 0
        while start < n and self.at(len(parts)):
            parts.append(slice(start, min(start + self.at(len(parts)), n)))
            start = parts[-1].stop
        return parts

    def take(self, n: int) -> Tensor:
        """Room for n tokens."""
        gradient = self.into.weight
        if gradient is not None and self.into.fresh and n <= gradient.shape[1]:
            return gradient[:, :n]
        if self._buffer is None:
            weight = self.reader.head.weight
            self._buffer = weight.new_empty(len(weight), self.size, dtype=self.reader.dtype)
        return self._buffer[:, :n]


def _whole_sequences(
    layout: Layout, tokens: Tokens, room: _Room, *, by_factor: bool
) -> list[slice]:
    """Chunks of as many sequences as there is room for; a longer one by itself."""
    first = layout.sequence_starts().flatten()[tokens.index].nonzero().squeeze(-1).tolist()
    parts: list[slice] = []
    for start, stop in pairwise([*first, len(tokens)]):
        if parts and stop - parts[-1].start <= room.at(len(parts) - 1):
            parts[-1] = slice(parts[-1].start, stop)
        elif room.size or by_factor or (not parts and stop <= room.at(0)):
            parts.append(slice(start, stop))
        else:
            break
    return parts


def _scale(loss_fn: PolicyLoss, batch: Batch, dtype: torch.dtype) -> Tensor:
    """∂ loss / ∂ per-token loss "b t": aggregations are linear, and know the mask beforehand."""
    assert not callable(loss_fn.aggregation)
    with torch.enable_grad():
        x = torch.zeros_like(batch.layout.mask, dtype=dtype).requires_grad_()
        total = aggregate(
            x, batch.layout, loss_fn.aggregation, normalizer=batch.normalizer,
            horizon=loss_fn.horizon,
        )
    return torch.autograd.grad(total, x)[0]


@dataclass(frozen=True, eq=False)
class _Derivative:
    """∂ loss / ∂ log p of some tokens "n", by automatic differentiation of the loss itself.

    Attributes:
        loss_fn: with ``weights`` for a correction where they are known.
        scale: "n", ∂ loss / ∂ per-token loss.
        weights: "n", or None where they depend on the log-probs.
        sequences: int "n", or None where no part asks.
        segments: the same.
        group: the ranks that share the head, and have to agree to the last bit.
    """

    loss_fn: PolicyLoss
    scale: Tensor
    rollout: Tensor
    advantages: Tensor
    old: Tensor | None
    ref: Tensor | None
    weights: Tensor | None
    sequences: Tensor | None
    segments: Tensor | None
    group: Group

    @classmethod
    def of(
        cls, loss_fn: PolicyLoss, batch: Batch, index: Tensor, scope: Scope, scale: Tensor,
        group: Group,
    ) -> _Derivative:
        def pick(x: Tensor) -> Tensor:
            return x.reshape(-1)[index]

        layout, old, ref = batch.layout, batch.old_log_probs, batch.ref_log_probs
        whole = scope == "sequence"
        weights = None
        if old is not None:
            weights = loss_fn.correction(
                old_log_probs=old, rollout_log_probs=batch.rollout_log_probs, mask=layout,
                advantages=batch.advantages,
            ).weights
        return cls(
            loss_fn, pick(scale), pick(batch.rollout_log_probs), pick(batch.advantages),
            None if old is None else pick(old), None if ref is None else pick(ref),
            None if weights is None else pick(weights),
            pick(layout.sequence_starts()).cumsum(0) if whole else None,
            pick(layout.segment_starts()).cumsum(0) if whole else None,
            group,
        )

    def __getitem__(self, part: slice) -> _Derivative:
        tensors: dict[str, Any] = {
            field.name: value[part] for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)

    def __call__(self, log_probs: Tensor) -> Tensor:
        """"n", what the loss says."""
        # positions of a part are not the batch's; the whole batch is looked at afterwards
        correction = replace(self.loss_fn.correction, nonfinite="drop")
        if self.loss_fn.correction.nonfinite == "neutral":
            correction = self.loss_fn.correction
        return self._differentiate(log_probs, replace(self.loss_fn, correction=correction))

    def without_factor(self, log_probs: Tensor) -> Tensor:
        """"n", what it would be but for what depends on whole sequences."""
        objective = self.loss_fn.objective
        if scope_of(objective) != "token":
            objective = Reinforce()
        loss_fn = replace(self.loss_fn, correction=uncorrected(), objective=objective)
        return self._differentiate(log_probs, loss_fn)

    def _differentiate(self, log_probs: Tensor, loss_fn: PolicyLoss) -> Tensor:
        def row(x: Tensor) -> Tensor:
            return rearrange(x, "n -> 1 n")

        mask = row(torch.ones_like(log_probs, dtype=torch.bool))
        layout = Layout(mask)
        if self.sequences is not None and self.segments is not None:
            layout = Layout(
                mask, sequence_ids=row(self.sequences), segment_ids=row(self.segments)
            )
        scale, rollout = row(self.scale), self.rollout
        if self.weights is not None and self.old is not None:
            weights = row(self.weights)
            loss_fn = replace(loss_fn, correction=Correction(bound=lambda ratio, _: weights))
            # a ratio of 1, so that nothing but the log-probs at hand can spoil it
            rollout = self.old
        loss_fn = replace(
            loss_fn, aggregation=lambda per_token, _: (scale * per_token).sum(), horizon=None
        )
        leaf = log_probs.detach().requires_grad_()
        with torch.enable_grad():
            loss, _ = loss_fn(
                row(leaf), rollout_log_probs=row(rollout), advantages=row(self.advantages),
                mask=layout, old_log_probs=None if self.old is None else row(self.old),
                ref_log_probs=None if self.ref is None else row(self.ref),
            )
        return first_over(torch.autograd.grad(loss, leaf)[0], self.group)


def _long_sequence(
    reader: Reader, tokens: Tokens, derivative: _Derivative, room: _Room, scratch: _Room
) -> Reading:
    """A sequence longer than a chunk.

    Its gradient is gathered without the sequence's factor, and multiplied by it once that is known.
    Where it turns out that there is no such factor, it is gathered again.
    """
    into = scratch.into
    into.clear()
    readings, guesses, parts = [], [], scratch.parts(len(tokens))
    for part in parts:
        chunk = tokens[part]
        reading = reader.read(chunk, keep=scratch.take(len(chunk)))
        guesses.append(derivative[part].without_factor(reading.log_probs))
        reader.differentiate(chunk, reading, guesses[-1], into)
        readings.append(replace(reading, kept=None))
    rest = slice(parts[-1].stop, len(tokens))
    readings.append(reader.score(tokens[rest], scratch.step))
    guesses.append(derivative[rest].without_factor(readings[-1].log_probs))
    reader.differentiate_all(tokens[rest], readings[-1], guesses[-1], into, scratch.step)
    reading, guess = Reading.joined(readings), torch.cat(guesses)
    truth = derivative(reading.log_probs)
    factor = _factor(truth, guess)
    _, rows = tokens.here()
    hidden = room.into.hidden
    if factor is None:
        if hidden is not None:
            hidden[rows] = 0
        reader.differentiate_all(tokens, reading, truth, room.into, room.step)
    else:
        if hidden is not None:
            hidden[rows] *= factor
        room.into.add(into, factor)
    return reading


def _factor(truth: Tensor, guess: Tensor) -> Tensor | None:
    """The number that turns the guess into the truth, if there is one."""
    square = torch.dot(guess, guess)
    factor = torch.dot(truth, guess) / torch.where(square > 0, square, 1)
    tolerance = 16 * torch.finfo(truth.dtype).eps * truth.abs().amax()
    return factor if bool(((truth - factor * guess).abs() <= tolerance).all()) else None
