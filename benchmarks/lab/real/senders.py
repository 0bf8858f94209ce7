"""What an engine gets of its trainer's weights, send after send."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from iscorrect import round_with_feedback, stochastic_round

Weights = Mapping[str, Tensor]
Send = Callable[[str, Tensor], Tensor]
"""Of a name and the trainer's tensor, what the engine holds, as float32."""

EMBEDDING = "model.embed_tokens.weight"


def exact(name: str, x: Tensor) -> Tensor:
    return x


def nearest(name: str, x: Tensor, *, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()


def fraction(name: str, x: Tensor, *, bits: int) -> Tensor:
    """The nearest number with so many bits of fraction, and float32's range."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2.0 ** (bits + 1)), exponent - bits - 1)


def float32_head(name: str, x: Tensor) -> Tensor:
    """BF16, but for the embedding, which is the head."""
    return x if name == EMBEDDING else x.bfloat16().float()


def generator(*of: object) -> torch.Generator:
    """Draws of their own for whatever has a name."""
    return torch.Generator().manual_seed(zlib.crc32(repr(of).encode()))


class Stochastic:
    """Stochastic rounding, whose draws are a run's own."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self._dtype, self._running = dtype, generator("rounding", seed)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        return stochastic_round(x, self._dtype, generator=self._running).float()


class SameDraws:
    """Stochastic rounding with the same draws at every send."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self._dtype, self._seed = dtype, seed

    def __call__(self, name: str, x: Tensor) -> Tensor:
        own = generator("rounding", self._seed, name)
        return stochastic_round(x, self._dtype, generator=own).float()


class Feedback:
    """Rounding to nearest of the weights and the last send's rest."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        self._dtype = dtype
        self._rests: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        sent, self._rests[name] = round_with_feedback(x, self._dtype, self._rests.get(name))
        return sent.float()


def senders(seed: int) -> dict[str, Send]:
    """Every way to send in a run, by name, with no memory yet."""
    return {
        "bf16": partial(nearest, dtype=torch.bfloat16),
        "fp16": partial(nearest, dtype=torch.float16),
        "8 bits": partial(fraction, bits=8),
        "bf16, float32 head": float32_head,
        "bf16 stochastic": Stochastic(torch.bfloat16, seed),
        "bf16 stochastic, same draws": SameDraws(torch.bfloat16, seed),
        "bf16 feedback": Feedback(),
    }


@torch.no_grad()
def send(how: Send, weights: Weights, engine: nn.Module) -> Weights:
    """Let a module have the weights as they are sent; what it then holds."""
    held = dict(engine.named_parameters())
    for name, x in weights.items():
        held[name].copy_(how(name, x))
    return {name: held[name].detach() for name in weights}


def some(weights: Weights, entries: int = 2**22) -> dict[str, Tensor]:
    """The same sample of entries of each tensor every time, about so many in all."""
    share = min(1.0, entries / sum(x.numel() for x in weights.values()))
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, x in weights.items():
        places = torch.randint(x.numel(), (math.ceil(share * x.numel()),), generator=generator)
        found[name] = x.reshape(-1)[places]
    return found
