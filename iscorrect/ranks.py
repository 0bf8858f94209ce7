"""Sums, maxima and gathers over the ranks of a process group; without one, of this rank alone."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from iscorrect.errors import input_error

Group = dist.ProcessGroup | None

T = TypeVar("T")


def check_member(caller: str, argument: str, group: Group) -> None:
    """Raise unless this rank belongs to the group, whose collectives would leave it out."""
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
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def accumulator(device: torch.device) -> torch.dtype:
    """The widest floating type of a device; counts to 2⁵³ are exact in float64."""
    return torch.float32 if device.type == "mps" else torch.float64
