"""Values whose gradients are already known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_gradient(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """``value`` as a function of tensors, given its derivative in each.

    Lets a loss be made in one pass, block by block, with the gradient beside it.

    Args:
        value: "", or "…" where each entry depends on the same entry of the tensors alone.
        pairs: a tensor "…" and the derivative of ``value`` in it, of the same shape.

    Returns:
        Equal to ``value``; its backward multiplies the derivatives by the incoming gradient. It
        can be differentiated once.

    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> with_gradient(torch.tensor(9.0), (x, torch.tensor([6.0]))).backward()
    >>> x.grad
    tensor([6.])
    """
    inputs = [x for x, _ in pairs]
    derivatives = [derivative for _, derivative in pairs]
    result: Tensor = _WithGradient.apply(value, len(pairs), *inputs, *derivatives)  # type: ignore[no-untyped-call]
    return result


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, n: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[n:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        derivatives = [derivative * grad for derivative in ctx.saved_tensors]
        return (None, None, *derivatives, *([None] * len(derivatives)))
