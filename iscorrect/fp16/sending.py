"""What to round weights with where they are sent to an engine, so that small updates arrive."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from iscorrect.errors import check_number, describe, input_error
from iscorrect.fp16.arrival import check_scaling

BITS = {2: (torch.int16, 0x7FFF), 1: (torch.uint8, 0x7F)}
"""By bytes of a dtype: the integers that its numbers are read as, and the bits of a magnitude."""


def stochastic_round(
    x: Tensor, dtype: torch.dtype, *, generator: torch.Generator | None = None
) -> Tensor:
    """Round to one of the two neighbours in ``dtype``, at random, so that the mean is ``x``.

        P(hi) = (x − lo) / (hi − lo),  lo ≤ x ≤ hi neighbours in ``dtype``

    An update of the hundredth part of a step of the grid changes one entry of a hundred, and so
    arrives on average, where rounding to nearest may lose all of it. The price is noise: a variance
    of at most (hi − lo)² / 4, between one and three times that of rounding to nearest where x lies
    anywhere.

    :func:`stochastic_round_weights` does it to a whole model, alike on all ranks. Behind a trainer
    that rounds its own weights to nearest before it computes, as mixed precision and autocast do,
    the engine then has what the trainer does not compute with, and the mismatch grows:
    :func:`iscorrect.round_after_step` lets such a trainer compute with what it sends.

    Args:
        x: float32 or wider, of any shape; the trainer's weights.
        dtype: of the engine: 16-bit or FP8.
        generator: of the draws, on x's device; torch's own if None.

    Returns:
        In ``dtype``. Exact numbers of it stay; what is not finite, or beyond its range, becomes
        what ``x.to(dtype)`` makes of it.

    Raises:
        InputError: x, dtype or generator is of another kind.

    References:
        Gupta et al., arXiv 1502.02551: stochastic rounding in training.

    >>> x = torch.full((10000,), 1 + 2**-10)  # an eighth of the way from 1 to the next in BF16
    >>> x.bfloat16().mean(dtype=torch.float32).item()
    1.0
    >>> sent = stochastic_round(x, torch.bfloat16, generator=torch.Generator().manual_seed(0))
    >>> sorted({*sent.tolist()}), round(float((sent.float() - 1).mean() * 2**10), 1)
    ([1.0, 1.0078125], 1.0)
    """
    check_sent("stochastic_round", x, dtype)
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise input_error(
            "stochastic_round", "generator", expected="a torch.Generator, or None",
            got=describe(generator), fix="pass torch.Generator(x.device).manual_seed(0)",
        )
    at_once = ROUNDED_AT_ONCE if x.device.type == "cpu" else ROUNDED_AT_ONCE_ELSEWHERE
    pieces = torch.split(x.detach().reshape(-1), at_once)
    rounded = [_round_flat(piece, dtype, generator) for piece in pieces]
    return torch.cat(rounded).reshape(x.shape)


ROUNDED_AT_ONCE = 2**18  # entries, which stay in a processor's cache
ROUNDED_AT_ONCE_ELSEWHERE = 2**24  # a device works longer on so many than its host takes to ask


def _round_flat(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    low, high, up = neighbours(x, dtype)
    draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    # draws are multiples of 2⁻²⁴, as are the probabilities but for those below FP16's normal range
    return _where(draw < up, high, low)


def check_sent(caller: str, x: object, dtype: object) -> None:
    """Raise unless x are a trainer's weights and dtype is an engine's."""
    check_scaling(caller, dtype, "none")
    if hasattr(x, "full_tensor"):
        raise input_error(
            caller, "x", expected="a plain tensor", got="a DTensor",
            fix="pass x.full_tensor(), on all ranks, or take stochastic_round_weights",
        )
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.element_size() >= 4):
        raise input_error(
            caller, "x", expected="a tensor of float32 or wider", got=describe(x),
            fix="pass the trainer's float32 weights",
        )


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of a dtype next to x, toward 0 and away from it, and P(away from it).

    >>> low, high, up = neighbours(torch.tensor([1.25, -1.0]), torch.float8_e5m2)
    >>> low.tolist(), high.tolist(), up.tolist()
    ([1.25, -1.0], [1.25, -1.0], [0.0, 0.0])
    >>> low, high, up = neighbours(torch.tensor([1.1875]), torch.float8_e5m2)
    >>> low.tolist(), high.tolist(), up.tolist()
    ([1.0], [1.25], [0.75])
    """
    integers, magnitude = BITS[dtype.itemsize]
    size = x.abs()
    nearest = size.to(dtype)
    inside = nearest.to(x.dtype).isfinite() & (size <= torch.finfo(dtype).max)
    bits = nearest.view(integers)
    step = torch.ones_like(bits)
    low = torch.where(inside & (nearest.to(x.dtype) > size), bits - step, bits)
    exact = low.view(dtype).to(x.dtype) == size
    high = torch.where(inside & ~exact & (low < magnitude), low + step, low)
    a, b = (part.view(dtype).to(x.dtype) for part in (low, high))
    up = torch.where(b > a, (size - a) / torch.where(b > a, b - a, 1), 0)
    one_zero = "fnuz" in str(dtype)  # where the bits of −0 stand for NaN

    def signed(part: Tensor) -> Tensor:
        negative = x.signbit() & (part != 0) if one_zero else x.signbit()
        with_sign = torch.where(negative, part | ~torch.full_like(part, magnitude), part)
        return torch.where(inside, with_sign, x.to(dtype).view(integers)).view(dtype)

    return signed(low), signed(high), up.to(torch.float32)


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``torch.where``, also of FP8, by the bits."""
    integers, _ = BITS[a.dtype.itemsize]
    return torch.where(condition, a.view(integers), b.view(integers)).view(a.dtype)


def stochastic_round_weights(
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], dtype: torch.dtype, *,
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Round a trainer's weights stochastically on their way to an engine.

        name, w  →  name, stochastic_round(w, dtype), with draws of seed and name

    Ranks that hold copies of a tensor send copies, and an entry meets the same draw at every send:
    it changes once as it passes its own threshold, and what did not change is sent as it was. For
    new draws pass another seed, on all ranks the same.

    Args:
        weights: names and whole tensors, as trainers hand them to their engine's loader, or a
            state dict; a DTensor is made whole when it is come to, so all its ranks have to come
            to it. Tensors of 16 bits are widened; those of ``dtype`` or of integers pass as they
            are.
        dtype: of the engine: 16-bit or FP8.
        seed: of the draws.

    Raises:
        InputError: at the call, a dtype or seed of another kind; for a pair, what is no tensor.

    >>> sent = dict(stochastic_round_weights([("w", torch.full((1000,), 1.001))], torch.bfloat16))
    >>> sent["w"].dtype, sorted({*sent["w"].tolist()})
    (torch.bfloat16, [1.0, 1.0078125])
    """
    check_scaling("stochastic_round_weights", dtype, "none")
    check_number(
        "stochastic_round_weights", "seed", seed, "of the draws", whole=True,
        fix="pass seed as an int, on all ranks the same",
    )

    if not isinstance(weights, Iterable) or isinstance(weights, (str, Tensor)):
        raise input_error(
            "stochastic_round_weights", "weights", expected="pairs of a name and a tensor",
            got=describe(weights), fix="pass model.named_parameters()",
        )

    def rounded(name: str, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise input_error(
                "stochastic_round_weights", "weights", expected="pairs of a name and a tensor",
                got=f"{describe(x)} under {name!r}", fix="pass model.named_parameters()",
            )
        if hasattr(x, "full_tensor"):
            x = x.full_tensor()
        if x.dtype == dtype or not x.is_floating_point():
            return x
        wide = x if x.element_size() >= 4 else x.float()
        draws = zlib.crc32(f"{seed} {name}".encode())
        generator = torch.Generator(x.device).manual_seed(draws)
        return stochastic_round(wide, dtype, generator=generator)

    pairs = weights.items() if isinstance(weights, Mapping) else weights
    return ((name, rounded(name, x)) for name, x in pairs)


class Sent(NamedTuple):
    """What :func:`round_with_feedback` gives.

    Attributes:
        weights: for the engine, in its dtype.
        rest: what rounding took, for the next send; in x's dtype.
    """

    weights: Tensor
    rest: Tensor


def round_with_feedback(x: Tensor, dtype: torch.dtype, rest: Tensor | None = None) -> Sent:
    """Round to nearest, with what rounding took the last time added first.

        sent_k = Q(x_k + rest_{k−1}),  rest_k = x_k + rest_{k−1} − sent_k

    so that Σ sent_k = Σ x_k + rest_0 − rest_K up to float32's own rounding: over several sends the
    engine's mean weights are the trainer's. Any one send is off by up to a whole step of the grid,
    where rounding to nearest is by half of one, and entries with like rests are off in the same
    direction: the first sends lose an update or overshoot it, where :func:`stochastic_round` does
    neither. The rests are as large as the model.

    Args:
        x: float32 or wider, of any shape; the trainer's weights.
        dtype: of the engine: 16-bit or FP8.
        rest: of the last send of the same tensor; None for none.

    Raises:
        InputError: x or dtype is of another kind, or ``rest`` no tensor of x's shape.

    References:
        Seide et al., 1-bit stochastic gradient descent, Interspeech 2014: error feedback.

    >>> x, rest = torch.tensor([1 + 2**-9]), None  # a quarter of the way to the next in BF16
    >>> for _ in range(4):
    ...     sent, rest = round_with_feedback(x, torch.bfloat16, rest)
    ...     print(sent.item(), rest.item() * 2**9)
    1.0 1.0
    1.0 2.0
    1.0078125 -1.0
    1.0 0.0
    """
    check_sent("round_with_feedback", x, dtype)
    if not (rest is None or (isinstance(rest, Tensor) and rest.shape == x.shape)):
        raise input_error(
            "round_with_feedback", "rest", expected=f"of shape {tuple(x.shape)} like `x`",
            got=describe(rest), fix="pass .rest of what the same tensor's last send gave",
        )
    if rest is not None and rest.device != x.device:
        raise input_error(
            "round_with_feedback", "rest", expected=f"on {x.device} like `x`",
            got=f"on {rest.device}", fix="pass rest.to(x.device)",
        )
    wanted = x.detach() if rest is None else x.detach() + rest
    sent = wanted.to(dtype)
    back = sent.to(x.dtype)
    # an entry that the format cannot hold leaves no rest, which would stay NaN for ever
    return Sent(sent, (wanted - back).where(back.isfinite() & wanted.isfinite(), 0))
