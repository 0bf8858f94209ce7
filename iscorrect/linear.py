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

from iscorrect.errors import describe, input_error
from iscorrect.layout import Layout, as_layout
from iscorrect.logprobs import Support

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
) -> Tensor: ...
@overload
def linear_log_probs(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., chunk_size: int | None = ...,
    head_dtype: torch.dtype = ..., support: Tensor | Support | None = ...,
    entropy: Literal[True], layout: Tensor | Layout | None = ...,
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
) -> Tensor | HeadOutput:
    """Log-prob of each target token under a linear head, without the "... v" logits.

        log π(y) = z_y − log Σ_{v ∈ S} exp(z_v),  z = c tanh((h Wᵀ + b)/c)/τ

    The backward pass computes the logits once more, and only for tokens whose log-prob has a
    gradient that is not zero.

    Args:
        hidden: "... d", with gradient.
        weight: "v d", with gradient.
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

    Returns:
        "...", nats, ≤ 0, float32 or wider. −inf where the target is not in its support.

    Raises:
        InputError: shapes or devices do not fit, or a number is not positive.
        RuntimeError: on differentiating twice.

    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(4, 8)
    >>> linear_log_probs(hidden, weight, torch.zeros(2, 3, dtype=torch.int64))[0]
    tensor([-1.3863, -1.3863, -1.3863])
    """
    mask = None if layout is None else as_layout("linear_log_probs", layout).mask
    head = Head(weight, bias, temperature, softcap, head_dtype)
    tokens = Tokens.of(
        "linear_log_probs", head, hidden=hidden, target=target, mask=mask, support=support
    )
    chunk_size = check_chunk_size("linear_log_probs", chunk_size, tokens)
    chosen, spread = _LinearLogProbs.apply(
        tokens.hidden, weight, bias, head, tokens, chunk_size, entropy
    )  # type: ignore[no-untyped-call]

    def scatter(x: Tensor) -> Tensor:
        if mask is None:
            return x.view(target.shape)
        return x.new_zeros(target.numel()).index_copy(0, tokens.index, x).view(target.shape)

    if not entropy:
        return scatter(chosen)
    return HeadOutput(scatter(chosen), scatter(spread[0]), scatter(spread[1]))


@dataclass(frozen=True, eq=False)
class Head:
    """The LM head: weights and what happens to their logits."""

    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None
    head_dtype: torch.dtype = torch.float32

    def wide(self, hidden: Tensor) -> torch.dtype:
        """What logits, sums and gradients are held in: float32 or wider."""
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        return torch.promote_types(torch.promote_types(dtype, self.head_dtype), torch.float32)

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
        hidden: "m d", of every token, counted or not.
        index: int "n", where the counted ones are in ``hidden``.
        target: int "n".
        support: what each may be, or None.
    """

    hidden: Tensor
    index: Tensor
    target: Tensor
    support: Support | None = None

    @classmethod
    def of(
        cls, caller: str, head: Head, *, hidden: Tensor, target: Tensor, mask: Tensor | None,
        support: Tensor | Support | None,
    ) -> Tokens:
        """Check the inputs and pick what counts; asks a GPU once how many tokens that is."""
        head.check(caller)
        _check_tokens(caller, head, hidden, target, mask)
        flat = target.flatten().long()
        if mask is None:
            index = torch.arange(flat.numel(), device=flat.device)
        else:
            index = mask.flatten().nonzero().squeeze(-1)
        tokens = cls(hidden.reshape(-1, hidden.shape[-1]), index, flat[index])
        vocabulary = len(head.weight)
        # On a GPU an index out of range ends in a device assertion; on a CPU a look is free.
        if flat.device.type == "cpu":
            outside = (tokens.target < 0) | (tokens.target >= vocabulary)
            if bool(outside.any()):
                bad = tokens.target[outside][0].item()
                raise input_error(
                    caller, "target", expected=f"token ids in [0, {vocabulary}) where it counts",
                    got=str(bad), fix="mask ignored positions, and give the head's full vocabulary",
                )
        if support is None:
            return tokens
        rows = _as_rows(caller, support, target)
        return cls(tokens.hidden, index, tokens.target, _select(rows, index))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice | Tensor) -> Tokens:
        support = self.support
        if support is not None:
            every = torch.arange(len(self), device=self.index.device)
            support = _select(support, every[part])
        return Tokens(self.hidden, self.index[part], self.target[part], support)

    def chunks(self, size: int) -> Iterator[tuple[slice, Tokens]]:
        """Parts of at most ``size`` tokens, each with its place."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield part, self[part]


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
        self._rows = len(head.weight)
        self._upcast = None
        if head.weight.dtype != self.dtype and not self._native:
            self._rows = max(1, min(self._rows, BLOCK // max(1, width)))
            self._upcast = head.weight.new_empty(self._rows, width, dtype=self.dtype)

    def read(self, chunk: Tokens) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Log-probs "c" of the targets, and entropy and variance of the surprisal if asked for."""
        head, z = self.head, self._buffer[: len(chunk)]
        hidden = self._hidden(chunk)
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
        impossible = None if chunk.support is None else _restrict(z, chunk.support)
        index = rearrange(chunk.target, "c -> c 1")
        chosen = z.gather(1, index)
        if impossible is not None:
            chosen.masked_fill_(impossible, -torch.inf)
        largest = z.amax(1, keepdim=True)
        z.sub_(largest)
        if self._surprisal is not None:
            surprisal = self._surprisal[: len(chunk)].copy_(z)
        z.exp_()
        # The sum less 1, taken without the target, has digits left where p is all but 1.
        own = chosen - largest
        z.scatter_(1, index, 0)
        log_total = torch.log1p(z.sum(1, keepdim=True) + torch.expm1(own))
        z.scatter_(1, index, own.exp())
        z.div_(log_total.exp())
        log_probs = rearrange(own - log_total, "c 1 -> c")
        if self._surprisal is None:
            return log_probs, None
        # −log p of each token of the vocabulary; what has probability 0 adds nothing
        surprisal.sub_(log_total).neg_().clamp_(max=torch.finfo(self.dtype).max ** 0.25)
        mean = torch.linalg.vecdot(z, surprisal)
        surprisal.sub_(rearrange(mean, "c -> c 1"))
        return log_probs, (mean, torch.linalg.vecdot(z, surprisal.mul_(surprisal)))

    def differentiate(
        self, chunk: Tokens, log_probs: Tensor, coefficient: Tensor, into: Gradients
    ) -> None:
        """Add Σ_i c_i ∂ log p_i of the chunk that was read last; what has c_i = 0 costs nothing.

        The probabilities are lost.

        Args:
            chunk: what was read.
            log_probs: "c", as read.
            coefficient: "c".
            into: sums that grow; rows of ``hidden`` are set, for each token is read once.
        """
        # what the support excludes has no gradient; NaN is not hidden
        rows = (coefficient * (log_probs != -torch.inf)).nonzero().squeeze(-1)
        if not len(rows):
            return
        grad = self._compact(self._buffer, rows, len(chunk))
        chunk, coefficient, log_probs = chunk[rows], coefficient[rows], log_probs[rows]
        scale = rearrange(coefficient / self.head.temperature, "c -> c 1")
        # 1 − p of the target itself: expm1 keeps its digits where p is near 1
        own = -torch.expm1(rearrange(log_probs, "c -> c 1")) * scale
        grad.mul_(-scale).scatter_(1, rearrange(chunk.target, "c -> c 1"), own)
        if self._slope is not None:
            grad.mul_(self._compact(self._slope, rows, len(grad)))
        hidden = self._hidden(chunk)
        if into.hidden is not None:
            sums = grad.new_zeros(len(grad), hidden.shape[1])
            for part, block in self._blocks():
                _accumulate(sums, grad[:, part].to(self._operand), block)
            into.hidden.index_copy_(0, chunk.index, sums)
        if into.bias is not None:
            into.bias.add_(grad.sum(0))
        if into.weight is not None:
            _accumulate(into.weight, grad.to(self._operand).T, hidden)

    def _hidden(self, chunk: Tokens) -> Tensor:
        hidden = chunk.hidden.index_select(0, chunk.index)
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


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, tokens: Tokens,
        chunk_size: int, spread: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = head.wide(hidden)
        log_probs = torch.empty(len(tokens), dtype=dtype, device=hidden.device)
        moments = torch.empty(2 if spread else 0, len(tokens), dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            reader = Reader(head, tokens, chunk_size, spread=spread)
            for part, chunk in tokens.chunks(chunk_size):
                log_probs[part], more = reader.read(chunk)
                if more is not None:
                    moments[0, part], moments[1, part] = more
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.tokens, ctx.chunk_size = head, tokens, chunk_size
        ctx.mark_non_differentiable(moments)
        return log_probs, moments

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("linear_log_probs")
        hidden, weight, bias = ctx.saved_tensors
        head, every = ctx.head, ctx.tokens
        wanted = ctx.needs_input_grad
        with torch.autocast(hidden.device.type, enabled=False):
            into = Gradients.zeros(head, every, hidden=wanted[0], weight=wanted[1], bias=wanted[2])
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
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise input_error(
            caller, "chunk_size", expected="an int > 0, or None", got=repr(chunk_size),
            fix="leave it out, or pass chunk_size=256",
        )
    return chunk_size


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


def _restrict(z: Tensor, support: Support) -> Tensor:
    """Logits outside the support become −inf; rows without any kept id stay, and are returned."""
    counts = support.offsets.diff()
    row = torch.arange(len(z), device=z.device)
    row = row.repeat_interleave(counts, output_size=len(support.ids))
    kept = z[row, support.ids]
    empty = rearrange(counts == 0, "c -> c 1")
    z.masked_fill_(~empty, -torch.inf)
    z[row, support.ids] = kept
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
    kept = support.reshape(target.numel(), -1)
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
    caller: str, head: Head, hidden: Tensor, target: Tensor, mask: Tensor | None
) -> None:
    width = head.weight.shape[1]
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
    if target.shape != hidden.shape[:-1]:
        hint = "pass one token id per position of the hidden states"
        if target.shape[:-1] == hidden.shape[:-2] and target.shape[-1] == hidden.shape[-2] + 1:
            hint = "hidden states at t predict token t + 1: pass target[..., 1:]"
        raise input_error(
            caller, "target", expected=f"of shape {tuple(hidden.shape[:-1])}",
            got=describe(target), fix=hint,
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
