"""One pass over the rows of the LM head, for log-probs, and one for their gradients.

Blocks of rows give logits "v c" of a chunk of tokens. A running maximum and sum make log-probs of
them; probabilities, from logits that were kept or are computed again, make gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.head.inputs import Head, Tokens
from iscorrect.head.support import Support
from iscorrect.ranks import Group, max_over, sum_over

CPU_ROWS, GPU_ROWS = 2048, 16384
"""Rows of the head that are worked on at a time: on a CPU what comes of them stays in cache."""

WIDE_OUTPUT = hasattr(torch.ops.aten.mm, "dtype")
"""Whether products of 16-bit matrices can leave the accumulator in float32 (torch 2.8, CUDA)."""


def default_step(head: Head) -> int:
    """Tokens that go through the head at a time: as many as it is wide, and 1024 or more.

    Fewer, and reading the weight takes longer than multiplying by it.
    """
    return max(head.weight.shape[1], 1024)


def chunks(n: int, step: int) -> Iterator[slice]:
    """Of n tokens, at most so many at a time."""
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


@dataclass(eq=False)
class Gradients:
    """Sums of what the chunks give, in float32 or wider; None where nothing asks for them.

    Attributes:
        hidden: "m d".
        weight: "v d", without any meaning as long as it is ``fresh``.
        bias: "v".
        fresh: nothing has been added to ``weight``.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    fresh: bool = True

    @classmethod
    def of(cls, head: Head, tokens: Tokens, *, hidden: bool, weight: bool, bias: bool) -> Gradients:
        """Sums of nothing yet."""
        dtype, device = head.wide(tokens.hidden), tokens.hidden.device
        return cls(
            torch.zeros(tokens.hidden.shape, dtype=dtype, device=device) if hidden else None,
            # contiguous, whatever the strides of the parameter
            torch.empty(head.weight.shape, dtype=dtype, device=device) if weight else None,
            torch.zeros(len(head.weight), dtype=dtype, device=device) if bias else None,
        )

    def total(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden, weight and bias, once all chunks are through."""
        if self.fresh and self.weight is not None:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias


@dataclass(frozen=True, eq=False)
class Reading:
    """What is known of some tokens "c" once all logits have been seen.

    Attributes:
        log_probs: of the targets, z_y − largest − log_total.
        largest: logit.
        log_total: log Σ exp(z − largest).
        moments: entropy and variance of the surprisal, or nothing.
        kept: what saves computing the logits again, or None.
    """

    log_probs: Tensor
    largest: Tensor
    log_total: Tensor
    moments: tuple[Tensor, ...] = ()
    kept: Kept | None = None

    def __getitem__(self, part: slice | Tensor) -> Reading:
        return Reading(self.log_probs[part], self.largest[part], self.log_total[part])

    @classmethod
    def joined(cls, readings: list[Reading]) -> Reading:
        log_probs, largest, log_total, moments = zip(
            *[(x.log_probs, x.largest, x.log_total, x.moments) for x in readings], strict=True
        )
        return cls(
            torch.cat(log_probs), torch.cat(largest), torch.cat(log_total),
            tuple(torch.cat(x) for x in zip(*moments, strict=True)),
        )


class Kept(NamedTuple):
    """exp(z − reference) "v c" but for the targets, with a reference "c" for each block of rows."""

    exponentials: Tensor
    references: list[Tensor]
    hidden: Tensor


class Reader:
    """The head over chunks of tokens and, for each, over blocks of rows of the vocabulary."""

    def __init__(self, head: Head, tokens: Tokens):
        self.head = head
        self.dtype = head.wide(tokens.hidden)
        self._native = (
            WIDE_OUTPUT and head.weight.device.type == "cuda" and self.dtype == torch.float32
            and head.weight.dtype == tokens.hidden.dtype in (torch.bfloat16, torch.float16)
        )
        # bfloat16 has the range for any coefficient; float16 has not
        narrow = self._native and head.weight.dtype == torch.bfloat16
        self._operand = torch.bfloat16 if narrow else self.dtype
        rows = CPU_ROWS if head.weight.device.type == "cpu" else GPU_ROWS
        self._rows = max(1, min(rows, len(head.weight)))
        self._upcast: Tensor | None = None

    def read(self, chunk: Tokens, *, keep: Tensor | None = None, spread: bool = False) -> Reading:
        """Log-probs of the targets, from a running maximum and sum over the blocks.

        Args:
            chunk: the tokens.
            keep: "v c", where the exponentials stay.
            spread: ask for the moments.
        """
        head, hidden = self.head, self._operands(chunk)
        largest = hidden.new_full((len(chunk),), torch.finfo(self.dtype).min, dtype=self.dtype)
        others, own = torch.zeros_like(largest), torch.zeros_like(largest)
        moments = _Moments(own) if spread else None
        allowed = _Allowed.of(chunk.support, head)
        room = self._scratch(len(chunk)) if keep is None else keep
        references = []
        for rows in self._blocks():
            z = self._logits(hidden, rows, allowed, room if keep is None else room[rows])
            target = _Entry.of(chunk.target, rows, head)
            own = target.read(z, own)
            before, largest = largest, torch.maximum(largest, z.amax(0))
            z.sub_(largest)
            if moments is not None:
                moments.add(z, before - largest)
            # The sum less 1, taken without the target, has digits left where p is all but 1.
            target.write(z.exp_(), torch.zeros_like(own))
            others = others * (before - largest).exp() + z.sum(0)
            references.append(largest)
        top = max_over(largest, head.group)
        others = others * (largest - top).exp()
        if head.group is not None:
            others, own = sum_over(torch.stack([others, own]), head.group)
        own = own - top
        if allowed is not None:
            own = own.masked_fill(allowed.nothing, -torch.inf)
        log_total = torch.log1p(others + torch.expm1(own))
        return Reading(
            own - log_total, top, log_total,
            () if moments is None else moments.over(largest - top, log_total, head.group),
            None if keep is None else Kept(keep, references, hidden),
        )

    def differentiate(
        self, chunk: Tokens, reading: Reading, coefficient: Tensor, into: Gradients
    ) -> None:
        """Add Σ_i c_i ∂ log p_i; what has c_i = 0 costs nothing.

        Args:
            chunk: the tokens.
            reading: of them; what it kept is lost.
            coefficient: "c", the same to the last bit on all ranks that share the head.
            into: sums that grow; rows of ``hidden`` are set, for each token comes once.
        """
        # what the support excludes has no gradient; NaN is not hidden
        rows = (coefficient * (reading.log_probs != -torch.inf)).nonzero().squeeze(-1)
        if not len(rows):
            return
        head, kept, every = self.head, reading.kept, len(rows) == len(chunk)
        chunk = chunk if every else chunk[rows]
        if kept is None:
            hidden = self._operands(chunk)
        else:
            hidden = kept.hidden if every else kept.hidden[rows]
        allowed = _Allowed.of(chunk.support, head) if kept is None else None
        reading = reading[rows]
        scale = coefficient[rows] / head.temperature
        # 1 − p of the target itself: expm1 keeps its digits where p is near 1
        own = -torch.expm1(reading.log_probs) * scale
        if head.softcap is not None:
            own *= head.slope(reading.log_probs + reading.log_total + reading.largest)
        here, places = chunk.here()
        sums = None
        if into.hidden is not None:
            whole = isinstance(places, slice)
            sums = into.hidden[places] if whole else own.new_zeros(len(rows), hidden.shape[1])
        scratch = self._scratch(len(rows))
        for i, block in enumerate(self._blocks()):
            grad = scratch[: block.stop - block.start]
            if kept is None:
                reference = reading.largest
                exponentials = self._logits(hidden, block, allowed, grad).sub_(reference).exp_()
            else:
                reference, exponentials = kept.references[i], kept.exponentials[block]
                if not every:
                    reference, exponentials = reference[rows], exponentials.index_select(1, rows)
            slope = None
            if head.softcap is not None:
                slope = head.slope(exponentials.log().add_(reference))
            factor = (reference - reading.largest - reading.log_total).exp_().mul_(-scale)
            torch.mul(exponentials, factor, out=grad)
            if slope is not None:
                grad *= slope
            _Entry.of(chunk.target, block, head).write(grad, own)
            if into.bias is not None:
                into.bias[block] += grad.sum(1)
            operand = grad.to(self._operand)
            if sums is not None:
                _accumulate(operand.T, self._weight(block), sums)
            if into.weight is not None:
                (_product if into.fresh else _accumulate)(operand, hidden, into.weight[block])
        if into.hidden is not None and sums is not None:
            into.hidden[places] = sum_over(sums, head.group)[here]
        into.fresh = False

    def score(self, tokens: Tokens, step: int, *, spread: bool = False) -> Reading:
        """Read any number of tokens, so many at a time, without keeping anything."""
        readings = [self.read(tokens[part], spread=spread) for part in chunks(len(tokens), step)]
        if readings:
            return Reading.joined(readings)
        nothing = tokens.hidden.new_zeros(0, dtype=self.dtype)
        return Reading(nothing, nothing, nothing, (nothing, nothing) if spread else ())

    def differentiate_all(
        self, tokens: Tokens, reading: Reading, coefficient: Tensor, into: Gradients, step: int
    ) -> None:
        """The same for any number of tokens, whose logits are computed again."""
        rows = coefficient.nonzero().squeeze(-1)
        if len(rows) < len(tokens):
            tokens, reading, coefficient = tokens[rows], reading[rows], coefficient[rows]
        for part in chunks(len(tokens), step):
            self.differentiate(tokens[part], reading[part], coefficient[part], into)

    def _operands(self, chunk: Tokens) -> Tensor:
        hidden = chunk.states()
        return hidden if self._native else hidden.to(self.dtype)

    def _blocks(self) -> Iterator[slice]:
        every = len(self.head.weight)
        for start in range(0, every, self._rows):
            yield slice(start, min(start + self._rows, every))

    def _scratch(self, n: int) -> Tensor:
        return self.head.weight.new_empty(self._rows, n, dtype=self.dtype)

    def _weight(self, rows: slice) -> Tensor:
        """Some rows of the weight, in the dtype of the products."""
        weight = self.head.weight.detach()[rows]
        if self._native or weight.dtype == self.dtype:
            return weight
        if self._upcast is None:
            self._upcast = self._scratch(weight.shape[1])
        return self._upcast[: len(weight)].copy_(weight)

    def _logits(
        self, hidden: Tensor, rows: slice, allowed: _Allowed | None, room: Tensor
    ) -> Tensor:
        """"v c", of some rows of the head, at the start of ``room``."""
        head, z = self.head, room[: rows.stop - rows.start]
        _product(self._weight(rows), hidden.T, z)
        if head.bias is not None:
            z += rearrange(head.bias.detach()[rows], "v -> v 1")
        if head.head_dtype.itemsize < 4:
            z.copy_(z.to(head.head_dtype))
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        if head.temperature != 1:
            z.div_(head.temperature)
        if allowed is not None:
            allowed.restrict(z, rows)
        return z


class _Entry(NamedTuple):
    """One entry of each column of "v c": its target's, where that is in these rows."""

    row: Tensor
    held: Tensor

    @classmethod
    def of(cls, target: Tensor, rows: slice, head: Head) -> _Entry:
        row = target - (head.start + rows.start)
        last = rows.stop - rows.start - 1
        return cls(rearrange(row.clamp(0, last), "c -> 1 c"), (row >= 0) & (row <= last))

    def read(self, z: Tensor, otherwise: Tensor) -> Tensor:
        return torch.where(self.held, z.gather(0, self.row)[0], otherwise)

    def write(self, z: Tensor, value: Tensor) -> None:
        z.scatter_(0, self.row, torch.where(self.held, value, z.gather(0, self.row)))


class _Allowed(NamedTuple):
    """What the support allows: which token, which row of the head; and tokens without a support."""

    token: Tensor
    row: Tensor
    nothing: Tensor

    @classmethod
    def of(cls, support: Support | None, head: Head) -> _Allowed | None:
        if support is None:
            return None
        counts = support.offsets.diff()
        token = torch.arange(len(counts), device=counts.device)
        token = token.repeat_interleave(counts, output_size=len(support.ids))
        return cls(token, support.ids - head.start, counts == 0)

    def restrict(self, z: Tensor, rows: slice) -> None:
        """Other logits become −inf; those of tokens without a support stay."""
        row = self.row - rows.start
        # one row more, for those of other blocks
        allowed = torch.zeros(len(z) + 1, z.shape[1], dtype=torch.bool, device=z.device)
        allowed[torch.where((row >= 0) & (row < len(z)), row, len(z)), self.token] = True
        z.masked_fill_(~(allowed[:-1] | self.nothing), -torch.inf)


class _Moments:
    """Of u, the logits less their running maximum, under weights e^u; merged block by block.

    weight = Σ e^u,  first = Σ e^u u,  second = Σ e^u (u − first/weight)²
    """

    def __init__(self, zero: Tensor):
        self.weight = self.first = self.second = zero

    def add(self, u: Tensor, shift: Tensor) -> None:
        """A block "v c" of u, by ``shift`` lower than those before."""
        self.lower(shift)
        # what has probability 0 adds nothing
        u = u.clamp(min=-(torch.finfo(u.dtype).max ** 0.25))
        e = u.exp()
        weight, first = e.sum(0), (e * u).sum(0)
        mean = first / _positive(weight)
        apart = mean - self.first / _positive(self.weight)
        both = self.weight * weight / _positive(self.weight + weight)
        self.second = self.second + (e * (u - mean).square_()).sum(0) + apart.square() * both
        self.weight, self.first = self.weight + weight, self.first + first

    def lower(self, shift: Tensor) -> None:
        fade = shift.exp()
        self.first = fade * (self.first + self.weight * shift)
        self.weight, self.second = fade * self.weight, fade * self.second

    def over(self, shift: Tensor, log_total: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """Entropy and variance of the surprisal, of the rows on all ranks."""
        self.lower(shift)
        mean = sum_over(self.first, group) / log_total.exp()
        apart = self.first / _positive(self.weight) - mean
        second = sum_over(self.second + self.weight * apart.square(), group)
        return log_total - mean, second / log_total.exp()


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out.dtype, out=out)


def _accumulate(a: Tensor, b: Tensor, total: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b.to(total.dtype))
    else:
        total += torch.mm(a, b, total.dtype)
