"""Per-token log-probs from logits, over the whole vocabulary or over what the sampler kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.errors import check_flag, check_mask, check_number, describe, input_error
from iscorrect.gradients import differentiates_once
from iscorrect.head.support import Support, check_ids, check_support, check_target
from iscorrect.layout import masked

CPU_BLOCK, GPU_BLOCK = 1 << 19, 1 << 23
"""Logits that are upcast at a time, so that they stay in a cache."""


def log_probs_from_logits(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    support: Tensor | Support | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Log-prob of each target token.

        log π(y) = z_y/τ − log Σ_{v ∈ S} exp(z_v/τ)

    With top-p, top-k or min-p sampling and processed log-probs, the engine reports probabilities
    renormalised over the set S that it kept. A trainer that normalises over the whole vocabulary
    then sees every ratio too small by the kept mass; passing S removes that bias.

    Args:
        logits: "... v".
        target: int "...", in [0, v) where it counts.
        mask: bool "...", the tokens that count; targets elsewhere may be anything, such as −100.
            None: all.
        temperature: τ > 0, the sampler's.
        support: S, the kept ids, each once: int "... k" with −1 for unused places, or a
            :class:`Support`. None: the whole vocabulary.
        inplace_backward: let the backward pass write the gradient over the logits, for callers that
            do not read them again; otherwise it is the one copy of them that is made.

    Returns:
        "...", nats, ≤ 0, float32 or wider. −inf where the target is not in its support, 0 outside
        the mask.

    Raises:
        InputError: shapes differ, the target is not an integer, or the temperature is not positive;
            on a CPU also an id outside the vocabulary, whose log-prob is NaN elsewhere.
        RuntimeError: on differentiating twice.

    >>> log_probs_from_logits(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])
    >>> log_probs_from_logits(torch.zeros(1, 4), torch.tensor([3]), support=torch.tensor([[3, 1]]))
    tensor([-0.6931])
    """
    _check(logits, target, temperature, support)
    check_flag("log_probs_from_logits", "inplace_backward", inplace_backward)
    if mask is not None:
        _check_like_target(mask, target)
        counted = log_probs_from_logits(
            logits, torch.where(mask, target, 0), temperature=temperature,
            support=None if support is None else _where_counted(support, mask),
            inplace_backward=inplace_backward,
        )
        return masked(counted, mask)
    if support is not None and inplace_backward:
        raise input_error(
            "log_probs_from_logits", "inplace_backward", expected="False where a support is given",
            got="True", fix="leave it out",
        )
    vocabulary = logits.shape[-1]
    target = target.long()
    check_ids("log_probs_from_logits", "target", target, vocabulary)
    outside = (target < 0) | (target >= vocabulary)
    target = torch.where(outside, 0, target)
    return torch.where(
        outside, torch.nan, _log_probs(logits, target, temperature, support, inplace_backward)
    )


def _log_probs(
    logits: Tensor, target: Tensor, temperature: float, support: Tensor | Support | None,
    inplace_backward: bool,
) -> Tensor:
    if support is None and not torch.compiler.is_compiling():
        result: Tensor = _LogProbs.apply(logits, target, temperature, inplace_backward)  # type: ignore[no-untyped-call]
        return result
    wide = torch.promote_types(logits.dtype, torch.float32)
    if isinstance(support, Support):
        return _over_rows(logits, target, support, wide, temperature)
    if support is not None:
        return _over_padded(logits, target, support, wide, temperature)
    chosen = logits.gather(-1, rearrange(target, "... -> ... 1")).to(wide) / temperature
    normalizer = torch.logsumexp(logits.to(wide) / temperature, dim=-1)
    return rearrange(chosen, "... 1 -> ...") - normalizer


def _where_counted(support: Tensor | Support, mask: Tensor) -> Tensor | Support:
    """The same, and ids that any vocabulary has where the mask is False."""
    if isinstance(support, Support):
        lengths = support.offsets.diff()
        counted = mask.flatten().repeat_interleave(lengths, output_size=support.ids.numel())
        return support._replace(ids=torch.where(counted, support.ids, 0))
    return torch.where(rearrange(mask, "... -> ... 1"), support, -1)


def _check_like_target(mask: Tensor, target: Tensor) -> None:
    check_mask("log_probs_from_logits", mask)
    if mask.shape != target.shape:
        raise input_error(
            "log_probs_from_logits", "mask", got=describe(mask),
            expected=f"of shape {tuple(target.shape)} like `target`",
            fix="pass the mask of the target tokens",
        )


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, temperature: float, inplace: bool
    ) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_probs = torch.empty(target.numel(), dtype=wide, device=logits.device)
        normalizer = torch.empty_like(log_probs)
        scratch = _scratch(logits, wide)
        # a CPU is slow at mixed dtypes, a GPU at another pass over memory
        upcast = logits.device.type == "cpu" and logits.dtype != wide
        for rows, part in _blocks(logits):
            index = rearrange(target.flatten()[rows], "n -> n 1")
            z = scratch[: len(part)]
            read = z.copy_(part) if upcast else part
            largest = read.amax(-1, keepdim=True).to(wide)
            torch.sub(read, largest, out=z)
            if temperature != 1:
                z.div_(temperature)
            own = z.gather(-1, index)
            # The sum less 1, taken without the target, has digits left where p is all but 1.
            total = z.exp_().scatter_(-1, index, 0).sum(-1, keepdim=True)
            log_total = torch.log1p(total + torch.expm1(own))
            log_probs[rows] = rearrange(own - log_total, "n 1 -> n")
            normalizer[rows] = rearrange(largest + temperature * log_total, "n 1 -> n")
        ctx.save_for_backward(logits, target, log_probs, normalizer)
        ctx.temperature, ctx.inplace = temperature, inplace
        return log_probs.view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiates_once("log_probs_from_logits")
        logits, target, log_probs, normalizer = ctx.saved_tensors
        logits = logits.detach()
        fresh = None if ctx.inplace else torch.empty(
            target.numel(), logits.shape[-1], dtype=logits.dtype, device=logits.device
        )
        scratch = _scratch(logits, log_probs.dtype)
        for rows, part in _blocks(logits):
            scale = rearrange(grad.flatten()[rows] / ctx.temperature, "n -> n 1")
            z = scratch[: len(part)]
            torch.sub(part, rearrange(normalizer[rows], "n -> n 1"), out=z)
            if ctx.temperature != 1:
                z.div_(ctx.temperature)
            # rounded by the kernel that multiplies
            out = part if fresh is None else fresh[rows]
            torch.mul(z.exp_(), -scale, out=out)
            own = -torch.expm1(rearrange(log_probs[rows], "n -> n 1")) * scale
            out.scatter_(-1, rearrange(target.flatten()[rows], "n -> n 1"), own.to(out.dtype))
        return logits if fresh is None else fresh.view(logits.shape), None, None, None


def _scratch(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the rows of a block."""
    n = min(_step(logits), logits.numel() // max(1, logits.shape[-1]))
    return torch.empty(n, logits.shape[-1], dtype=dtype, device=logits.device)


def _step(logits: Tensor) -> int:
    block = CPU_BLOCK if logits.device.type == "cpu" else GPU_BLOCK
    return max(1, block // max(1, logits.shape[-1]))


def _blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Views "n v" of a few rows, in order, and which rows they are."""
    start, step = 0, _step(logits)
    for rows in _matrices(logits):
        for part in torch.split(rows, step):
            yield slice(start, start + len(part)), part
            start += len(part)


def _matrices(logits: Tensor) -> Iterator[Tensor]:
    """The logits as views "n v": one, or several where they are a slice of larger ones."""
    try:
        yield logits.view(-1, logits.shape[-1])
    except RuntimeError:
        for part in logits:
            yield from _matrices(part)


def _over_padded(
    logits: Tensor, target: Tensor, support: Tensor, wide: torch.dtype, temperature: float
) -> Tensor:
    own, vocabulary = rearrange(target, "... -> ... 1"), logits.shape[-1]
    check_ids("log_probs_from_logits", "support", support.clamp(min=0), vocabulary)
    # one gather for target and support: its gradient is one copy of the logits
    column = torch.cat([own, support.clamp(0, vocabulary - 1)], -1)
    both = logits.gather(-1, column).to(wide) / temperature
    chosen, kept = both[..., 0], torch.where(support >= 0, both[..., 1:], -torch.inf)
    kept = kept.masked_fill(support >= vocabulary, torch.nan)
    member = (support == own).any(-1)
    # a position without any kept id has no finite normaliser, nor a gradient
    kept = torch.where(rearrange(member, "... -> ... 1"), kept, 0)
    return torch.where(member, chosen - torch.logsumexp(kept, dim=-1), -torch.inf)


def _over_rows(
    logits: Tensor, target: Tensor, support: Support, wide: torch.dtype, temperature: float
) -> Tensor:
    ids, offsets = support
    n, own, vocabulary = target.numel(), target.flatten(), logits.shape[-1]
    every = torch.arange(n, device=ids.device)
    position = every.repeat_interleave(offsets.diff(), output_size=ids.numel())
    flat = logits.reshape(-1, vocabulary)
    check_ids("log_probs_from_logits", "support", ids, vocabulary)
    column = torch.cat([own, ids.clamp(0, vocabulary - 1)])
    both = flat[torch.cat([every, position]), column].to(wide) / temperature
    chosen, kept = both[:n], both[n:].masked_fill((ids < 0) | (ids >= vocabulary), torch.nan)
    with torch.no_grad():
        lowest = kept.new_full((n,), -torch.inf)
        largest = lowest.scatter_reduce(0, position, kept, "amax")
        largest = torch.where(largest.isfinite(), largest, 0)
    total = kept.new_zeros(n).scatter_add(0, position, (kept - largest[position]).exp())
    hit = (ids == own[position]).to(wide)
    member = kept.new_zeros(n).scatter_add(0, position, hit) > 0
    normalizer = torch.where(member, total, 1).log() + largest
    out = torch.where(member, chosen - normalizer, -torch.inf)
    return out.view(target.shape)


def _check(
    logits: Tensor, target: Tensor, temperature: float, support: Tensor | Support | None
) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim == 0:
        raise input_error(
            "log_probs_from_logits", "logits", expected="a floating-point tensor `... v`",
            got=describe(logits), fix="pass the model's logits",
        )
    check_target("log_probs_from_logits", target, logits.shape[:-1], of="logits")
    if support is not None:
        check_support("log_probs_from_logits", support, target)
    check_number(
        "log_probs_from_logits", "temperature", temperature, "the sampler's", above=0,
        fix="pass the sampler's temperature; greedy decoding has no log-probs to correct",
    )
