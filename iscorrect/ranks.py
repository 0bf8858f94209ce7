"""Sums, maxima and gathers over the ranks of a process group; without one, of this rank alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from iscorrect.errors import InputError, input_error

Group = dist.ProcessGroup | None

T = TypeVar("T")


def check_member(caller: str, argument: str, group: Group) -> None:
    """Raise unless this rank belongs to the group, whose collectives would leave it out."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise input_error(
            caller, argument, expected="a process group, or None for this rank alone",
            got=type(group).__name__,
            fix="pass mesh.get_group(), or torch.distributed.group.WORLD for all ranks",
        )
    if group is not None and dist.get_rank(group) < 0:
        raise input_error(
            caller, argument, expected="a group that this rank belongs to, or None for this rank"
            " alone", got=f"a group without rank {dist.get_rank()}",
            fix="make the call only on the group's own ranks",
        )


def sum_over(x: Tensor, group: Group) -> Tensor:
    """Elementwise sum over ranks, on every rank; differentiable.

        y = Σ_r x_r,  ∂L/∂x_r = Σ_r ∂L_r/∂y

    L is the sum of what the ranks call their loss, so gradients are summed over ranks too.

    Args:
        x: of the same shape on every rank.
        group: the ranks; None: this one.

    Returns:
        Of the shape of ``x``.

    >>> sum_over(torch.tensor([1.0, 2.0]), None)
    tensor([1., 2.])
    """
    if group is None:
        return x
    total: Tensor = _SumOver.apply(x, group)  # type: ignore[no-untyped-call]
    return total


def max_over(x: Tensor, group: Group) -> Tensor:
    """Elementwise maximum over ranks, on every rank, without gradient.

    >>> max_over(torch.tensor([1.0, 2.0]), None)
    tensor([1., 2.])
    """
    if group is None:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def first_over(x: Tensor, group: Group) -> Tensor:
    """What the first rank of the group holds, bit for bit on every rank, without gradient.

    Ranks that decide by values what to send next must decide alike, and a rounding that differs
    between two devices is enough to part them.

    >>> first_over(torch.tensor([1.0, 2.0]), None)
    tensor([1., 2.])
    """
    if group is None:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(x, src=dist.get_global_rank(group, 0), group=group)
    return x


def objects_over(x: T, group: Group) -> list[T]:
    """Small Python objects of all ranks, in their order.

    >>> objects_over("here", None)
    ['here']
    """
    if group is None:
        return [x]
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, x, group=group)
    return every


def agree(
    caller: str, group: Group, facts: Mapping[str, object] | InputError, *, argument: str,
    each: int, checksums: Mapping[str, Tensor],
) -> list[int]:
    """Raise on every rank if one of them has an error or holds other facts than the first.

    Ranks that go on with different shapes wait for each other forever, so this comes before
    anything else is sent. It costs one gather of three integers and one synchronisation; what the
    facts are is only sent where they differ.

    Args:
        caller: what the messages begin with.
        group: the ranks; None: this one.
        facts: what has to be the same, by the name of the argument; or what went wrong here.
        argument: what the group is called.
        each: a number that may differ.
        checksums: int "", on the group's device, of the values of arguments that have to be the
            same.

    Returns:
        ``each`` of all ranks.

    Raises:
        InputError: ``facts``, that of another rank, or one that names what differs.

    >>> agree("f", None, {"size": 2}, argument="group", each=3, checksums={"x": torch.tensor(0)})
    [3]
    """
    if group is None:
        if isinstance(facts, InputError):
            raise facts
        return [each]
    names, values = list(checksums), list(checksums.values())
    text = -1 if isinstance(facts, InputError) else zlib.crc32(repr(facts).encode())
    mine = torch.stack([*(torch.full_like(values[0], x) for x in (each, text)), *values])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    rows: list[list[int]] = torch.stack(gathered).tolist()
    if text != -1 and all(row[1:] == rows[0][1:] for row in rows):
        return [row[0] for row in rows]
    mine_in_words: Any = str(facts) if isinstance(facts, InputError) else list(facts.items())
    told = objects_over(mine_in_words, group)
    if isinstance(facts, InputError):
        raise facts
    for rank, theirs in enumerate(told):
        if isinstance(theirs, str):
            raise input_error(
                caller, argument, expected="ranks that all accept their own input",
                got=f"from rank {rank} of the group: {theirs}", fix="see that rank",
            )
    held = [
        [*theirs, *((name, f"checksum {x}") for name, x in zip(names, row[2:], strict=True))]
        for theirs, row in zip(told, rows, strict=True)
    ]
    name, first, other, rank = next(
        (name, mine, value, rank) for rank, theirs in enumerate(held)
        for (name, mine), (_, value) in zip(held[0], theirs, strict=True) if mine != value
    )
    raise input_error(
        caller, name, expected=f"the same on all ranks of {argument}",
        got=f"{first} on the first and {other} on rank {rank}",
        fix="give them the same tokens and settings; only what is sharded may differ",
    )


def gather_over(x: Tensor, group: Group) -> tuple[Tensor, int]:
    """Vectors of all ranks one after another, and where this rank's begins.

    Lengths may differ; learning them costs one synchronisation with the device.

    >>> gather_over(torch.tensor([1.0, 2.0]), None)
    (tensor([1., 2.]), 0)
    """
    if group is None:
        return x, 0
    world = dist.get_world_size(group)
    length = torch.tensor([len(x)], device=x.device)
    lengths = [torch.empty_like(length) for _ in range(world)]
    dist.all_gather(lengths, length, group=group)
    sizes: list[int] = torch.cat(lengths).tolist()
    padded = x.new_zeros(max(sizes))
    padded[: len(x)] = x
    rows = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(rows, padded, group=group)
    parts = [row[:size] for row, size in zip(rows, sizes, strict=True)]
    return torch.cat(parts), sum(sizes[: dist.get_rank(group)])


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over(grad, ctx.group), None  # which can be differentiated again


def accumulator(device: torch.device) -> torch.dtype:
    """The widest floating type of a device; counts to 2⁵³ are exact in float64.

    >>> accumulator(torch.device("cpu"))
    torch.float64
    """
    if device.type in ("cpu", "cuda", "meta"):
        return torch.float64
    # a compiled graph cannot try
    tries = not torch.compiler.is_compiling()
    return torch.float64 if tries and _holds_float64(str(device)) else torch.float32


@cache
def _holds_float64(device: str) -> bool:
    """Whether a device does, by trying once."""
    try:
        torch.ones((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True
