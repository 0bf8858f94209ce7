"""The head as one node of a compiled graph.

How many tokens count decides the shapes inside the head, which a graph cannot know. So the graph
holds one operation for the forward and one for the backward, and each runs as in eager mode.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.head.inputs import Counted, Head, autocast_to, prepare
from iscorrect.head.reader import Reader, default_step
from iscorrect.head.state import Gradients, Reading
from iscorrect.head.support import Support


class Settings(NamedTuple):
    """What an operation is told beside tensors; see :func:`linear_log_probs`.

    Attributes:
        rounded_to: what autocast rounds the weight to.
    """

    temperature: float
    softcap: float | None
    chunk_size: int | None
    head_dtype: torch.dtype
    vocabulary_size: int | None
    compile_kernels: bool
    rounded_to: torch.dtype | None = None


def log_probs_in_graph(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor | None,
    support: Tensor | Support | None, settings: Settings, *, spread: bool,
) -> tuple[Tensor, ...]:
    """Log-probs in the target's shape, with gradient; entropy and variance if asked for."""
    ids, offsets = support if isinstance(support, Support) else (support, None)
    trained = [x is not None and x.requires_grad for x in (weight, bias)]
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not any(trained)
    out = _forward(
        hidden, weight, bias, target, mask, ids, offsets, settings.temperature, settings.softcap,
        settings.chunk_size, settings.head_dtype, settings.vocabulary_size,
        settings.compile_kernels, autocast_to(hidden, weight), spread, frozen,
    )
    return tuple(out[: 3 if spread else 1])


Inputs = tuple[
    Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None
]


INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? mask, Tensor? ids, "
    "Tensor? offsets, float temperature, float? softcap, SymInt? chunk_size, "
    "ScalarType head_dtype, SymInt? vocabulary_size, bool compile_kernels, ScalarType? rounded_to"
)
"""Inputs and settings as a schema has them; torch 2.6 cannot infer one from these annotations."""


def _prepared(inputs: Inputs, settings: Settings) -> tuple[Head, Counted]:
    hidden, weight, bias, target, mask, ids, offsets = inputs
    head, tokens = prepare(
        "linear_log_probs", hidden=hidden, weight=weight, target=target, bias=bias,
        temperature=settings.temperature, softcap=settings.softcap,
        chunk_size=settings.chunk_size, head_dtype=settings.head_dtype,
        support=ids if ids is None or offsets is None else Support(ids, offsets), layout=mask,
        vocabulary_group=None, vocabulary_size=settings.vocabulary_size, sequence_parallel=False,
        compile_kernels=settings.compile_kernels, facts={},
    )
    return replace(head, rounded_to=settings.rounded_to), tokens


@torch.library.custom_op(
    "iscorrect::linear_log_probs", mutates_args=(),
    schema=f"({INPUTS}, bool spread, bool frozen) -> Tensor[]",
)
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor | None,
    ids: Tensor | None, offsets: Tensor | None, temperature: float, softcap: float | None,
    chunk_size: int | None, head_dtype: torch.dtype, vocabulary_size: int | None,
    compile_kernels: bool, rounded_to: torch.dtype | None, spread: bool, frozen: bool,
) -> list[Tensor]:
    settings = Settings(
        temperature, softcap, chunk_size, head_dtype, vocabulary_size, compile_kernels, rounded_to
    )
    head, tokens = _prepared((hidden, weight, bias, target, mask, ids, offsets), settings)
    reader, step = Reader(head, tokens), chunk_size or default_step(head)
    gradients = hidden.new_empty(0, dtype=reader.dtype)
    if frozen:
        reading, gradients = reader.with_gradients(tokens, step, spread=spread)
    else:
        reading = reader.score(tokens, step, spread=spread)
    log_probs, *moments, largest, log_total = map(
        tokens.in_shape,
        (reading.log_probs, *reading.moments, reading.largest, reading.log_total),
    )
    moments = moments or [gradients.new_empty(0), gradients.new_empty(0)]
    return [log_probs, *moments, largest, log_total, gradients]


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor | None,
    ids: Tensor | None, offsets: Tensor | None, temperature: float, softcap: float | None,
    chunk_size: int | None, head_dtype: torch.dtype, vocabulary_size: int | None,
    compile_kernels: bool, rounded_to: torch.dtype | None, spread: bool, frozen: bool,
) -> list[Tensor]:
    dtype = Head(weight, bias, head_dtype=head_dtype).wide(hidden)
    every = target.new_empty(target.shape, dtype=dtype)
    nothing = every.new_empty(0)
    moments = [torch.empty_like(every) if spread else nothing.clone() for _ in range(2)]
    rest = [torch.empty_like(every), torch.empty_like(every)]
    rows = (target.numel(), hidden.shape[-1])
    return [every, *moments, *rest, every.new_empty(rows) if frozen else nothing]


@torch.library.custom_op(
    "iscorrect::linear_log_probs_backward", mutates_args=(),
    schema="(Tensor grad, Tensor log_probs, Tensor largest, Tensor log_total, "
    f"{INPUTS}, bool[] wanted) -> Tensor[]",
)
def _backward(
    grad: Tensor, log_probs: Tensor, largest: Tensor, log_total: Tensor, hidden: Tensor,
    weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor | None, ids: Tensor | None,
    offsets: Tensor | None, temperature: float, softcap: float | None, chunk_size: int | None,
    head_dtype: torch.dtype, vocabulary_size: int | None, compile_kernels: bool,
    rounded_to: torch.dtype | None, wanted: list[bool],
) -> list[Tensor]:
    settings = Settings(
        temperature, softcap, chunk_size, head_dtype, vocabulary_size, compile_kernels, rounded_to
    )
    head, tokens = _prepared((hidden, weight, bias, target, mask, ids, offsets), settings)
    log_probs, largest, log_total, grad = (
        x.flatten()[tokens.index] for x in (log_probs, largest, log_total, grad)
    )
    reading = Reading(log_probs, largest, log_total)
    into = Gradients.of(head, tokens, hidden=wanted[0], weight=wanted[1], bias=wanted[2])
    Reader(head, tokens).differentiate_all(
        tokens, reading, grad, into, chunk_size or default_step(head)
    )
    made = []
    for x, like in zip(into.total(), (hidden, weight, bias), strict=True):
        if x is None or like is None:
            made.append(hidden.new_empty(0))
            continue
        out = torch.zeros_like(like, memory_format=torch.contiguous_format)
        # the rows that pad the vocabulary have none
        out.view(-1, *x.shape[1:])[: len(x)].copy_(x)
        made.append(out)
    return made


@_backward.register_fake
def _(
    grad: Tensor, log_probs: Tensor, largest: Tensor, log_total: Tensor, hidden: Tensor,
    weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor | None, ids: Tensor | None,
    offsets: Tensor | None, temperature: float, softcap: float | None, chunk_size: int | None,
    head_dtype: torch.dtype, vocabulary_size: int | None, compile_kernels: bool,
    rounded_to: torch.dtype | None, wanted: list[bool],
) -> list[Tensor]:
    return [
        torch.empty_like(like, memory_format=torch.contiguous_format)
        if like is not None and asked else hidden.new_empty(0)
        for like, asked in zip((hidden, weight, bias), wanted, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.frozen = inputs[-1]
    log_probs, _, _, largest, log_total, gradients = output
    ctx.settings = inputs[7:14]
    ctx.dtype, ctx.shape = inputs[0].dtype, inputs[0].shape
    if ctx.frozen:
        ctx.save_for_backward(gradients, inputs[4])
    else:
        ctx.save_for_backward(log_probs, largest, log_total, *inputs[:7])


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    rest = [None] * 13
    if ctx.frozen:
        gradients, mask = ctx.saved_tensors
        grad = grads[0] if mask is None else torch.where(mask, grads[0], 0)
        row = rearrange(grad.flatten(), "m -> m 1")
        # 0 · NaN is no 0
        made = torch.where(row == 0, 0, gradients * row)
        return (made.to(ctx.dtype).view(ctx.shape), None, None, *rest)
    wanted = list(ctx.needs_input_grad[:3])
    made = _backward(grads[0], *ctx.saved_tensors, *ctx.settings, wanted)
    return (*(x if asked else None for x, asked in zip(made, wanted, strict=True)), *rest)


_forward.register_autograd(_differentiate, setup_context=_save)
