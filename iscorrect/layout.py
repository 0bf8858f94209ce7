"""Which tokens count, and which sequence and which turn each of them belongs to.

The one object that knows about shape. Padded rows, packed rows, and one flat packed row give the
same values; what follows a reduction is elementwise, since a reduction over sequences returns its
value on every token of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.errors import check_mask, describe, input_error

Reduction = Literal["sum", "amax"]


class Layout:
    """The counted tokens of a batch and the sequences and segments they form.

    Args:
        mask: bool "b t", True where a token counts. Other positions may hold NaN or ±inf in every
            tensor that goes with the layout.
        sequence_ids: int "b t"; each run of equal ids inside a row is one sequence. None: each row
            is one sequence.
        segment_ids: int "b t"; each run of equal ids inside a sequence is one segment, such as a
            turn. None: each sequence is one segment.

    Raises:
        InputError: the mask is not bool, or ids have another shape or are not integers.

    >>> layout = Layout(torch.tensor([[True, True, False], [True, True, True]]))
    >>> layout.sequence_total(torch.ones(2, 3))
    tensor([[2., 2., 2.],
            [3., 3., 3.]])
    """

    __slots__ = ("_segments", "_sequences", "mask")

    def __init__(
        self,
        mask: Tensor,
        *,
        sequence_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> None:
        check_mask("Layout", mask)
        for name, ids in {"sequence_ids": sequence_ids, "segment_ids": segment_ids}.items():
            _check_ids(name, ids, mask)
        self.mask = mask
        # None stands for "each row is one": sums over rows need no ids.
        self._sequences = None if sequence_ids is None else _number_runs(sequence_ids)
        self._segments = self._sequences
        if segment_ids is not None:
            self._segments = _number_runs(segment_ids, self._sequences)

    @classmethod
    def from_cu_seqlens(
        cls, mask: Tensor, cu_seqlens: Tensor, *, segment_ids: Tensor | None = None
    ) -> Layout:
        """The layout of one packed row, given flash-attention's cumulative lengths.

        Args:
            mask: bool "n" or "1 n".
            cu_seqlens: int "s+1", rising from 0; sequence i holds tokens cu_seqlens[i] up to, not
                including, cu_seqlens[i+1]. Tokens beyond the last entry are padding.
            segment_ids: int, shaped like mask.

        Raises:
            InputError: the mask has more than one row.

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
        positions = torch.arange(mask.shape[-1], device=mask.device)
        ids = torch.searchsorted(cu_seqlens[1:].to(positions), positions, right=True)
        return cls(mask, sequence_ids=ids.view(mask.shape), segment_ids=segment_ids)

    @classmethod
    def from_position_ids(
        cls, mask: Tensor, position_ids: Tensor, *, segment_ids: Tensor | None = None
    ) -> Layout:
        """The layout of packed rows whose positions start again at 0 with every sequence.

        Args:
            mask: bool "b t".
            position_ids: int "b t".
            segment_ids: int "b t".

        >>> mask, positions = torch.ones(1, 5, dtype=torch.bool), torch.tensor([[0, 1, 0, 1, 2]])
        >>> Layout.from_position_ids(mask, positions).sequence_total(torch.ones(1, 5))
        tensor([[2., 2., 3., 3., 3.]])
        """
        _check_ids("position_ids", position_ids, mask)
        return cls(mask, sequence_ids=(position_ids == 0).cumsum(-1), segment_ids=segment_ids)

    def rows(self, start: int, stop: int) -> Layout:
        """The layout of some of the rows; sequences never cross rows."""
        part = object.__new__(Layout)
        part.mask = self.mask[start:stop]
        part._sequences = _rows_of(self._sequences, start, stop)
        part._segments = _rows_of(self._segments, start, stop)
        return part

    def with_mask(self, mask: Tensor) -> Layout:
        """The same sequences and segments with other tokens counted."""
        check_mask("Layout.with_mask", mask)
        part = object.__new__(Layout)
        part.mask, part._sequences, part._segments = mask, self._sequences, self._segments
        return part

    def count(self) -> Tensor:
        """How many tokens count; int64 ""."""
        return torch.count_nonzero(self.mask)

    def num_sequences(self) -> Tensor:
        """How many sequences have at least one token that counts; int64 ""."""
        return torch.count_nonzero(self.sequence_starts())

    def total(self, x: Tensor) -> Tensor:
        """Sum of "b t" over the tokens that count; ""."""
        return masked(x, self.mask).sum()

    def mean(self, x: Tensor) -> Tensor:
        """Mean of "b t" over the tokens that count; "". 0 when there are none."""
        return self.total(x) / self.count().clamp(min=1)

    def sequence_total(self, x: Tensor) -> Tensor:
        """Sum over the counted tokens of each sequence, on each of its tokens; "b t" -> "b t"."""
        return _reduce(masked(x, self.mask), self._sequences, "sum")

    def sequence_count(self, dtype: torch.dtype) -> Tensor:
        """How many tokens of each sequence count, on each of its tokens; "b t"."""
        return _reduce(self.mask.to(dtype), self._sequences, "sum")

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Mean over the counted tokens of each sequence, on each of its tokens; "b t" -> "b t"."""
        return self.sequence_total(x) / self.sequence_count(x.dtype).clamp(min=1)

    def sequence_max(self, x: Tensor) -> Tensor:
        """Maximum over the counted tokens of each sequence; "b t". -inf where none count."""
        return _reduce(torch.where(self.mask, x, -torch.inf), self._sequences, "amax")

    def segment_total(self, x: Tensor) -> Tensor:
        """Sum over the counted tokens of each segment, on each of its tokens; "b t" -> "b t"."""
        return _reduce(masked(x, self.mask), self._segments, "sum")

    def segment_max(self, x: Tensor) -> Tensor:
        """Maximum over the counted tokens of each segment; "b t". -inf where none count."""
        return _reduce(torch.where(self.mask, x, -torch.inf), self._segments, "amax")

    def prefix_total(self, x: Tensor) -> Tensor:
        """Sum over the counted tokens of the sequence up to and including each; "b t" -> "b t"."""
        x = masked(x, self.mask)
        if self._sequences is None:
            return x.cumsum(-1)
        # The running sum of a packed row holds every earlier sequence; float64 keeps the
        # difference exact to the digits of the result.
        running = x.double().cumsum(-1)
        before = running - x.double()
        first = _run_starts(self._sequences)
        offset = _reduce(torch.where(first, before, 0), self._sequences, "sum")
        return (running - offset).to(x.dtype)

    def sequence_starts(self) -> Tensor:
        """The first counted token of each sequence; bool "b t"."""
        return self._first_counted(self._sequences)

    def segment_starts(self) -> Tensor:
        """The first counted token of each segment; bool "b t"."""
        return self._first_counted(self._segments)

    def _first_counted(self, runs: Tensor | None) -> Tensor:
        positions = torch.arange(self.mask.shape[-1], device=self.mask.device)
        positions = positions.expand(self.mask.shape)
        # amax of the negated position: the smallest position that counts
        negated = torch.where(self.mask, -positions, -self.mask.shape[-1] - 1)
        return self.mask & (-positions == _reduce(negated, runs, "amax"))


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where the mask is True and 0 elsewhere, whatever ``x`` holds there.

    Args:
        x: "b t".
        mask: bool "b t".

    >>> masked(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
    tensor([1., 0.])
    """
    plain = x.requires_grad or torch.compiler.is_compiling() or x.device.type != "cpu"
    if plain or not x.is_floating_point():
        return torch.where(mask, x, 0)
    # `where` on a CPU goes element by element; clearing the bits is exact and vectorised.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    ones = mask.view(torch.int8).neg().to(bits)
    return (x.view(bits) & ones).view(x.dtype)


def as_layout(caller: str, mask: Tensor | Layout) -> Layout:
    """A mask is the layout in which each row is one sequence; a layout is itself."""
    if isinstance(mask, Layout):
        return mask
    check_mask(caller, mask)
    return Layout(mask)


def pad_sequences(tensors: Sequence[Tensor], *, value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Put sequences of different lengths into rows.

    Args:
        tensors: each "t_i", of one dtype.
        value: what fills the rest of a row.

    Returns:
        padded "b t" and its mask, bool "b t", with t the greatest length.

    Raises:
        InputError: a tensor is not one-dimensional.

    >>> padded, mask = pad_sequences([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    >>> padded, mask
    (tensor([[1., 2.],
            [3., 0.]]), tensor([[ True,  True],
            [ True, False]]))
    """
    for i, x in enumerate(tensors):
        if x.ndim != 1:
            raise input_error(
                "pad_sequences", f"tensors[{i}]", expected="one-dimensional", got=describe(x),
                fix="pass one tensor of `t` tokens per sequence",
            )
    if not tensors:
        return torch.empty(0, 0), torch.empty(0, 0, dtype=torch.bool)
    padded = torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)
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

    >>> unpad(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
    [tensor([1., 2.]), tensor([3.])]
    """
    return [row[keep] for row, keep in zip(padded, mask, strict=True)]


def _check_ids(name: str, ids: Tensor | None, mask: Tensor) -> None:
    if ids is None:
        return
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.shape != mask.shape:
        raise input_error(
            "Layout", name, expected=f"an integer tensor of shape {tuple(mask.shape)} like `mask`",
            got=describe(ids), fix=f"pass {name}.long(), one id per token",
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


def _rows_of(runs: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if runs is None else runs[start:stop] - runs[start : start + 1, :1]


def _reduce(x: Tensor, runs: Tensor | None, how: Reduction) -> Tensor:
    if x.numel() == 0:
        return x
    if runs is None:
        row = x.sum(-1, keepdim=True) if how == "sum" else x.amax(-1, keepdim=True)
        return row.expand_as(x)
    # float64 sums: a scatter adds one token after another, and thousands of float32 roundings
    # would make a packed batch differ from the padded one.
    wide = x.double() if x.is_floating_point() and how == "sum" else x
    lowest = 0 if how == "sum" else _lowest(wide.dtype)
    buckets = torch.full((x.numel(),), lowest, dtype=wide.dtype, device=x.device)
    index = runs.flatten()
    if how == "sum":
        buckets = buckets.scatter_add(0, index, wide.flatten())
    else:
        buckets = buckets.scatter_reduce(0, index, wide.flatten(), "amax")
    return buckets.gather(0, index).view(x.shape).to(x.dtype)


def _lowest(dtype: torch.dtype) -> float | int:
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min
