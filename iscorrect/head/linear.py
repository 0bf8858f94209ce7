"""Per-token log-probs from hidden states and the LM head; the logits of a batch never exist."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.errors import check_flag
from iscorrect.gradients import differentiates_once
from iscorrect.head.inputs import Counted, Head, prepare
from iscorrect.head.reader import Reader, default_step
from iscorrect.head.state import Gradients, Reading
from iscorrect.head.support import Support
from iscorrect.layout import Layout, as_layout
from iscorrect.ranks import Group, first_over


class HeadOutput(NamedTuple):
    """What the head says about each token; nothing but ``log_probs`` carries gradient.

    Attributes:
        log_probs: "...", nats.
        entropy: "...", nats, of the distribution over the vocabulary.
        surprisal_variance: "...", nats², the variance of −log p under p.
    """

    log_probs: Tensor
    entropy: Tensor
    surprisal_variance: Tensor


@overload
def linear_log_probs(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., chunk_size: int | None = ...,
    head_dtype: torch.dtype = ..., support: Tensor | Support | None = ...,
    entropy: Literal[False] = ..., layout: Tensor | Layout | None = ...,
    vocabulary_group: Group = ..., vocabulary_size: int | None = ...,
    sequence_parallel: bool = ..., compile_kernels: bool = ...,
) -> Tensor: ...
@overload
def linear_log_probs(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., chunk_size: int | None = ...,
    head_dtype: torch.dtype = ..., support: Tensor | Support | None = ...,
    entropy: Literal[True], layout: Tensor | Layout | None = ...,
    vocabulary_group: Group = ..., vocabulary_size: int | None = ...,
    sequence_parallel: bool = ..., compile_kernels: bool = ...,
) -> HeadOutput: ...
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    head_dtype: torch.dtype = torch.float32,
    support: Tensor | Support | None = None,
    entropy: bool = False,
    layout: Tensor | Layout | None = None,
    vocabulary_group: Group = None,
    vocabulary_size: int | None = None,
    sequence_parallel: bool = False,
    compile_kernels: bool = False,
) -> Tensor | HeadOutput:
    """Log-prob of each target token under a linear head, without the "... v" logits.

        log π(y) = z_y − log Σ_{v ∈ S} exp(z_v),  z = c tanh((h Wᵀ + b)/c)/τ

    The backward pass computes the logits once more, on a CPU only for tokens whose log-prob has a
    gradient that is not zero. With a frozen head it computes nothing: the gradient of ``hidden`` is
    made beside the log-probs, whatever a loss does with them.

    16-bit hidden states and weights are multiplied in 16 bits with float32 sums and results where
    the device can, and as float32 elsewhere. Hidden states and weights of different dtypes are
    multiplied in the wider one, but for float32 weights under autocast, which are rounded as
    autocast rounds them when the hidden states come in its dtype. Products of float32 follow
    ``torch.backends.cuda.matmul.allow_tf32``, which takes from them what a float32 head is for.

    Nothing waits for the device, but that a layout on a GPU is asked once how many tokens count,
    and a support two or three times how many ids it keeps.
    Under ``torch.compile`` a whole head is one node of the graph.

    With the head's rows on several ranks (tensor parallelism), each makes the same call on the same
    tokens and gets the same log-probs, the same gradient of ``hidden``, and that of its own rows.
    A chunk costs an all-reduce of one number per token, the largest logit, and one of two, the
    target's logit and the sum of the others; its backward one of the gradient of ``hidden``.

    Args:
        hidden: "... d", with gradient.
        weight: "v d", with gradient. A DTensor sharded on dimension 0 brings its group with it.
        target: int "...", in [0, v) where the layout counts.
        bias: "v", with gradient.
        temperature: τ > 0, the sampler's.
        softcap: c > 0, as in Gemma's final logits; None for none.
        chunk_size: tokens that go through the head at a time, over a block of its rows after the
            other; None: d, and 1024 or more; 4096 on a GPU.
        head_dtype: what the head's output is rounded to. float32 is the FP32 head, whatever the
            dtype of hidden states and weights; torch.bfloat16 repeats an engine with a 16-bit head.
        support: S, the kept ids, as in :func:`log_probs_from_logits`.
        entropy: return :class:`HeadOutput` instead of log-probs alone.
        layout: bool "..." or a layout. Other tokens are not computed and get 0. None: all count.
        vocabulary_group: the ranks that hold the other rows of the head (tensor parallelism);
            ``weight`` and ``bias`` are this rank's, the ranks' rows follow one another.
        vocabulary_size: v, where the rows of the head are padded to more.
        sequence_parallel: ``hidden`` is "... t/R d", the r-th of R parts of "... t d", on rank r of
            ``vocabulary_group``; everything else stays whole. Rows are exchanged chunk by chunk.
        compile_kernels: let ``torch.compile`` make one kernel of what happens to the logits before
            a product and one of what happens after it, on a GPU. Without a compiler a warning says
            that the kernels stay eager.

    Returns:
        "...", nats, ≤ 0, float32 or wider. −inf where the target is not in its support; on a GPU
        NaN where an id is outside the vocabulary, which is an error on a CPU.

    Raises:
        InputError: shapes or devices do not fit, or a number is not positive; on all ranks of the
            group if on one, or if they differ in what has to be the same.
        RuntimeError: on differentiating twice.

    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(4, 8)
    >>> linear_log_probs(hidden, weight, torch.zeros(2, 3, dtype=torch.int64))[0]
    tensor([-1.3863, -1.3863, -1.3863])
    """
    check_flag("linear_log_probs", "entropy", entropy)
    if torch.compiler.is_compiling() and vocabulary_group is None:
        # custom operators import sympy, a second that nobody else should wait for
        from iscorrect.head.node import Settings, log_probs_in_graph

        mask = None if layout is None else as_layout("linear_log_probs", layout, "layout").mask
        settings = Settings(
            temperature, softcap, chunk_size, head_dtype, vocabulary_size, compile_kernels
        )
        out = log_probs_in_graph(
            hidden, weight, bias, target, mask, support, settings, spread=entropy
        )
        return HeadOutput(*out) if entropy else out[0]
    head, tokens = prepare(
        "linear_log_probs", hidden=hidden, weight=weight, target=target, bias=bias,
        temperature=temperature, softcap=softcap, chunk_size=chunk_size, head_dtype=head_dtype,
        support=support, layout=layout, vocabulary_group=vocabulary_group,
        vocabulary_size=vocabulary_size, sequence_parallel=sequence_parallel,
        compile_kernels=compile_kernels, facts={"entropy": entropy},
    )
    log_probs, *moments = log_probs_of(
        head, tokens, chunk_size or default_step(head), spread=entropy
    )
    return HeadOutput(log_probs, *moments) if entropy else log_probs


def log_probs_of(
    head: Head, tokens: Counted, step: int, *, spread: bool = False
) -> tuple[Tensor, ...]:
    """Log-probs of the targets, in their shape, with gradient; entropy and variance if asked for.

    What does not count gets 0.
    """
    trained = [x is not None and x.requires_grad for x in (head.weight, head.bias)]
    if torch.is_grad_enabled() and tokens.hidden.requires_grad and not any(trained):
        out: tuple[Tensor, ...] = _FrozenHead.apply(  # type: ignore[no-untyped-call]
            tokens.hidden, head, tokens, step, spread
        )
    else:
        out = _TrainedHead.apply(  # type: ignore[no-untyped-call]
            tokens.hidden, head.weight, head.bias, head, tokens, step, spread
        )
    return out


class _TrainedHead(torch.autograd.Function):
    """The logits are computed again where a gradient needs them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, tokens: Counted,
        step: int, spread: bool,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            reading = Reader(head, tokens).score(tokens, step, spread=spread)
        ctx.save_for_backward(hidden, weight, bias)
        # Nothing else may hold these three: hooks on what is saved move activations elsewhere.
        nothing = hidden.new_empty(0)
        ctx.head = replace(head, weight=nothing, bias=None)
        ctx.tokens = replace(tokens, hidden=nothing)
        ctx.reading, ctx.step = reading, step
        return _in_shape(ctx, tokens, reading)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        differentiates_once("linear_log_probs")
        hidden, weight, bias = ctx.saved_tensors
        head = replace(ctx.head, weight=weight, bias=bias)
        tokens, wanted = replace(ctx.tokens, hidden=hidden), ctx.needs_input_grad
        with torch.autocast(hidden.device.type, enabled=False):
            into = Gradients.of(head, tokens, hidden=wanted[0], weight=wanted[1], bias=wanted[2])
            grad = first_over(grad.flatten()[tokens.index], head.group)
            Reader(head, tokens).differentiate_all(tokens, ctx.reading, grad, into, ctx.step)
        ready = [
            None if made is None else made.to(like.dtype)
            for made, like in zip(into.total(), (hidden, weight, bias), strict=True)
        ]
        return (*ready, None, None, None, None)


class _FrozenHead(torch.autograd.Function):
    """The gradient of the hidden states is made beside the log-probs."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, tokens: Counted, step: int, spread: bool
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            reading, gradients = Reader(head, tokens).with_gradients(tokens, step, spread=spread)
        ctx.save_for_backward(gradients)
        ctx.places, ctx.group = tokens.places(), head.group
        ctx.tokens = replace(tokens, hidden=hidden.new_empty(0))
        return _in_shape(ctx, tokens, reading)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        differentiates_once("linear_log_probs")
        (gradients,) = ctx.saved_tensors
        tokens = ctx.tokens
        # one row more, for tokens whose hidden states are on other ranks
        row = gradients.new_zeros(len(gradients) + 1)
        row[ctx.places] = first_over(grad.flatten()[tokens.index], ctx.group)
        row = rearrange(row[:-1], "m -> m 1")
        made = torch.empty_like(gradients, dtype=tokens.hidden.dtype)
        torch.mul(gradients, row, out=made)
        # 0 · NaN is no 0
        return made.masked_fill_(row == 0, 0), None, None, None, None


def _in_shape(ctx: Any, tokens: Counted, reading: Reading) -> tuple[Tensor, ...]:
    """Log-probs and moments in the shape of the target; the moments carry no gradient."""
    out = [tokens.in_shape(x) for x in (reading.log_probs, *reading.moments)]
    ctx.mark_non_differentiable(*out[1:])
    return tuple(out)
