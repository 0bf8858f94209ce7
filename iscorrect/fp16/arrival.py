"""How much of an update survives the number format of the engine that it is sent to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from iscorrect.errors import check_choice, check_number, describe, input_error
from iscorrect.fp16.checkpoints import FLOATS, Source, Stored, stored
from iscorrect.fp16.ranges import MEASURED_AT_ONCE
from iscorrect.ranks import accumulator, sum_over
from iscorrect.text import Table, finite, number, percent, visible

Scaling = Literal["none", "row"]
Rounding = Callable[[Tensor], Tensor]
"""What an engine makes of a tensor; the values, in whatever dtype."""

MOST = 12  # tensors that are printed


@dataclass(frozen=True)
class Arrived:
    """What of the update of one tensor, or of several, an engine sees. Δ = w' − w.

    Attributes:
        name: of the tensor.
        entries: how many.
        moved: entries with Δ ≠ 0.
        seen: of these, those whose sent value changed.
        nonfinite: entries that are NaN or infinite, before or after, as stored or as sent; they
            are in none of the other counts and sums.
        inner: Σ (Q(w') − Q(w)) Δ.
        squares: Σ Δ².
        rest_squares: Σ (Q(w') − w')².
    """

    name: str
    entries: int = 0
    moved: int = 0
    seen: int = 0
    nonfinite: int = 0
    inner: float = 0.0
    squares: float = 0.0
    rest_squares: float = 0.0

    def __add__(self, other: Arrived) -> Arrived:
        return replace(self, **{x: getattr(self, x) + getattr(other, x) for x in SUMS})

    @property
    def share(self) -> float:
        """⟨Q(w') − Q(w), Δ⟩ / ‖Δ‖²; NaN without an update."""
        return self.inner / self.squares if self.squares else math.nan

    @property
    def unchanged(self) -> float:
        """The share of the entries with an update whose sent value stayed; NaN without any."""
        return 1 - self.seen / self.moved if self.moved else math.nan

    @property
    def rest(self) -> float:
        """‖Q(w') − w'‖ / ‖Δ‖, the rounding beside the update; NaN without one."""
        return float((self.rest_squares / self.squares) ** 0.5) if self.squares else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Counts, and the three shares."""
        counts = {x: getattr(self, x) for x in ("entries", "moved", "seen", "nonfinite")}
        shares = {"share": self.share, "unchanged": self.unchanged, "rest": self.rest}
        held: dict[str, Any] = finite({"name": self.name, **counts, **shares})
        return held


SUMS = ("entries", "moved", "seen", "nonfinite", "inner", "squares", "rest_squares")


def arrived(
    name: str, before: Tensor, after: Tensor, *, sent_before: Tensor, sent_after: Tensor
) -> Arrived:
    """What of an update arrives, given what was sent before it and after it.

    Args:
        name: of the tensor.
        before: the trainer's weights, of any shape.
        after: the same after the update.
        sent_before: what the engine was sent of ``before``.
        sent_after: what it was sent of ``after``.

    >>> w, step = torch.ones(1), torch.full((1,), 2**-9)  # half of a step of BF16 at 1 is 2⁻⁸
    >>> arrived("w", w, w + step, sent_before=w, sent_after=(w + step).bfloat16()).share
    0.0
    """
    tensors = [x.detach().reshape(-1) for x in (before, after, sent_before, sent_after)]
    parts = zip(*(torch.split(x, MEASURED_AT_ONCE) for x in tensors), strict=True)
    return sum((_arrived_flat(name, *part) for part in parts), Arrived(name))


def _arrived_flat(name: str, w: Tensor, w2: Tensor, q: Tensor, q2: Tensor) -> Arrived:
    w, w2, q, q2 = (x.to(accumulator(w.device)) for x in (w, w2, q, q2))
    usable = (w + w2 + q + q2).isfinite()
    update, seen, rest = ((a - b).where(usable, 0) for a, b in ((w2, w), (q2, q), (q2, w2)))
    moved = update != 0
    sums = torch.stack([
        *(x.sum().to(update.dtype) for x in (moved, moved & (seen != 0), ~usable)),
        seen @ update, update @ update, rest @ rest,
    ]).tolist()
    return Arrived(name, w.numel(), *map(int, sums[:3]), *sums[3:])


class UpdateWatch:
    """What of each update of a run arrives, from the same sample of the weights every time.

    Args:
        dtype: of the engine.
        entries: about so many are kept from one call to the next.

    >>> w = torch.nn.Parameter(torch.ones(9))
    >>> watch = UpdateWatch(torch.bfloat16)
    >>> watch([w]).moved  # nothing yet to compare with
    0
    >>> with torch.no_grad(): _ = w.add_(2**-9)
    >>> watch([w]).share
    0.0
    """

    def __init__(self, dtype: torch.dtype, entries: int = 2**20) -> None:
        check_scaling("UpdateWatch", dtype, "none")
        check_number("UpdateWatch", "entries", entries, "how many weights are kept", least=1)
        self._dtype, self._entries = dtype, entries
        self._places: list[Tensor] | None = None
        self._last: Tensor | None = None

    def __call__(self, parameters: Iterable[Tensor]) -> Arrived:
        """Of the update since the last call.

        Args:
            parameters: the trainer's, in the same order every time; of a DTensor the local part.
        """
        # a DTensor's to_local is that of its type alone
        parts = [getattr(x.detach(), "to_local", x.detach)().reshape(-1) for x in parameters]
        if not parts:
            raise input_error(
                "UpdateWatch", "parameters", expected="at least one tensor", got="none",
                fix="pass model.parameters()",
            )
        if self._places is None:
            share = min(1.0, self._entries / max(1, sum(x.numel() for x in parts)))
            generator = torch.Generator("cpu").manual_seed(0)
            counts = [math.ceil(share * x.numel()) for x in parts]
            self._places = [
                (torch.arange(n, device="cpu") if n == x.numel()
                 else torch.randint(x.numel(), (n,), generator=generator, device="cpu")
                 ).to(x.device)
                for n, x in zip(counts, parts, strict=True)
            ]
        pairs = zip(parts, self._places, strict=True)
        seen = torch.cat([x[places].to(torch.float32) for x, places in pairs])
        last, self._last = seen if self._last is None else self._last, seen
        sent = (to_grid(x, self._dtype, "none") for x in (last, seen))
        return arrived("sample", last, seen, sent_before=next(sent), sent_after=next(sent))


def over_ranks(found: Arrived, device: torch.device) -> Arrived:
    """The sum over all ranks, on every rank; of a process without others the same."""
    if not dist.is_available():
        return found
    held = [getattr(found, x) for x in SUMS]
    sums = torch.tensor(held, dtype=accumulator(device), device=device)
    values = sum_over(sums, dist.group.WORLD).tolist()
    return Arrived(found.name, *map(int, values[:4]), *values[4:])


@dataclass(frozen=True)
class WeightArrival:
    """What :func:`weight_arrival` found; printing it shows the tables.

    Attributes:
        format: that the engine holds its weights in.
        rows: one per tensor.
        skipped: dtype of each tensor that is not a float of 16 bits or more, by name.
    """

    format: str
    rows: tuple[Arrived, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def total(self) -> Arrived:
        """All tensors together."""
        return sum(self.rows, Arrived("all"))

    @property
    def share(self) -> float:
        """⟨Q(w') − Q(w), Δ⟩ / ‖Δ‖² of the whole update; NaN without one."""
        return self.total.share

    def blocks(self) -> list[str | Table]:
        """Tables and lines that say what was found."""
        moved = sorted((row for row in self.rows if row.moved), key=lambda row: row.share)
        blocks: list[str | Table] = [summary([self])]
        if moved:
            blocks += ["", Table(
                f"Least of it arrives in {self.format} of",
                ["tensor", "arrives", "unchanged", "rest / update"],
                [[visible(row.name), number(row.share), percent(row.unchanged), number(row.rest)]
                 for row in moved[:MOST]],
            )]
        return blocks

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "format": self.format, "total": self.total.to_dict(),
            "tensors": [row.to_dict() for row in self.rows], "skipped": dict(self.skipped),
        }

    def __str__(self) -> str:
        return "\n".join(map(str, self.blocks()))


def summary(found: Iterable[WeightArrival]) -> Table:
    """What arrives in several formats, as one table."""
    return Table(
        "What an engine sees of the update",
        ["engine", "arrives", "unchanged", "rest / update", "entries", "not finite"],
        [[x.format, number(x.share), percent(x.total.unchanged), number(x.total.rest),
          f"{x.total.entries:,}", f"{x.total.nonfinite:,}"] for x in found],
    )


def weight_arrival(
    before: Source, after: Source, dtype: torch.dtype = torch.bfloat16, *, scaling: Scaling = "none"
) -> WeightArrival:
    """The share of an update that is left once weights are rounded to an engine's number format.

        share = ⟨Q(w + Δ) − Q(w), Δ⟩ / ‖Δ‖²

    where Q rounds to the nearest number of ``dtype``. It is 1 where the engine moves as its
    trainer does, and 0 where every entry's update is lost: one of less than half a step of the
    grid, |w| 2⁻⁹ to |w| 2⁻⁸ in BF16, from weights that lie on the grid, as those of a checkpoint
    stored in BF16 do. Then the engine samples from an older policy. From weights that lie anywhere
    between the grid's points the share is near 1, however few entries change: those that do, jump.

    A trainer that computes in float32 shows it in its log-probs. One that rounds its weights to the
    engine's format before it computes, as mixed precision and autocast do, agrees with the engine
    and does not show it: both are late.

    Both are read tensor by tensor, `.safetensors` piece by piece. Tensors of the same names are
    compared; what both hold as one tensor of several names (tied weights) counts once.

    Args:
        before: the trainer's own weights, not what was sent: a module, a state dict, or a path as
            :func:`audit_fp16` takes it.
        after: the same after one update or several.
        dtype: that the engine holds its weights in: 16-bit or FP8.
        scaling: "none", or for FP8 "row": each row of a tensor (all of one with a single axis) is
            scaled to the largest number of ``dtype``, with a scale of its own before and after.

    Returns:
        A :class:`WeightArrival`; print it. Every tensor is rounded, also those that quantised
        engines leave in 16 bits: pass state dicts of the others to leave these out.

    Raises:
        InputError: a path that cannot be read, tensors of other names or shapes, or an unknown
            dtype or scaling.

    References:
        PULSE, arXiv 2602.03839: below which size an update does not show in BF16.

    >>> w = {"w": torch.linspace(0.5, 1, 9)}  # on the grid of BF16, whose half step is 2⁻⁹ here
    >>> moved = {"w": w["w"] - 2**-10}
    >>> weight_arrival(w, moved, torch.bfloat16).share
    0.0
    >>> weight_arrival(w, moved, torch.float16).share
    1.0
    """
    check_scaling("weight_arrival", dtype, scaling)
    name = str(dtype).removeprefix("torch.") + (" by row" if scaling == "row" else "")
    grids = {name: functools.partial(to_grid, dtype=dtype, scaling=scaling)}
    (found,) = arrivals("weight_arrival", before, after, grids)
    return found


def check_scaling(caller: str, dtype: object, scaling: object) -> None:
    """Raise unless an engine could hold weights in that format."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize <= 2
            and dtype not in NOT_ROUNDED_TO):
        raise input_error(
            caller, "dtype", expected="a floating-point dtype of 8 or 16 bits", got=repr(dtype),
            fix="pass torch.bfloat16, torch.float16 or torch.float8_e4m3fn",
        )
    check_choice(caller, "scaling", scaling, get_args(Scaling))


NOT_ROUNDED_TO = [
    getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name)
]
"""Formats of scales, and of two numbers a byte, which torch does not round to."""


def to_grid(x: Tensor, dtype: torch.dtype, scaling: Scaling) -> Tensor:
    """The nearest numbers of a dtype, as float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if scaling == "none" or not x.numel():  # of no entries there is no largest
        return wide.to(dtype).to(wide.dtype)
    axes = -1 if x.ndim else ()
    scale = wide.abs().amax(axes, keepdim=True) / torch.finfo(dtype).max
    scale = torch.where(scale > 0, scale, 1)
    return (wide / scale).to(dtype).to(wide.dtype) * scale


def arrivals(
    caller: str, before: Source, after: Source, grids: Mapping[str, Rounding],
    show: Callable[[Iterable[Stored]], Iterable[Stored]] = iter,
    arguments: tuple[str, str] = ("before", "after"),
) -> list[WeightArrival]:
    """:func:`weight_arrival` in several formats, in one pass over the weights.

    Args:
        caller: what messages begin with.
        before: the trainer's weights.
        after: the same later.
        grids: how each format rounds, by its name.
        show: passes on the tensors of ``before``, as they are come to.
        arguments: what messages call ``before`` and ``after``.
    """
    rows: dict[str, list[Arrived]] = {name: [] for name in grids}
    skipped, apart = {}, False
    later = {x.name: x for x in stored(caller, after, arguments[1])}
    earlier = {x.name: x for x in stored(caller, before, arguments[0])}
    _check_names(caller, arguments, earlier, later)
    once: dict[tuple[str, str], Stored] = {}
    for x in earlier.values():
        if x.name in later:
            once.setdefault((x.first, later[x.name].first), x)
    for tensor in show(once.values()):
        name, dtype = tensor.name, tensor.dtype
        if not {dtype, later[name].dtype} <= {*FLOATS.values()}:
            skipped[name] = dtype
            continue
        sums = {form: Arrived(name) for form in grids}
        for old, new in _pieces(caller, arguments, tensor, later[name]):
            apart |= old.data_ptr() != new.data_ptr()
            for form, rounded in grids.items():
                sums[form] += arrived(
                    name, old, new, sent_before=rounded(old), sent_after=rounded(new)
                )
        for form, row in sums.items():
            rows[form].append(row)
    if not any(rows.values()):
        raise input_error(
            caller, arguments[0], expected="weights in FP64, FP32, BF16 or FP16",
            got=", ".join(sorted(set(skipped.values()))) or "no tensor",
            fix="pass the trainer's own weights",
        )
    if not apart and next(iter(rows.values()))[0].entries:
        raise input_error(
            caller, arguments[0], expected=f"weights of their own, not those of `{arguments[1]}`",
            got="the same memory, which an update changes for both",
            fix="keep {name: x.clone() for name, x in model.state_dict().items()} before it",
        )
    return [WeightArrival(form, tuple(of), skipped) for form, of in rows.items()]


def _check_names(
    caller: str, arguments: tuple[str, str], before: Mapping[str, Stored],
    after: Mapping[str, Stored],
) -> None:
    if other := sorted(_alone(before, after) | _alone(after, before)):
        where = arguments[0] if other[0] in before else arguments[1]
        raise input_error(
            caller, arguments[1], expected=f"of the same tensors as `{arguments[0]}`",
            got=f"{visible(other[0])} in `{where}` alone, and {len(other) - 1} more such names",
            fix="pass two checkpoints that one run saved alike",
        )


def _alone(tensors: Mapping[str, Stored], others: Mapping[str, Stored]) -> set[str]:
    """Names of tensors of which the others have no name at all."""
    found = {x.first for x in tensors.values() if x.name in others}
    return {x.name for x in tensors.values() if x.first not in found}


def _pieces(
    caller: str, arguments: tuple[str, str], before: Stored, after: Stored
) -> Iterator[tuple[Tensor, Tensor]]:
    for old, new in zip_longest(before.pieces, after.pieces):
        if old is None or new is None or old.shape != new.shape:
            sizes = ["nothing" if x is None else describe(x) for x in (new, old)]
            raise input_error(
                caller, arguments[1], expected=f"of the same shapes as `{arguments[0]}`",
                got=f"{sizes[0]} beside {sizes[1]} in {visible(before.name)}",
                fix="pass two checkpoints that one run saved alike",
            )
        yield old, new.to(old.device)
