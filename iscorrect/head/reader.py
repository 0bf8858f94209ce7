"""One pass over the rows of the LM head, for log-probs, and one for their gradients.

Blocks of rows v give logits of a chunk of tokens c. A running maximum and sum make log-probs of
them; probabilities, from logits that were kept or are computed again, make gradients:

    log p_y = z_y − log Σ exp(z),  ∂ log p_y / ∂ z_j = [j = y] − p_j
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.head.block import Allowed, Entry, Moments, kernels_for
from iscorrect.head.inputs import Counted, Head
from iscorrect.head.products import add_product, leaves_float32, product
from iscorrect.head.state import (
    Gradients,
    Kept,
    Reading,
    Slopes,
    Sums,
    in_unit,
    power_of_two,
    split_exponent,
)
from iscorrect.head.threads import in_threads, threads_for
from iscorrect.ranks import max_over, sum_over

Blocks = list[tuple[int, slice]]

CPU_ROWS, GPU_ROWS = 2048, 16384
"""Rows of the head that are worked on at a time: on a CPU what comes of them stays in cache."""

GPU_TOKENS = 4096
"""Tokens at a time on a GPU: with fewer, the gradient of the weight is read and written so often
that it costs more than the logits."""

TILE = 64
"""Tokens and rows that a GPU's products work on come in multiples of it."""


def default_step(head: Head) -> int:
    """Tokens that go through the head at a time: on a CPU its width, and 1024 or more.

    Fewer, and reading the weight takes longer than multiplying by it.
    """
    return max(head.weight.shape[1], 1024) if head.weight.device.type == "cpu" else GPU_TOKENS


def rows_at_a_time(v: int, *, on_cpu: bool) -> int:
    """Rows of a block; on a GPU all blocks but the last are whole tiles, and about as long.

    >>> rows_at_a_time(151_936, on_cpu=False), rows_at_a_time(151_936, on_cpu=True)
    (15232, 2048)
    """
    if on_cpu:
        return min(CPU_ROWS, max(v, 1))
    blocks = max(1, -(-v // GPU_ROWS))
    return whole_tiles(max(1, -(-v // blocks)))


def whole_tiles(n: int) -> int:
    """The next multiple of a tile."""
    return -(-n // TILE) * TILE


def chunks(n: int, step: int) -> Iterator[slice]:
    """Of n tokens, at most so many at a time."""
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


class Reader:
    """The head over chunks of tokens and, for each, over blocks of rows of the vocabulary.

    On a CPU a block of logits is "v c" and small enough for the cache, and tokens whose coefficient
    is 0 are left out of the gradient. On a GPU it is "c v", so that a token's logits lie together
    for the kernel that sums them, and all tokens of a chunk take part: leaving some out would make
    the host wait for their number. So hidden states that are not finite are read as zeros there,
    and their log-probs are NaN.
    """

    def __init__(self, head: Head, tokens: Counted):
        self.head = head
        self.dtype = head.wide(tokens.hidden)
        device, self._weights = head.weight.device, head.weight.detach()
        if head.rounded_to is not None:
            self._weights = self._weights.to(head.rounded_to)
        narrow = tokens.hidden.dtype
        self._native = (
            self.dtype == torch.float32 and narrow == self._weights.dtype
            and leaves_float32(device, narrow)
        )
        self._operand = narrow if self._native else self.dtype
        self.on_cpu = device.type == "cpu"
        self._axis = 0 if self.on_cpu else 1
        self._rows = rows_at_a_time(len(head.weight), on_cpu=self.on_cpu)
        self._of_thread = threading.local()
        self._kernels = kernels_for(head, self.dtype)

    def room(self, n: int) -> Tensor:
        """Memory for the logits of n tokens."""
        return self._new(len(self.head.weight), n, self.dtype)

    def split(self, room: Tensor, n: int) -> list[Tensor]:
        """What the blocks of n tokens take of it, in their order."""
        return [self._of(room, rows, n) for rows in self._blocks()]

    def read(
        self, chunk: Counted, *, keep: list[Tensor] | None = None, spread: bool = False,
        mean: Tensor | None = None,
    ) -> Reading:
        """Log-probs of the targets, from a running maximum and sum over the blocks.

        Args:
            chunk: the tokens.
            keep: memory where the logits or exponentials of each block stay.
            spread: ask for the moments.
            mean: zeros "c d", where Σ p_j ∂z_j/∂h comes, over this rank's rows but the target's.
        """
        hidden, unknown = self._operands(chunk)
        allowed = Allowed.of(chunk.support, self.head)
        parts = in_threads(
            lambda blocks: self._read(chunk, hidden, allowed, blocks, keep, spread, mean),
            self._shares(),
        )
        sums = Sums.joined(parts)
        head, references = self.head, {i: x for part in parts for i, x in part.references.items()}
        largest, others, own = sums.largest, sums.others, sums.own
        top = max_over(largest, head.group)
        others = others * (largest - top).exp()
        if head.group is not None:
            others, own = sum_over(torch.stack([others, own]), head.group)
        highest = torch.maximum(top, own)
        others, own = others * (top - highest).exp(), own - highest
        if allowed is not None:
            own = own.masked_fill(allowed.nothing, -torch.inf)
            unknown = unknown | allowed.outside
        log_total = torch.log1p(others + torch.expm1(own))
        log_probs = (own - log_total).masked_fill(unknown, torch.nan)
        if mean is not None and sums.mean is not None:
            fade = (largest - highest - log_total).exp()
            torch.mul(sums.mean, rearrange(fade, "c -> c 1"), out=mean)
        kept = None
        if keep is not None:
            kept = Kept(keep, references if self._kernels.exponentials else None, hidden)
        moments = sums.moments
        return Reading(
            log_probs, highest, log_total,
            () if moments is None else moments.over(highest, log_total, head.group), kept,
        )

    def _read(
        self, chunk: Counted, hidden: Tensor, allowed: Allowed | None, blocks: Blocks,
        keep: list[Tensor] | None, spread: bool, mean: Tensor | None,
    ) -> Sums:
        """The running maximum and sum over some of the blocks."""
        head, lowest = self.head, torch.finfo(self.dtype).min
        largest = hidden.new_full((len(chunk),), lowest, dtype=self.dtype)
        others, own = torch.zeros_like(largest), torch.zeros_like(largest)
        sums = Sums(largest, others, own)
        sums.moments = Moments(largest, self._axis) if spread else None
        sums.mean = None if mean is None else torch.zeros_like(mean)
        rooms = keep
        if rooms is None:
            scratch = self._scratch(len(chunk))
            rooms = [self._first(scratch, rows, len(chunk)) for rows in self._blocks()]
        for i, rows in blocks:
            z = self._logits(hidden, rows, allowed, rooms[i])
            if sums.moments is not None:
                sums.moments.add(z)
            # The sum over the others has digits left where p of the target is all but 1.
            entry = Entry.of(chunk.target, rows, head, self._axis)
            sums.own = entry.replace(z, -torch.inf, sums.own)
            slope = None if mean is None or head.softcap is None else head.slope(z)
            before = sums.largest
            sums.largest, total = self._kernels.total(z, before, self._axis)
            fade = (before - sums.largest).exp()
            sums.others = sums.others * fade + total
            sums.references[i] = sums.largest
            if sums.mean is not None:
                sums.mean.mul_(rearrange(fade, "c -> c 1"))
                self._add_rows(z, sums.largest, slope, rows, sums.mean)
        return sums

    def differentiate(
        self, chunk: Counted, reading: Reading, coefficient: Tensor, into: Gradients
    ) -> None:
        """Add Σ_i c_i ∂ log p_i.

        Args:
            chunk: the tokens.
            reading: of them; what it kept is lost.
            coefficient: "c", the same to the last bit on all ranks that share the head.
            into: sums that grow; rows of ``hidden`` are set, for each token comes once.
        """
        # what the support excludes has no gradient; NaN is not hidden
        coefficient = torch.where(reading.log_probs == -torch.inf, 0, coefficient)
        kept, busy = reading.kept, self._busy(coefficient)
        if busy is not None:
            if not len(busy):
                return
            chunk, reading, coefficient = chunk[busy], reading[busy], coefficient[busy]
        if kept is None:
            hidden, _ = self._operands(chunk)
        else:
            hidden = kept.hidden if busy is None else kept.hidden[busy]
        scale, power = coefficient / self.head.temperature, None
        if self._operand == torch.float16:
            scale, power = split_exponent(scale)
        idle = None
        if not self.on_cpu:
            # a coefficient of 0 may stand for a log-prob that is not finite, and 0 · NaN is no 0
            idle = coefficient == 0
        states = hidden if into.weight is None or power is None else in_unit(hidden, power, into)
        slopes = Slopes(scale, power, idle, hidden, states)

        shares, places = self._shares(), chunk.places()
        sums: list[Tensor] = []
        together = isinstance(places, slice) and self.head.group is None
        if into.hidden is not None:
            # rows that lie together are summed where they belong
            rows = into.hidden[places] if together else scale.new_zeros(hidden.shape)
            sums = [rows, *(torch.zeros_like(rows) for _ in shares[1:])]

        def work(i: int) -> None:
            mine = sums[i] if sums else None
            self._differentiate(chunk, reading, slopes, shares[i], kept, busy, into, mine)

        in_threads(work, list(range(len(shares))))
        if sums:
            for other in sums[1:]:
                sums[0].add_(other)
            if power is not None:
                sums[0].mul_(rearrange(power_of_two(power), "c -> c 1"))
            if not together:
                self._place(sums[0], into, places)
        into.fresh = False

    def _differentiate(
        self, chunk: Counted, reading: Reading, slopes: Slopes, blocks: Blocks, kept: Kept | None,
        busy: Tensor | None, into: Gradients, sums: Tensor | None,
    ) -> None:
        """Add what some of the blocks give to weight and bias, and to ``sums`` for ``hidden``."""
        power = slopes.power
        scratch = self._scratch(len(chunk), self._operand)
        if kept is None:
            values = self._again(chunk, slopes.hidden, blocks, scratch)
        else:
            values = self._kept(kept, blocks, busy)
        for block, grad in self._derivatives(chunk, reading, slopes, blocks, values, scratch):
            if into.bias is not None:
                wide = grad if power is None else grad * rearrange(power_of_two(power), "c -> c 1")
                into.bias[block] += wide.sum(0, dtype=self.dtype)
            if sums is not None:
                add_product(grad, self._weight(block), sums)
            if into.weight is not None:
                write = product if into.fresh else add_product
                write(grad.T, slopes.states, into.weight[block])

    def _derivatives(
        self, chunk: Counted, reading: Reading, slopes: Slopes, blocks: Blocks,
        values: Iterator[tuple[Tensor, Tensor | None]], scratch: Tensor,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of scale · ∂ log p / ∂ z, "c v", in the dtype of the products.

        Args:
            chunk: the tokens.
            reading: of them.
            slopes: what multiplies them.
            blocks: which.
            values: their logits, or exp(z − reference) with the reference "c".
            scratch: where each block is written, after the other.
        """
        head, axis, scale, idle = self.head, self._axis, slopes.scale, slopes.idle
        # 1 − p of the target itself: expm1 keeps its digits where p is near 1
        own = -torch.expm1(reading.log_probs) * scale
        if head.softcap is not None:
            own *= head.slope(reading.log_probs + reading.log_total + reading.largest)
        if idle is not None:
            own = own.masked_fill(idle, 0)
        for (_, block), (z, subtracted) in zip(blocks, values, strict=True):
            grad = self._first(scratch, block, len(chunk))
            reference = reading.largest if subtracted is None else subtracted
            subtract = reference if subtracted is None else None
            if head.softcap is not None:
                self._steepen(z, reference, exponentials=subtract is None)
                subtract = None
            factor = (reference - reading.largest - reading.log_total).exp_().mul_(-scale)
            if idle is not None:
                factor = factor.masked_fill(idle, 0)
            grad = self._kernels.derivative(z, subtract, factor, axis, grad)
            Entry.of(chunk.target, block, head, axis).replace(grad, own, own)
            yield block, grad.T if axis == 0 else grad

    def _kept(
        self, kept: Kept, blocks: Blocks, busy: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        for i, _ in blocks:
            z = kept.values[i]
            reference = None if kept.references is None else kept.references[i]
            if busy is not None:
                z = z.index_select(1 - self._axis, busy)
                reference = None if reference is None else reference[busy]
            yield z, reference

    def _again(
        self, chunk: Counted, hidden: Tensor, blocks: Blocks, scratch: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        allowed = Allowed.of(chunk.support, self.head)
        room = scratch if scratch.dtype == self.dtype else self._scratch(len(chunk))
        for _, block in blocks:
            z = self._first(room, block, len(chunk))
            yield self._logits(hidden, block, allowed, z), None

    def score(self, tokens: Counted, step: int, *, spread: bool = False) -> Reading:
        """Read any number of tokens, so many at a time, without keeping anything."""
        readings = [self.read(tokens[part], spread=spread) for part in chunks(len(tokens), step)]
        if readings:
            return Reading.joined(readings)
        nothing = tokens.hidden.new_zeros(0, dtype=self.dtype)
        return Reading(nothing, nothing, nothing, (nothing, nothing) if spread else ())

    def differentiate_all(
        self, tokens: Counted, reading: Reading, coefficient: Tensor, into: Gradients, step: int
    ) -> None:
        """As :meth:`differentiate`, for any number of tokens; their logits are computed again."""
        busy = self._busy(coefficient)
        if busy is not None:
            tokens, reading, coefficient = tokens[busy], reading[busy], coefficient[busy]
        for part in chunks(len(tokens), step):
            self.differentiate(tokens[part], reading[part], coefficient[part], into)

    def busy(self, coefficient: Tensor) -> slice | Tensor:
        """Tokens that are to be differentiated: on a CPU all, since idle ones are left out there.

        On a GPU those whose coefficient is not 0, as many as fill whole tiles; the host waits for
        their number.
        """
        if self.on_cpu:
            return slice(None)
        idle = coefficient == 0
        count = len(idle) - int(torch.count_nonzero(idle))
        return idle.int().argsort(stable=True)[: -(-count // TILE) * TILE]

    def with_gradients(
        self, tokens: Counted, step: int, *, spread: bool = False
    ) -> tuple[Reading, Tensor]:
        """Read tokens, and ∂ log p / ∂ h "m d" of each, whatever a loss makes of log p.

            ∂ log p_y / ∂ h = (1 − p_y) W_y − Σ_{j ≠ y} p_j W_j

        With a frozen head this is all that a gradient takes. The mean of the rows is summed beside
        the running sum and fades with it, so each logit is computed once and none is kept.
        """
        head, readings = self.head, []
        into = Gradients.of(head, tokens, hidden=True, weight=False, bias=False)
        for part in chunks(len(tokens), step):
            chunk = tokens[part]
            mean = self._weights.new_zeros(len(chunk), self._weights.shape[1], dtype=self.dtype)
            reading = self.read(chunk, spread=spread, mean=mean)
            row = chunk.target - head.start
            held = (row >= 0) & (row < len(self._weights))
            own = -torch.expm1(reading.log_probs)
            if head.softcap is not None:
                own *= head.slope(reading.log_probs + reading.log_total + reading.largest)
            rows = self._weights[torch.where(held, row, 0)].to(self.dtype)
            own = rearrange(torch.where(held, own, 0), "c -> c 1")
            sums = rows.mul_(own).sub_(mean).div_(head.temperature)
            # what the support excludes has no gradient
            nothing = rearrange(reading.log_probs == -torch.inf, "c -> c 1")
            self._place(sums.masked_fill_(nothing, 0), into, chunk.places())
            readings.append(reading)
        gradients, _, _ = into.total()
        assert gradients is not None
        reading = Reading.joined(readings) if readings else self.score(tokens, step, spread=spread)
        return reading, gradients

    def _add_rows(
        self, z: Tensor, largest: Tensor, slope: Tensor | None, rows: slice, mean: Tensor
    ) -> None:
        """Add Σ exp(z − largest) ∂z/∂h of a block, from what its total left of it."""
        if slope is not None:
            z.mul_(slope)
        exponentials = self._kernels.exponentials
        if not exponentials or z.dtype != self._operand:
            reference = None if exponentials else largest
            out = self._first(self._scratch(len(mean), self._operand), rows, len(mean))
            z = self._kernels.derivative(z, reference, torch.ones_like(largest), self._axis, out)
        add_product(z.T if self._axis == 0 else z, self._weight(rows), mean)

    def _busy(self, coefficient: Tensor) -> Tensor | None:
        """The tokens that are worked on; None: all."""
        if not self.on_cpu:
            return None
        busy = coefficient.nonzero().squeeze(-1)
        return None if len(busy) == len(coefficient) else busy

    def _operands(self, chunk: Counted) -> tuple[Tensor, Tensor]:
        """Hidden states in the dtype of the products, and of which tokens log p is NaN anyway."""
        states, unknown = chunk.states(), chunk.outside(self.head.vocabulary)
        if not self.on_cpu:
            finite = torch.linalg.vector_norm(states, torch.inf, dim=-1).isfinite()
            unknown = unknown | ~finite
            states = torch.where(rearrange(finite, "c -> c 1"), states, 0)
        return states if self._native else states.to(self.dtype), unknown

    def _blocks(self) -> Iterator[slice]:
        """Rows of the vocabulary."""
        return chunks(len(self.head.weight), self._rows)

    def _shares(self) -> list[Blocks]:
        """The blocks of rows, numbered, in a share for each thread."""
        blocks = list(enumerate(self._blocks()))
        n = max(1, min(threads_for(self.head.weight.device), len(blocks)))
        return [blocks[k::n] for k in range(n)]

    def _scratch(self, n: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for a block of n tokens."""
        return self._new(self._rows, n, dtype or self.dtype)

    def _new(self, rows: int, n: int, dtype: torch.dtype) -> Tensor:
        """Memory for rows of n tokens: "v c" on a CPU; on a GPU flat, in whole tiles of rows."""
        shape = (rows, n) if self._axis == 0 else (whole_tiles(rows) * n,)
        return self.head.weight.new_empty(shape, dtype=dtype)

    def _of(self, room: Tensor, rows: slice, n: int) -> Tensor:
        """What some rows take of it, for n tokens; on a GPU blocks lie one after the other."""
        width = rows.stop - rows.start
        if self._axis == 0:
            return room[rows, :n]
        tiles = whole_tiles(width)
        return room[rows.start * n :][: tiles * n].view(n, tiles)[:, :width]

    def _first(self, room: Tensor, rows: slice, n: int) -> Tensor:
        """Its beginning, for as many rows."""
        return self._of(room, slice(0, rows.stop - rows.start), n)

    def _weight(self, rows: slice) -> Tensor:
        """Some rows of the weight, in the dtype of the products."""
        weight = self._weights[rows]
        if self._native or weight.dtype == self.dtype:
            return weight
        mine = self._of_thread
        if not hasattr(mine, "upcast"):
            mine.upcast = weight.new_empty(self._rows, weight.shape[1], dtype=self.dtype)
        upcast: Tensor = mine.upcast[: len(weight)]
        return upcast.copy_(weight)

    def _logits(
        self, hidden: Tensor, rows: slice, allowed: Allowed | None, z: Tensor
    ) -> Tensor:
        """Logits of some rows of the head, written to ``z``."""
        head = self.head
        weight = self._weight(rows)
        if self._axis == 0:
            product(weight, hidden.T, z)
        else:
            product(hidden, weight.T, z)
        if head.bias is not None:
            z += head.bias.detach()[rows].unsqueeze(1 - self._axis)
        if head.head_dtype.itemsize < 4:
            z.copy_(z.to(head.head_dtype))
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        if head.temperature != 1:
            z.div_(head.temperature)
        if allowed is not None:
            allowed.restrict(z, rows, self._axis)
        return z

    def _steepen(self, z: Tensor, reference: Tensor, *, exponentials: bool) -> None:
        """Make logits or exponentials into exp(z − reference) times the slope of the soft cap."""
        reference = reference.unsqueeze(self._axis)
        slope = self.head.slope(z.log().add_(reference) if exponentials else z)
        if not exponentials:
            z.sub_(reference).exp_()
        z.mul_(slope)

    def _place(
        self, sums: Tensor, into: Gradients, places: slice | Tensor
    ) -> None:
        """Put rows of the gradient of the hidden states where they belong."""
        group, hidden = self.head.group, into.hidden
        assert hidden is not None

        def put() -> None:
            hidden[places] = sums

        if group is None:
            put()
        else:
            into.reduce(sums, group, put)
