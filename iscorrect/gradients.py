"""Values whose gradients are already known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
    if not torch.is_grad_enabled() or not any(x.requires_grad for x, _ in pairs):
        return value
    inputs = [x for x, _ in pairs]
    derivatives = [derivative for _, derivative in pairs]
    result: Tensor = _WithGradient.apply(value, len(pairs), *inputs, *derivatives)  # type: ignore[no-untyped-call]
    return result


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor times a number "", rounded by the kernel that multiplies.

    >>> scaled(torch.tensor([6.0]), torch.tensor(0.5), torch.float16)
    tensor([3.], dtype=torch.float16)
    """
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def giving_gradients_away(
    caller: str, value: Tensor, *pairs: tuple[Tensor | None, Tensor | None],
    scaled: Callable[[Tensor, Tensor, torch.dtype], Tensor] = scaled,
) -> Tensor:
    """As :func:`with_gradient`, for a scalar whose derivatives are as large as a model.

    The first backward hands the derivatives over and frees them, so that there is no second one.
    They may be wider than their tensors, and are multiplied before they are rounded: a loss scale
    then saves a float16 gradient from underflow.

    Args:
        caller: what the messages of errors begin with.
        value: "".
        pairs: a tensor and the derivative of ``value`` in it, of as many entries. A tensor that is
            None, or that needs no gradient, comes with None.
        scaled: multiplies a derivative that is wider than its tensor.

    Raises:
        RuntimeError: in a second backward.

    >>> x = torch.tensor([3.0], dtype=torch.float16, requires_grad=True)
    >>> giving_gradients_away("square", torch.tensor(9.0), (x, torch.tensor([6.0]))).backward()
    >>> x.grad
    tensor([6.], dtype=torch.float16)
    """
    inputs, derivatives = [x for x, _ in pairs], [derivative for _, derivative in pairs]
    result: Tensor = _GivingAway.apply(caller, value, derivatives, scaled, *inputs)  # type: ignore[no-untyped-call]
    return result


def differentiates_once(caller: str) -> None:
    """Raise inside a backward that is to be differentiated itself.

    >>> with torch.no_grad():
    ...     differentiates_once("square")
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{caller}: differentiating twice (create_graph=True) is not supported")


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, n: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[n:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiates_once("with_gradient")
        derivatives = [derivative * grad for derivative in ctx.saved_tensors]
        return (None, None, *derivatives, *([None] * len(derivatives)))


class _GivingAway(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, caller: str, value: Tensor, derivatives: list[Tensor | None],
        scaled: Callable[[Tensor, Tensor, torch.dtype], Tensor], *inputs: Tensor | None,
    ) -> Tensor:
        ctx.caller, ctx.derivatives, ctx.scaled = caller, derivatives, scaled
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in inputs]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiates_once(ctx.caller)
        if ctx.derivatives is None:
            raise RuntimeError(
                f"{ctx.caller}: its gradients were handed over by the first backward and are not"
                " kept twice; compute the loss again for another backward"
            )
        derivatives, ctx.derivatives = ctx.derivatives, None
        made: list[Tensor | None] = []
        for derivative, like in zip(derivatives, ctx.like, strict=True):
            if derivative is None:
                made.append(None)
                continue
            shape, dtype = like
            same = derivative.dtype == dtype
            out = derivative.mul_(grad) if same else ctx.scaled(derivative, grad, dtype)
            made.append(out.view(shape))
        return (None, None, None, None, *made)
