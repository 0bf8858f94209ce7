"""Per-token log-probs from hidden states and the LM head; the logits of a batch never exist.

Chunks of tokens go through one reused buffer: logits in, probabilities and log-probs out, and
gradients from the probabilities while they are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.head import Head, Tokens, prepare
from iscorrect.layout import Layout
from iscorrect.logprobs import Support
from iscorrect.ranks import Group, first_over, max_over, sum_over

BLOCK = 1 << 21
"""Entries of a weight that are upcast at a time on the CPU: they stay in cache."""

WIDE_OUTPUT = hasattr(torch.ops.aten.mm, "dtype")
"""Whether products of 16-bit matrices can leave the accumulator in float32 (torch 2.8, CUDA)."""


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
    sequence_parallel: bool = ...,
) -> Tensor: ...
@overload
def linear_log_probs(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., chunk_size: int | None = ...,
    head_dtype: torch.dtype = ..., support: Tensor | Support | None = ...,
    entropy: Literal[True], layout: Tensor | Layout | None = ...,
    vocabulary_group: Group = ..., vocabulary_size: int | None = ...,
    sequence_parallel: bool = ...,
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
) -> Tensor | HeadOutput:
    """Log-prob of each target token under a linear head, without the "... v" logits.

        log π(y) = z_y − log Σ_{v ∈ S} exp(z_v),  z = c tanh((h Wᵀ + b)/c)/τ

    The backward pass computes the logits once more, and only for tokens whose log-prob has a
    gradient that is not zero.

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
        chunk_size: tokens whose logits are held at a time; None: one in 32, and 256 or more.
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

    Returns:
        "...", nats, ≤ 0, float32 or wider. −inf where the target is not in its support.

    Raises:
        InputError: shapes or devices do not fit, or a number is not positive; on all ranks of the
            group if on one, or if they differ in what has to be the same.
        RuntimeError: on differentiating twice.

    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(4, 8)
    >>> linear_log_probs(hidden, weight, torch.zeros(2, 3, dtype=torch.int64))[0]
    tensor([-1.3863, -1.3863, -1.3863])
    """
    head, tokens, size = prepare(
        "linear_log_probs", hidden=hidden, weight=weight, target=target, bias=bias,
        temperature=temperature, softcap=softcap, chunk_size=chunk_size, head_dtype=head_dtype,
        support=support, layout=layout, vocabulary_group=vocabulary_group,
        vocabulary_size=vocabulary_size, sequence_parallel=sequence_parallel, entropy=entropy,
    )
    log_probs, *moments = log_probs_of(head, tokens, size, spread=entropy)
    return HeadOutput(log_probs, *moments) if entropy else log_probs


@dataclass(frozen=True, eq=False)
class Gradients:
    """Sums of what the chunks give, in float32 or wider; None where nothing asks for them.

    Attributes:
        hidden: "m d".
        weight: "v d".
        bias: "v".
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(
        cls, head: Head, tokens: Tokens, *, hidden: bool, weight: bool, bias: bool
    ) -> Gradients:
        """Sums of nothing yet."""
        dtype = head.wide(tokens.hidden)

        def zeros(like: Tensor | None, wanted: bool) -> Tensor | None:
            if like is None or not wanted:
                return None
            # contiguous, whatever the strides of the parameter
            return torch.zeros(like.shape, dtype=dtype, device=like.device)

        return cls(zeros(tokens.hidden, hidden), zeros(head.weight, weight), zeros(head.bias, bias))

    def another(self) -> Gradients:
        """The same rows of ``hidden``, and other sums of weight and bias."""
        weight, bias = self.weight, self.bias
        return Gradients(
            self.hidden, None if weight is None else torch.zeros_like(weight),
            None if bias is None else torch.zeros_like(bias),
        )


class Reader:
    """One buffer "c v" through which chunks of tokens go.

    :meth:`read` leaves its probabilities there, :meth:`differentiate` makes gradients of them.
    """

    def __init__(self, head: Head, tokens: Tokens, chunk_size: int, *, spread: bool = False):
        self.head = head
        self.dtype = head.wide(tokens.hidden)
        self.size = rows = min(chunk_size, max(1, len(tokens)))

        def buffer() -> Tensor:
            return head.weight.new_empty(rows, len(head.weight), dtype=self.dtype)

        self._buffer = buffer()
        # 1 − tanh², where the logits are capped
        self._slope = buffer() if head.softcap is not None else None
        self._surprisal = buffer() if spread else None
        self._native = (
            WIDE_OUTPUT and head.weight.device.type == "cuda" and self.dtype == torch.float32
            and head.weight.dtype == tokens.hidden.dtype in (torch.bfloat16, torch.float16)
        )
        # bfloat16 has the range for any coefficient; float16 has not
        narrow = self._native and head.weight.dtype == torch.bfloat16
        self._operand = torch.bfloat16 if narrow else self.dtype
        width = head.weight.shape[1]
        self._rows = max(1, len(head.weight))
        self._upcast = None
        if head.weight.dtype != self.dtype and not self._native:
            self._rows = max(1, min(self._rows, BLOCK // max(1, width)))
            self._upcast = head.weight.new_empty(self._rows, width, dtype=self.dtype)

    def read(self, chunk: Tokens) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Log-probs "c" of the targets, and entropy and variance of the surprisal if asked for."""
        head, z = self.head, self._buffer[: len(chunk)]
        hidden = self._hidden = self._operands(chunk)
        for rows, weight in self._blocks():
            _product(hidden, weight.T, out=z[:, rows])
        if head.bias is not None:
            z += head.bias
        if head.head_dtype.itemsize < 4:
            z.copy_(z.to(head.head_dtype))
        if self._slope is not None and head.softcap is not None:
            slope = self._slope[: len(chunk)]
            z.div_(head.softcap).tanh_()
            torch.mul(z, z, out=slope).neg_().add_(1)
            z.mul_(head.softcap)
        if head.temperature != 1:
            z.div_(head.temperature)
        impossible = None if chunk.support is None else _restrict(z, chunk.support, head)
        target = _Entry.of(chunk.target, head)
        z.sub_(max_over(_largest(z), head.group))
        own = target.read(z)
        if impossible is not None:
            own.masked_fill_(impossible, -torch.inf)
        if self._surprisal is not None:
            surprisal = self._surprisal[: len(chunk)].copy_(z)
        z.exp_()
        # The sum less 1, taken without the target, has digits left where p is all but 1.
        target.write(z, torch.zeros_like(own))
        others = z.sum(1, keepdim=True)
        if head.group is not None:
            others, own = sum_over(torch.stack([others, own]), head.group)
        log_total = torch.log1p(others + torch.expm1(own))
        target.write(z, own.exp())
        z.div_(log_total.exp())
        log_probs = rearrange(own - log_total, "c 1 -> c")
        if self._surprisal is None:
            return log_probs, ()
        # −log p of each token of the vocabulary; what has probability 0 adds nothing
        surprisal.sub_(log_total).neg_().clamp_(max=torch.finfo(self.dtype).max ** 0.25)
        mean = sum_over(torch.linalg.vecdot(z, surprisal), head.group)
        surprisal.sub_(rearrange(mean, "c -> c 1"))
        variance = sum_over(torch.linalg.vecdot(z, surprisal.mul_(surprisal)), head.group)
        return log_probs, (mean, variance)

    def differentiate(
        self, chunk: Tokens, log_probs: Tensor, coefficient: Tensor, into: Gradients
    ) -> None:
        """Add Σ_i c_i ∂ log p_i of the chunk that was read last; what has c_i = 0 costs nothing.

        The probabilities are lost.

        Args:
            chunk: what was read.
            log_probs: "c", as read.
            coefficient: "c", the same to the last bit on all ranks that share the head.
            into: sums that grow; rows of ``hidden`` are set, for each token is read once.
        """
        # what the support excludes has no gradient; NaN is not hidden
        rows = (coefficient * (log_probs != -torch.inf)).nonzero().squeeze(-1)
        if not len(rows):
            return
        grad = self._compact(self._buffer, rows, len(chunk))
        slope = None if self._slope is None else self._compact(self._slope, rows, len(chunk))
        hidden = self._hidden if len(rows) == len(chunk) else self._hidden[rows]
        chunk, coefficient, log_probs = chunk[rows], coefficient[rows], log_probs[rows]
        scale = rearrange(coefficient / self.head.temperature, "c -> c 1")
        # 1 − p of the target itself: expm1 keeps its digits where p is near 1
        own = -torch.expm1(rearrange(log_probs, "c -> c 1")) * scale
        _Entry.of(chunk.target, self.head).write(grad.mul_(-scale), own)
        if slope is not None:
            grad.mul_(slope)
        if into.hidden is not None:
            sums = grad.new_zeros(len(grad), hidden.shape[1])
            for part, block in self._blocks():
                _accumulate(sums, grad[:, part].to(self._operand), block)
            here, places = chunk.here()
            into.hidden.index_copy_(0, places, sum_over(sums, self.head.group)[here])
        if into.bias is not None:
            into.bias.add_(grad.sum(0))
        if into.weight is not None:
            _accumulate(into.weight, grad.to(self._operand).T, hidden)

    def _operands(self, chunk: Tokens) -> Tensor:
        hidden = chunk.states()
        return hidden if self._native else hidden.to(self.dtype)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the dtype of the products: whole, or some rows at a time."""
        weight = self.head.weight.detach()
        for start in range(0, len(weight), self._rows):
            rows = slice(start, start + self._rows)
            block = weight[rows]
            yield rows, block if self._upcast is None else self._upcast[: len(block)].copy_(block)

    def _compact(self, buffer: Tensor, rows: Tensor, n: int) -> Tensor:
        """Move some rows, in order, to the front of the buffer."""
        if len(rows) < n:
            step = len(rows) if buffer.device.type == "cuda" else 8
            for start in range(0, len(rows), step):
                # a row never moves back, so nothing is overwritten before it is read
                part = rows[start : start + step]
                buffer[start : start + len(part)] = buffer[part]
        return buffer[: len(rows)]


class _Entry(NamedTuple):
    """One entry of each row of "c v": its target's, where that is among this rank's rows."""

    column: Tensor
    held: Tensor | None

    @classmethod
    def of(cls, target: Tensor, head: Head) -> _Entry:
        column = rearrange(target, "c -> c 1")
        if head.group is None:
            return cls(column, None)
        column = column - head.start
        last = len(head.weight) - 1
        return cls(column.clamp(0, max(last, 0)), (column >= 0) & (column <= last))

    def read(self, z: Tensor) -> Tensor:
        """"c 1"; 0 where another rank holds it."""
        if self.held is None:
            return z.gather(1, self.column)
        if not z.shape[1]:
            return z.new_zeros(self.column.shape)
        return torch.where(self.held, z.gather(1, self.column), 0)

    def write(self, z: Tensor, value: Tensor) -> None:
        if self.held is None:
            z.scatter_(1, self.column, value)
        elif z.shape[1]:
            z.scatter_(1, self.column, torch.where(self.held, value, z.gather(1, self.column)))


def _largest(z: Tensor) -> Tensor:
    return z.amax(1, keepdim=True) if z.shape[1] else z.new_full((len(z), 1), -torch.inf)


def log_probs_of(
    head: Head, tokens: Tokens, chunk_size: int, *, spread: bool = False
) -> tuple[Tensor, ...]:
    """Log-probs of the targets, in their shape, with gradient; entropy and variance if asked for.

    What does not count gets 0.
    """
    out: tuple[Tensor, ...] = _LinearLogProbs.apply(
        tokens.hidden, head.weight, head.bias, head, tokens, chunk_size, spread
    )  # type: ignore[no-untyped-call]
    return out


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, tokens: Tokens,
        chunk_size: int, spread: bool,
    ) -> tuple[Tensor, ...]:
        dtype = head.wide(hidden)
        out = [
            torch.zeros(tokens.shape, dtype=dtype, device=hidden.device)
            for _ in range(3 if spread else 1)
        ]
        with torch.autocast(hidden.device.type, enabled=False):
            reader = Reader(head, tokens, chunk_size, spread=spread)
            for _, chunk in tokens.chunks(chunk_size):
                log_probs, moments = reader.read(chunk)
                for x, values in zip(out, (log_probs, *moments), strict=True):
                    x.view(-1).index_copy_(0, chunk.index, values)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.tokens, ctx.chunk_size = head, tokens, chunk_size
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("linear_log_probs")
        hidden, weight, bias = ctx.saved_tensors
        head, every = ctx.head, ctx.tokens
        wanted = ctx.needs_input_grad
        with torch.autocast(hidden.device.type, enabled=False):
            into = Gradients.zeros(head, every, hidden=wanted[0], weight=wanted[1], bias=wanted[2])
            grad = first_over(grad.flatten()[every.index], head.group)
            rows = grad.nonzero().squeeze(-1)
            tokens, grad = every[rows], grad[rows]
            reader = Reader(head, tokens, ctx.chunk_size)
            for part, chunk in tokens.chunks(ctx.chunk_size):
                log_probs, _moments = reader.read(chunk)
                reader.differentiate(chunk, log_probs, grad[part], into)
        return (
            None if into.hidden is None else into.hidden.to(hidden.dtype),
            None if into.weight is None else into.weight.to(weight.dtype),
            None if into.bias is None else into.bias.to(bias.dtype),
            None, None, None, None,
        )


def check_first_order(caller: str) -> None:
    """Raise inside a backward that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{caller}: differentiating twice (create_graph=True) is not supported")


def _product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out.dtype, out=out)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b.to(total.dtype))
    else:
        total += torch.mm(a, b, total.dtype)


def _restrict(z: Tensor, support: Support, head: Head) -> Tensor:
    """Logits outside the support become −inf; rows without any kept id stay, and are returned."""
    counts, ids = support.offsets.diff(), support.ids
    row = torch.arange(len(z), device=z.device)
    row = row.repeat_interleave(counts, output_size=len(ids))
    if head.group is not None:
        ids = ids - head.start
        here = (ids >= 0) & (ids < z.shape[1])
        row, ids = row[here], ids[here]
    kept = z[row, ids]
    empty = rearrange(counts == 0, "c -> c 1")
    z.masked_fill_(~empty, -torch.inf)
    z[row, ids] = kept
    return empty


