"""Which tokens count, and which sequence and which turn each of them belongs to.

The one object that knows about shape. Padded rows, packed rows, and one flat packed row give the
same values; what follows a reduction is elementwise, since a reduction over sequences returns its
value on every token of the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from iscorrect.errors import check_flag, check_mask, describe, input_error, is_integer, is_number
from iscorrect.ranks import Group, accumulator, check_member, max_over, sum_over

Reduction = Literal["sum", "amax"]
BITS = {
    torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class Layout:
    """The counted tokens of a batch and the sequences and segments they form.

    Args:
        mask: bool "b t", True where a token counts. Other positions may hold NaN or ±inf in every
            tensor that goes with the layout.
        sequence_ids: int "b t"; each run of equal ids inside a row is one sequence. None: each row
            is one sequence.
        segment_ids: int "b t"; each run of equal ids inside a sequence is one segment, such as a
            turn. None: each sequence is one segment.
        sequence_group: the ranks that hold the other tokens of these sequences (context
            parallelism). Rows then stand for the same sequences on all of them; with
            ``sequence_ids``, equal ids do, and number the sequences from 0 to num_ids − 1.
        num_ids: how many ids there are, with ``sequence_group`` and ``sequence_ids``.
        zigzag: whether each rank holds the r-th and the r-th last of 2R chunks of a sequence, one
            after the other, rather than the r-th of R. Only prefixes depend on it. Chunks are
            halves of what a rank holds of a sequence, masked tokens too: padding lies in both
            alike, or has an id of its own.
        batch_group: the ranks that together hold the batch, for what depends on all of it:
            normalisation, caps from the data, Pareto smoothing.
        age: int "b t", the trainer's version less the version of the policy that sampled the token,
            0 for a fresh one; None: not known. A negative age counts as 0. Other positions may hold
            anything.

    Raises:
        InputError: the mask is not bool; ids or ages have another shape or are not integers; ranks
            disagree on the number of sequences, or their number is missing.

    >>> layout = Layout(torch.tensor([[True, True, False], [True, True, True]]))
    >>> layout.sequence_total(torch.ones(2, 3))
    tensor([[2., 2., 2.],
            [3., 3., 3.]])
    """

    __slots__ = (
        "_segments", "_sequences", "age", "batch_group", "mask", "sequence_group", "zigzag",
    )

    def __init__(
        self,
        mask: Tensor,
        *,
        sequence_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        sequence_group: Group = None,
        num_ids: int | None = None,
        zigzag: bool = False,
        batch_group: Group = None,
        age: Tensor | None = None,
    ) -> None:
        check_mask("Layout", mask)
        per_token = {"sequence_ids": sequence_ids, "segment_ids": segment_ids, "age": age}
        for name, ids in per_token.items():
            _check_ids(name, ids, mask)
        check_flag("Layout", "zigzag", zigzag)
        check_member("Layout", "sequence_group", sequence_group)
        check_member("Layout", "batch_group", batch_group)
        if sequence_group is not None and dist.get_world_size(sequence_group) == 1:
            sequence_group = None  # which cuts nothing
        mask = _saved(mask)
        self.mask, self.age = mask, age
        self.sequence_group, self.zigzag, self.batch_group = sequence_group, zigzag, batch_group
        if sequence_group is not None:
            self._sequences = _shared(mask, sequence_ids, segment_ids, num_ids)
            _check_alike(self._sequences, sequence_group, mask.device)
        elif sequence_ids is not None:
            self._sequences = _Parts(_number_runs(sequence_ids), mask.numel())
        else:
            self._sequences = _Parts(None, mask.shape[0])
        self._segments = self._sequences
        if segment_ids is not None:
            runs = _number_runs(segment_ids, self._sequences.ids)
            self._segments = _Parts(runs, mask.numel())

    @classmethod
    def from_cu_seqlens(
        cls,
        mask: Tensor,
        cu_seqlens: Tensor,
        *,
        segment_ids: Tensor | None = None,
        age: Tensor | None = None,
        batch_group: Group = None,
    ) -> Layout:
        """The layout of one packed row, given flash-attention's cumulative lengths.

        Args:
            mask: bool "n" or "1 n".
            cu_seqlens: int "s+1", rising from 0; sequence i holds tokens cu_seqlens[i] up to, not
                including, cu_seqlens[i+1]. Tokens beyond the last entry are padding, and not
                counted.
            segment_ids: int, shaped like mask.
            age: likewise.
            batch_group: as in the constructor.

        Raises:
            InputError: the mask has more than one row; the lengths do not rise from 0, go beyond
                the tokens, or leave out tokens that count (seen on a CPU only, where looking costs
                nothing).

        >>> mask = torch.ones(5, dtype=torch.bool)
        >>> layout = Layout.from_cu_seqlens(mask, torch.tensor([0, 2, 5]))
        >>> layout.sequence_total(torch.ones(5))
        tensor([2., 2., 3., 3., 3.])
        """
        check_mask("Layout.from_cu_seqlens", mask)
        if mask.numel() != mask.shape[-1]:
            raise input_error(
                "Layout.from_cu_seqlens", "mask", expected="one packed row, `n` or `1 n`",
                got=describe(mask), fix="flatten the rows, or pass Layout(mask, sequence_ids=...)",
            )
        _check_cu_seqlens(cu_seqlens, mask)
        positions = torch.arange(mask.shape[-1], device=mask.device)
        ids = torch.searchsorted(cu_seqlens[1:].to(positions), positions, right=True)
        layout = cls(mask, sequence_ids=ids.view(mask.shape), segment_ids=segment_ids, age=age,
                     batch_group=batch_group)
        # padding at the end is one more
        few = _Parts(layout._sequences.ids, len(cu_seqlens))
        if layout._segments is layout._sequences:
            layout._segments = few
        layout._sequences = few
        return layout

    @classmethod
    def from_position_ids(
        cls,
        mask: Tensor,
        position_ids: Tensor,
        *,
        segment_ids: Tensor | None = None,
        age: Tensor | None = None,
        batch_group: Group = None,
    ) -> Layout:
        """The layout of packed rows whose positions start again at 0 with every sequence.

        Args:
            mask: bool "b t".
            position_ids: int "b t".
            segment_ids: int "b t".
            age: int "b t".
            batch_group: as in the constructor.

        >>> mask, positions = torch.ones(1, 5, dtype=torch.bool), torch.tensor([[0, 1, 0, 1, 2]])
        >>> Layout.from_position_ids(mask, positions).sequence_total(torch.ones(1, 5))
        tensor([[2., 2., 3., 3., 3.]])
        """
        _check_ids("position_ids", position_ids, mask)
        ids = (position_ids == 0).cumsum(-1)
        return cls(mask, sequence_ids=ids, segment_ids=segment_ids, age=age,
                   batch_group=batch_group)

    def rows(self, start: int, stop: int) -> Layout:
        """The layout of some of the rows; sequences never cross rows."""
        part = self._with(self.mask[start:stop])
        alike = self.sequence_group is not None  # numbers are the same on all ranks
        part._sequences = self._sequences.rows(start, stop, alike=alike)
        part._segments = self._segments.rows(start, stop, alike=alike)
        part.age = None if self.age is None else self.age[start:stop]
        return part

    def with_mask(self, mask: Tensor) -> Layout:
        """The same sequences, segments and ages with other tokens counted."""
        check_mask("Layout.with_mask", mask)
        if mask.shape != self.mask.shape:
            raise input_error(
                "Layout.with_mask", "mask", expected=f"of shape {tuple(self.mask.shape)}",
                got=describe(mask), fix="pass a mask over the same tokens",
            )
        return self._with(_saved(mask))

    def _with(self, mask: Tensor) -> Layout:
        part = object.__new__(Layout)  # which torch.compile follows, unlike copy.copy
        for name in Layout.__slots__:
            setattr(part, name, getattr(self, name))
        part.mask = mask
        return part

    def count(self) -> Tensor:
        """How many tokens of these sequences count, on all ranks that hold them; int64 ""."""
        return sum_over(torch.count_nonzero(self.mask), self.sequence_group)

    def num_sequences(self) -> Tensor:
        """How many sequences have at least one token that counts; int64 ""."""
        return sum_over(torch.count_nonzero(self.sequence_starts()), self.sequence_group)

    def total(self, x: Tensor) -> Tensor:
        """Sum of "b t" over the tokens that count, this rank's share of it; ""."""
        return masked(x, self.mask).sum()

    def mean(self, x: Tensor) -> Tensor:
        """Mean of "b t" over the tokens that count, this rank's share of it; 0 if none do."""
        return (self.total(wide(x)) / self.count().clamp(min=1)).to(x.dtype)

    def sequence_total(self, x: Tensor) -> Tensor:
        """Sum over the counted tokens of each sequence, on each of its tokens; "b t" -> "b t"."""
        return self._reduce(masked(x, self.mask), self._sequences, "sum")

    def sequence_count(self, dtype: torch.dtype) -> Tensor:
        """How many tokens of each sequence count, on each of its tokens; "b t"."""
        return self._reduce(self.mask.to(dtype), self._sequences, "sum")

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Mean over the counted tokens of each sequence, on each of its tokens; "b t" -> "b t"."""
        total = self.sequence_total(wide(x))
        return (total / self.sequence_count(total.dtype).clamp(min=1)).to(x.dtype)

    def sequence_max(self, x: Tensor) -> Tensor:
        """Maximum over the counted tokens of each sequence; "b t". -inf where none count.

        Where ranks share sequences it carries no gradient.
        """
        return self._reduce(torch.where(self.mask, x, -torch.inf), self._sequences, "amax")

    def per_sequence(self, x: Tensor) -> Tensor:
        """Sum of "b t" over each sequence, this rank's share of it; "s".

        Args:
            x: floating or bool, 0 where nothing counts.

        Returns:
            Floating, or int32. A place that no sequence takes holds 0; there are no more places
            than tokens, or than rows where each is one sequence.
        """
        x = x if x.is_floating_point() else x.to(torch.int32)
        if self._sequences.ids is None:
            return x.sum(-1, dtype=x.dtype).flatten()
        x = x.to(accumulator(x.device)) if x.is_floating_point() else x
        places = x.new_zeros(self._sequences.number)
        return places.scatter_add(0, self._sequences.ids.flatten(), x.flatten())

    def whole_sequences(self, shares: Sequence[Tensor]) -> Sequence[Tensor]:
        """Shares of sequences, added up over the ranks that hold them; "s" each.

        The first of those ranks has the sums and the others 0, so that each is there once.
        """
        if self.sequence_group is None:
            return shares
        wide = torch.stack([x.to(accumulator(x.device)) for x in shares])
        whole = sum_over(wide, self.sequence_group)
        return (whole if dist.get_rank(self.sequence_group) == 0 else 0 * whole).unbind()

    def segment_total(self, x: Tensor) -> Tensor:
        """Sum over the counted tokens of each segment, on each of its tokens; "b t" -> "b t"."""
        return self._reduce(masked(x, self.mask), self._segments, "sum")

    def segment_max(self, x: Tensor) -> Tensor:
        """Maximum over the counted tokens of each segment; "b t". -inf where none count."""
        return self._reduce(torch.where(self.mask, x, -torch.inf), self._segments, "amax")

    def prefix_total(self, x: Tensor) -> Tensor:
        """Sum over the counted tokens of the sequence up to and including each; "b t" -> "b t"."""
        x = masked(x, self.mask)
        if self.sequence_group is not None:
            chunk, chunks = self._chunk()
            pieces = _Parts(
                self._sequences.numbers(x) * chunks + chunk, self._sequences.number * chunks
            )
            return _running(x, _number_runs(pieces.ids)) + self._before(x, pieces, chunks)
        return x.cumsum(-1) if self._sequences.ids is None else _running(x, self._sequences.ids)

    def _chunk(self) -> tuple[Tensor, int]:
        """Which chunk of its sequence each token lies in, and into how many sequences are cut."""
        rank, ranks = dist.get_rank(self.sequence_group), dist.get_world_size(self.sequence_group)
        if not self.zigzag:
            return torch.full_like(self.mask, rank, dtype=torch.long), ranks
        here = self._sequences._replace(ids=self._sequences.numbers(self.mask))
        ones = torch.ones_like(self.mask, dtype=accumulator(self.mask.device))
        second = 2 * _running(ones, _number_runs(here.ids)) > _reduce(ones, here, "sum", None)
        return torch.where(second, 2 * ranks - 1 - rank, rank), 2 * ranks

    def _before(self, x: Tensor, pieces: _Parts, chunks: int) -> Tensor:
        """What the earlier chunks of each token's sequence add up to."""
        totals = x.new_zeros(pieces.number).scatter_add(0, pieces.numbers(x).flatten(), x.flatten())
        totals = rearrange(sum_over(totals, self.sequence_group), "(s c) -> s c", c=chunks)
        before = rearrange(totals.cumsum(-1) - totals, "s c -> (s c)")
        return before.gather(0, pieces.numbers(x).flatten()).view(x.shape)

    def is_packed(self) -> bool:
        """Whether rows may hold several sequences."""
        return self._sequences.ids is not None

    def sequence_numbers(self) -> Tensor:
        """The sequence of each token, those of earlier rows first; int "b t"."""
        return self._sequences.numbers(self.mask)

    def segment_numbers(self) -> Tensor | None:
        """The segment of each token, those of earlier sequences first; int "b t".

        None where none were given.
        """
        same = self._segments.ids is self._sequences.ids
        return None if same else self._segments.numbers(self.mask)

    def sequence_starts(self) -> Tensor:
        """The first counted token of each sequence; bool "b t"."""
        return self._first_counted(self._sequences)

    def segment_starts(self) -> Tensor:
        """The first counted token of each segment; bool "b t"."""
        return self._first_counted(self._segments)

    def _first_counted(self, parts: _Parts) -> Tensor:
        positions = torch.arange(self.mask.shape[-1], device=self.mask.device)
        if self.sequence_group is not None:  # positions of lower ranks come first
            positions = positions + (dist.get_rank(self.sequence_group) << 40)
        positions = positions.expand(self.mask.shape)
        # amax of the negated position: the smallest position that counts
        negated = torch.where(self.mask, -positions, torch.iinfo(torch.long).min)
        return self.mask & (-positions == self._reduce(negated, parts, "amax"))

    def _reduce(self, x: Tensor, parts: _Parts, how: Reduction) -> Tensor:
        return _reduce(x, parts, how, self.sequence_group)


class _Parts(NamedTuple):
    """A partition of the tokens: the part of each, and how many parts there are at most."""

    ids: Tensor | None  # None: each row is one
    number: int

    def rows(self, start: int, stop: int, *, alike: bool) -> _Parts:
        if self.ids is None:
            return self
        if alike:
            return self._replace(ids=self.ids[start:stop])
        ids = self.ids[start:stop] - self.ids[start : start + 1, :1]
        return _Parts(ids, ids.numel())  # as many as there are tokens, at most

    def numbers(self, x: Tensor) -> Tensor:
        """The part of each token, rows counted from 0; int, of the shape of ``x``."""
        if self.ids is not None:
            return self.ids
        rows = torch.arange(math.prod(x.shape[:-1]), device=x.device)
        return rows.view(*x.shape[:-1], 1).expand(x.shape)


def _shared(
    mask: Tensor, sequence_ids: Tensor | None, segment_ids: Tensor | None, number: int | None
) -> _Parts:
    """The sequences of ranks that share them, numbered alike on all."""
    if segment_ids is not None:
        raise input_error(
            "Layout", "segment_ids", expected="None where ranks share sequences", got="a tensor",
            fix="segments that ranks cut are not supported: gather the sequences, or use another"
            " level",
        )
    if sequence_ids is None:
        return _Parts(None, math.prod(mask.shape[:-1]))
    if number is None:
        raise input_error(
            "Layout", "num_ids", expected="given with sequence_group and sequence_ids",
            got="None", fix="number the sequences alike on all ranks, and pass how many there are",
        )
    return _Parts(sequence_ids.long(), number)  # scatters index with no other type


def _check_alike(parts: _Parts, group: Group, device: torch.device) -> None:
    facts = torch.tensor([parts.number, -parts.number, 0], device=device)
    if parts.ids is not None:
        facts[2] = ((parts.ids < 0) | (parts.ids >= parts.number)).any()
    most, least, outside = max_over(facts, group).tolist()
    if outside:
        raise input_error(
            "Layout", "sequence_ids", expected="from 0 to num_ids − 1 on all ranks of the group",
            got="others on some rank", fix="number the sequences from 0, alike on all ranks",
        )
    if most != -least:
        raise input_error(
            "Layout", "mask" if parts.ids is None else "num_ids",
            expected="of a number of sequences that is the same on all ranks of"
            " sequence_group",
            got=f"{parts.number} here, and from {-least} to {most} on the ranks",
            fix="give every rank its tokens of all the sequences, masked out where it has none",
        )


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where the mask is True and 0 elsewhere, whatever ``x`` holds there.

    Args:
        x: "b t".
        mask: bool "b t".

    >>> masked(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
    tensor([1., 0.])
    """
    vectorised = x.device.type == "cpu" and x.is_floating_point() and not torch.is_grad_enabled()
    if not vectorised or torch.compiler.is_compiling() or x.dtype not in BITS:
        return torch.where(mask, x, 0)
    if torch._C._functorch.is_functorch_wrapped_tensor(x):  # torch 2.6 has no such view under vmap
        return torch.where(mask, x, 0)
    # `where` on a CPU goes element by element; clearing the bits is exact and vectorised.
    ones = mask.to(BITS[x.dtype]).neg_()
    return (x.detach().view(BITS[x.dtype]) & ones).view(x.dtype)


def _saved(x: Tensor) -> Tensor:
    """A tensor that a backward may keep: autograd refuses those of ``torch.inference_mode``."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


def wide(x: Tensor) -> Tensor:
    """In float32 or wider, so that a sum of 16-bit numbers does not overflow before a mean."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_layout(caller: str, mask: Tensor | Layout, argument: str = "mask") -> Layout:
    """A mask is the layout in which each row is one sequence; a layout is itself."""
    if isinstance(mask, Layout):
        return mask
    check_mask(caller, mask, argument, expected="a bool tensor or a Layout")
    return Layout(mask)


def pad_sequences(tensors: Sequence[Tensor], *, value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Put sequences of different lengths into rows.

    Args:
        tensors: each "t_i", of one dtype.
        value: what fills the rest of a row.

    Returns:
        padded "b t" and its mask, bool "b t", with t the greatest length.

    Raises:
        InputError: no list of tensors, one that is not one-dimensional, or other dtypes than the
            first's; a value that is no number.

    >>> padded, mask = pad_sequences([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    >>> padded, mask
    (tensor([[1., 2.],
            [3., 0.]]), tensor([[ True,  True],
            [ True, False]]))
    """
    if not isinstance(tensors, Iterable) or getattr(tensors, "ndim", 1) == 0:
        raise input_error(
            "pad_sequences", "tensors", expected="a list of one-dimensional tensors",
            got=describe(tensors), fix="pass one tensor of `t` tokens per sequence",
        )
    if not is_number(value):
        raise input_error(
            "pad_sequences", "value", expected="a number", got=describe(value),
            fix="pass what fills the rest of a row, such as value=0.0",
        )
    tensors = list(tensors)
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor) or x.ndim != 1:
            raise input_error(
                "pad_sequences", f"tensors[{i}]", expected="a one-dimensional tensor",
                got=describe(x), fix="pass one tensor of `t` tokens per sequence",
            )
        if x.dtype != tensors[0].dtype:  # the first would decide, and cut fractions off
            raise input_error(
                "pad_sequences", f"tensors[{i}]", expected=f"{tensors[0].dtype} like the first",
                got=describe(x), fix="pass tensors of one dtype, such as x.float() of each",
            )
    if not tensors:
        return torch.empty(0, 0), torch.empty(0, 0, dtype=torch.bool)
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    lengths = torch.tensor([len(x) for x in tensors], device=padded.device)
    positions = torch.arange(padded.shape[1], device=padded.device)
    return padded, positions < rearrange(lengths, "b -> b 1")


def unpad(padded: Tensor, mask: Tensor) -> list[Tensor]:
    """The counted tokens of each row; the inverse of :func:`pad_sequences`.

    Args:
        padded: "b t".
        mask: bool "b t".

    Returns:
        b tensors, each "t_i".

    Raises:
        InputError: the mask is not bool, or of another shape.

    >>> unpad(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
    [tensor([1., 2.]), tensor([3.])]
    """
    check_mask("unpad", mask)
    if not isinstance(padded, Tensor) or padded.shape != mask.shape:
        raise input_error(
            "unpad", "padded", expected=f"a tensor of shape {tuple(mask.shape)} like `mask`",
            got=describe(padded), fix="pass the two that pad_sequences returns",
        )
    return [row[keep] for row, keep in zip(padded, mask, strict=True)]


def _check_ids(name: str, ids: Tensor | None, mask: Tensor) -> None:
    if ids is None:
        return
    if not isinstance(ids, Tensor) or not is_integer(ids) or ids.shape != mask.shape:
        raise input_error(
            "Layout", name, expected=f"an integer tensor of shape {tuple(mask.shape)} like `mask`",
            got=describe(ids), fix=f"pass {name} as a tensor of torch.long, one number per token",
        )


def _check_cu_seqlens(cu_seqlens: Tensor, mask: Tensor) -> None:
    integers = isinstance(cu_seqlens, Tensor) and is_integer(cu_seqlens)
    if not integers or cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise input_error(
            "Layout.from_cu_seqlens", "cu_seqlens", expected="an integer tensor `s+1`",
            got=describe(cu_seqlens), fix="pass flash-attention's cumulative lengths",
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((cu_seqlens[0] != 0) | (cu_seqlens.diff() < 0).any()):
        raise input_error(
            "Layout.from_cu_seqlens", "cu_seqlens", expected="rising from 0",
            got=str(cu_seqlens[:8].tolist()), fix="begin with 0, and add up the lengths",
        )
    n, last = mask.shape[-1], int(cu_seqlens[-1])
    if last > n:
        raise input_error(
            "Layout.from_cu_seqlens", "cu_seqlens", expected=f"to end at {n}, the tokens of `mask`,"
            " or before", got=f"{last} at the end",
            fix="cut all alike: where log-probs of the next token drop one token of a sequence, its"
            " length is one less",
        )
    if mask.device.type == "cpu" and bool(mask[..., last:].any()):
        raise input_error(
            "Layout.from_cu_seqlens", "mask", expected=f"False from token {last} on, where the last"
            " sequence ends", got="True on some of these tokens",
            fix="add the end of their sequence to cu_seqlens, or mask the padding",
        )


def _run_starts(ids: Tensor) -> Tensor:
    first = torch.ones_like(ids[..., :1], dtype=torch.bool)
    return torch.cat([first, ids[..., 1:] != ids[..., :-1]], dim=-1)


def _number_runs(*ids: Tensor | None) -> Tensor:
    """Number the runs of equal ids 0, 1, …; a run ends where any of the ids changes or a row ends.

    Fewer runs than tokens, so "number of tokens" is a size known without asking the device.
    """
    starts = torch.stack([_run_starts(i) for i in ids if i is not None]).any(0)
    return starts.flatten().cumsum(0).sub(1).view(starts.shape)


def _running(x: Tensor, runs: Tensor) -> Tensor:
    """Running sums that begin anew with each run."""
    # The running sum of a row holds every earlier run; float64, where the device has it, keeps the
    # difference exact to the digits of the result.
    wide = x.to(accumulator(x.device))
    running = wide.cumsum(-1)
    before = masked(running - wide, _run_starts(runs))
    numbers = runs.flatten()
    offset = running.new_zeros(x.numel()).scatter_add(0, numbers, before.flatten())
    return (running - offset.gather(0, numbers).view(x.shape)).to(x.dtype)


def _reduce(x: Tensor, parts: _Parts, how: Reduction, group: Group) -> Tensor:
    over = sum_over if how == "sum" else max_over
    if x.numel() == 0 and group is None:
        return x
    lowest = 0 if how == "sum" else _lowest(x.dtype)
    if parts.ids is None:
        if how == "sum" or x.shape[-1] == 0:
            row = x.sum(-1, keepdim=True) + lowest
        else:
            row = x.amax(-1, keepdim=True)
        return over(row, group).expand_as(x)
    # float64 sums: a scatter adds one token after another, and thousands of float32 roundings
    # would make a packed batch differ from the padded one.
    wide = x.to(accumulator(x.device)) if x.is_floating_point() and how == "sum" else x
    buckets = torch.full((parts.number,), lowest, dtype=wide.dtype, device=x.device)
    index = parts.ids.flatten()
    if how == "sum":
        buckets = buckets.scatter_add(0, index, wide.flatten())
    else:
        buckets = buckets.scatter_reduce(0, index, wide.flatten(), "amax")
    return over(buckets, group).gather(0, index).view(x.shape).to(x.dtype)


def _lowest(dtype: torch.dtype) -> float | int:
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min
