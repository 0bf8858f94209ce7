"""Per-token log-probs from hidden states and the LM head; the logits of a batch never exist.

Chunks of tokens go through one reused buffer: logits in, probabilities and log-probs out, and
gradients from the probabilities while they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from iscorrect.errors import InputError, describe, input_error
from iscorrect.layout import Layout, as_layout
from iscorrect.logprobs import Support
from iscorrect.ranks import Group, first_over, max_over, objects_over, sum_over

T = TypeVar("T")

_Facts = tuple[int, dict[str, object]]

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
        chunk_size: tokens whose logits are held at a time; None: see :func:`default_chunk_size`.
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
class Head:
    """The LM head, or this rank's rows of it, and what happens to the logits.

    Attributes:
        weight: "v d".
        bias: "v", or None.
        group: the ranks that hold the other rows; None: nobody does.
        start: which row of the whole head is the first one here.
    """

    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None
    head_dtype: torch.dtype = torch.float32
    group: Group = None
    start: int = 0

    def wide(self, hidden: Tensor) -> torch.dtype:
        """What logits, sums and gradients are held in: float32 or wider."""
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        return torch.promote_types(torch.promote_types(dtype, self.head_dtype), torch.float32)

    def placed(self, start: int, vocabulary: int) -> Head:
        """These rows as those of the whole head from ``start`` on, padding left out."""
        kept = max(0, min(len(self.weight), vocabulary - start))
        if kept == len(self.weight):
            return replace(self, start=start)
        bias = None if self.bias is None else self.bias[:kept]
        return replace(self, weight=self.weight[:kept], bias=bias, start=start)

    def check(self, caller: str) -> None:
        """Raise unless weights, bias and numbers can be used."""
        if self.weight.ndim != 2 or not self.weight.is_floating_point():
            raise input_error(
                caller, "weight", expected="a floating-point matrix `v d`",
                got=describe(self.weight), fix="pass lm_head.weight",
            )
        vocabulary = len(self.weight)
        if self.bias is not None and self.bias.shape != (vocabulary,):
            raise input_error(
                caller, "bias", expected=f"of shape ({vocabulary},)", got=describe(self.bias),
                fix="pass lm_head.bias, or None where there is none",
            )
        for name, value in {"temperature": self.temperature, "softcap": self.softcap}.items():
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise input_error(
                    caller, name, expected="a number > 0", got=repr(value),
                    fix=f"pass {name} as the sampler and the model's config have it",
                )
        if not self.head_dtype.is_floating_point:
            raise input_error(
                caller, "head_dtype", expected="a floating-point dtype", got=str(self.head_dtype),
                fix="pass torch.float32",
            )


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens that count, one after the other.

    Attributes:
        hidden: "m d", of every token, counted or not, or of the part of them that is here.
        shape: of the target, "...".
        index: int "n", which of the target's positions count.
        target: int "n".
        support: what each may be, or None.
        part: which hidden states are here; None: all.
    """

    hidden: Tensor
    shape: torch.Size
    index: Tensor
    target: Tensor
    support: Support | None = None
    part: Part | None = None

    @classmethod
    def of(
        cls, caller: str, *, hidden: Tensor, target: Tensor, mask: Tensor | None,
        support: Tensor | Support | None, part: Part | None,
    ) -> Tokens:
        """Pick what counts; asks a GPU once how many tokens that is."""
        flat = target.flatten().long()
        if mask is None:
            index = torch.arange(flat.numel(), device=flat.device)
        else:
            index = mask.flatten().nonzero().squeeze(-1)
        if support is not None:
            support = _select(_as_rows(caller, support, target), index)
        states = hidden.reshape(-1, hidden.shape[-1])
        return cls(states, target.shape, index, flat[index], support, part)

    def check(self, caller: str, vocabulary: int) -> None:
        """Raise on a token id that the vocabulary does not have."""
        # On a GPU an index out of range ends in a device assertion; on a CPU a look is free.
        if self.target.device.type != "cpu":
            return
        kept = None if self.support is None else self.support.ids
        for name, ids in {"target": self.target, "support": kept}.items():
            if ids is None:
                continue
            outside = (ids < 0) | (ids >= vocabulary)
            if bool(outside.any()):
                raise input_error(
                    caller, name, expected=f"token ids in [0, {vocabulary}) where it counts",
                    got=str(ids[outside][0].item()),
                    fix="mask ignored positions, and give the head's full vocabulary",
                )

    def here(self) -> tuple[slice | Tensor, Tensor]:
        """The tokens whose hidden states are on this rank, and in which rows."""
        return (slice(None), self.index) if self.part is None else self.part.find(self.index)

    def states(self) -> Tensor:
        """"n d", the hidden states, from the ranks that hold them."""
        if self.part is None:
            return self.hidden.index_select(0, self.index)
        here, rows = self.here()
        states = self.hidden.new_zeros(len(self), self.hidden.shape[1])
        states[here] = self.hidden[rows]
        return sum_over(states, self.part.group)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice | Tensor) -> Tokens:
        support = self.support
        if support is not None:
            every = torch.arange(len(self), device=self.index.device)
            support = _select(support, every[part])
        return replace(self, index=self.index[part], target=self.target[part], support=support)

    def chunks(self, size: int) -> Iterator[tuple[slice, Tokens]]:
        """Parts of at most ``size`` tokens, each with its place."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield part, self[part]


class Part(NamedTuple):
    """Sequence parallelism: some of the columns of "... t", whose hidden states are here.

    Attributes:
        group: the ranks that hold the others.
        start: the first of these columns.
        width: how many.
        columns: t, of all ranks.
    """

    group: Group
    start: int
    width: int
    columns: int

    def find(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some positions are here, and in which rows of the hidden states."""
        column = index % self.columns - self.start
        here = (column >= 0) & (column < self.width)
        return here, (index // self.columns * self.width + column)[here]


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


def prepare(
    caller: str, *, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    temperature: float, softcap: float | None, chunk_size: int | None, head_dtype: torch.dtype,
    support: Tensor | Support | None, layout: Tensor | Layout | None, vocabulary_group: Group,
    vocabulary_size: int | None, sequence_parallel: bool, also: Callable[[], None] = lambda: None,
    **alike: object,
) -> tuple[Head, Tokens, int]:
    """The head, the tokens that count, and how many make a chunk, once all inputs are checked.

    The arguments are those of the caller. Where ranks share the head, ``also`` is checked on each
    before anything is sent, and ``alike`` has to be the same on all.
    """
    weight, bias, group = _as_shard(caller, weight, bias, vocabulary_group)
    head = Head(weight, bias, temperature, softcap, head_dtype, group)
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def check() -> tuple[Tokens, int]:
        head.check(caller)
        if vocabulary_size is not None and not _is_count(vocabulary_size):
            raise input_error(
                caller, "vocabulary_size", expected="an int > 0, or None",
                got=repr(vocabulary_size), fix="pass the size of the tokenizer's vocabulary",
            )
        mask = None if layout is None else as_layout(caller, layout).mask
        cut = ranks if sequence_parallel else 1
        _check_tokens(caller, head, hidden, target, mask, cut)
        part = None
        if cut > 1:
            width = hidden.shape[-2]
            part = Part(group, rank * width, width, ranks * width)
        tokens = Tokens.of(
            caller, hidden=hidden, target=target, mask=mask, support=support, part=part
        )
        also()
        return tokens, check_chunk_size(caller, chunk_size, tokens)

    def facts(checked: tuple[Tokens, int]) -> _Facts:
        tokens, size = checked
        wanted = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
        return len(weight), alike | {
            "target": f"{tuple(target.shape)}, {_fingerprint(tokens)}",
            "hidden": describe(hidden), "weight": f"{weight.dtype}, {weight.shape[1]} wide",
            "bias": bias is not None, "requires_grad": torch.is_grad_enabled() and wanted,
            "temperature": temperature, "softcap": softcap, "head_dtype": head_dtype,
            "chunk_size": size,
            "support": None if tokens.support is None else f"{len(tokens.support.ids)} ids",
            "vocabulary_size": vocabulary_size, "sequence_parallel": sequence_parallel,
        }

    if group is None:
        (tokens, size), rows = check(), [len(weight)]
    else:
        (tokens, size), rows = _unanimous(caller, group, check, facts)
    vocabulary = sum(rows) if vocabulary_size is None else vocabulary_size
    if vocabulary > sum(rows):
        raise input_error(
            caller, "vocabulary_size", expected=f"at most {sum(rows)}, the rows of the head",
            got=str(vocabulary), fix="pass the size of the tokenizer's vocabulary",
        )
    tokens.check(caller, vocabulary)
    start = sum(rows[:rank])
    return head.placed(start, vocabulary), tokens, size


def default_chunk_size(tokens: int, device: torch.device) -> int:
    """Tokens whose logits are held at a time: one in 32, so that memory stays in the background.

    At least 256 on a CPU and 1024 on a GPU, where smaller products waste the machine; at most 4096.

    >>> default_chunk_size(16384, torch.device("cpu"))
    512
    """
    return min(max(tokens // 32, 256 if device.type == "cpu" else 1024), 4096)


def check_chunk_size(caller: str, chunk_size: int | None, tokens: Tokens) -> int:
    """The chunk size given, or the default for None."""
    if chunk_size is None:
        return default_chunk_size(len(tokens), tokens.index.device)
    if not _is_count(chunk_size):
        raise input_error(
            caller, "chunk_size", expected="an int > 0, or None", got=repr(chunk_size),
            fix="leave it out, or pass chunk_size=256",
        )
    return chunk_size


def _is_count(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


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


def _as_rows(caller: str, support: Tensor | Support, target: Tensor) -> Support:
    if isinstance(support, Support):
        if support.offsets.shape != (target.numel() + 1,) or support.ids.ndim != 1:
            raise input_error(
                caller, "support", expected=f"ids `m` and offsets `{target.numel() + 1}`",
                got=f"ids {describe(support.ids)}, offsets {describe(support.offsets)}",
                fix="give one more offset than there are target positions",
            )
        return support
    if support.is_floating_point() or support.shape[:-1] != target.shape:
        raise input_error(
            caller, "support", expected=f"int {(*target.shape, 'k')}, −1 in unused places",
            got=describe(support), fix="pad the kept ids of each position with −1",
        )
    kept = support.reshape(target.numel(), support.shape[-1])
    used = kept >= 0
    return Support(kept[used], torch.nn.functional.pad(used.sum(1).cumsum(0), (1, 0)))


def _select(support: Support, index: Tensor) -> Support:
    """The rows of some positions."""
    lengths = support.offsets.diff()[index]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    shift = (support.offsets[:-1][index] - offsets[:-1]).repeat_interleave(lengths)
    places = torch.arange(len(shift), device=shift.device) + shift
    return Support(support.ids[places], offsets)


def _check_tokens(
    caller: str, head: Head, hidden: Tensor, target: Tensor, mask: Tensor | None, cut: int
) -> None:
    width = head.weight.shape[1]
    if hasattr(hidden, "placements"):
        raise input_error(
            caller, "hidden", expected="a plain tensor", got=f"a DTensor {hidden.placements}",
            fix="pass hidden.to_local(), with sequence_parallel=True where tokens are sharded",
        )
    if not hidden.is_floating_point() or hidden.ndim < 2 or hidden.shape[-1] != width:
        raise input_error(
            caller, "hidden", expected=f"a floating-point tensor `... {width}`, wide as `weight`",
            got=describe(hidden), fix="pass the last hidden states, after the final norm",
        )
    if target.is_floating_point() or target.dtype == torch.bool:
        raise input_error(
            caller, "target", expected="an integer tensor `...`", got=describe(target),
            fix="pass token ids",
        )
    *rows, columns = hidden.shape[:-1]
    shape = (*rows, cut * columns)
    if target.shape != shape:
        hint = "pass one token id per position of the hidden states"
        if target.shape == (*rows, cut * columns + 1):
            hint = "hidden states at t predict token t + 1: pass target[..., 1:]"
        elif cut > 1:
            hint = f"pass the targets of all {cut} ranks, padded so that each holds as many"
        elif target.shape[:-1] == hidden.shape[:-2] and head.group is not None:
            hint = "pass sequence_parallel=True where ranks hold the hidden states of some tokens"
        raise input_error(
            caller, "target", expected=f"of shape {shape}", got=describe(target), fix=hint,
        )
    if mask is not None and mask.shape != target.shape:
        raise input_error(
            caller, "layout", expected=f"of shape {tuple(target.shape)} like `target`",
            got=describe(mask), fix="pass the mask of the same tokens",
        )
    for name, x in {"weight": head.weight, "target": target, "bias": head.bias}.items():
        if x is not None and x.device != hidden.device:
            raise input_error(
                caller, name, expected=f"on {hidden.device} like `hidden`", got=str(x.device),
                fix=f"pass {name}.to(hidden.device)",
            )


def _as_shard(
    caller: str, weight: Any, bias: Any, group: Group
) -> tuple[Tensor, Tensor | None, Group]:
    """A rank's rows as plain tensors, and the group that holds the others, if any does."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise input_error(
            caller, "vocabulary_group", expected="a process group that this rank is in, or None",
            got=repr(group), fix="pass mesh['tp'].get_group()",
        )
    if hasattr(weight, "placements"):
        mesh, placements = weight.device_mesh, weight.placements
        if mesh.ndim != 1 or not placements[0].is_shard(0):
            raise input_error(
                caller, "weight", expected="whole, or a DTensor with Shard(0) on a 1-D mesh",
                got=f"a DTensor with {placements} on {mesh}",
                fix="shard lm_head.weight over the tensor-parallel mesh alone; under FSDP make this"
                " call inside forward, where data-parallel shards are gathered",
            )
        if group is not None:
            raise input_error(
                caller, "vocabulary_group", expected="None where `weight` is a DTensor",
                got="a process group", fix="leave it out: the group is that of the DTensor's mesh",
            )
        group, weight = mesh.get_group(), weight.to_local()
        if hasattr(bias, "placements"):
            if (bias.device_mesh, bias.placements) != (mesh, placements):
                raise input_error(
                    caller, "bias", expected="sharded like `weight`",
                    got=f"a DTensor with {bias.placements} on {bias.device_mesh}",
                    fix="shard lm_head.bias with Shard(0) on the same mesh",
                )
            bias = bias.to_local()
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    return weight, bias, group


def _unanimous(
    caller: str, group: Group, check: Callable[[], T], facts: Callable[[T], _Facts]
) -> tuple[T, list[int]]:
    """What a check returns, and the rows on each rank, once all ranks have passed theirs.

    All raise where one does or where other facts differ, before anything else is sent.
    """
    try:
        checked = check()
        mine = facts(checked)
    except InputError as error:
        objects_over((0, {"error": str(error)}), group)
        raise
    every = objects_over(mine, group)
    for rank, (_, theirs) in enumerate(every):
        if "error" in theirs:
            raise input_error(
                caller, "vocabulary_group", expected="ranks that all accept their own input",
                got=f"from rank {rank} of the group: {theirs['error']}", fix="see that rank",
            )
    first = every[0][1]
    for rank, (_, theirs) in enumerate(every):
        for name, value in first.items():
            if theirs[name] != value:
                raise input_error(
                    caller, name, expected="the same on all ranks of vocabulary_group",
                    got=f"{value} on the first and {theirs[name]} on rank {rank}",
                    fix="give them the same tokens and settings; only the rows of the head differ",
                )
    return checked, [rows for rows, _ in every]


def _fingerprint(tokens: Tokens) -> str:
    """Enough to tell that ranks do not hold the same tokens."""
    mixed = ((tokens.target + 1) * (tokens.index + 1)).sum()
    return f"{len(tokens)} of them counted, checksum {int(mixed)}"
