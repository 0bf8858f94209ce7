"""What an engine gets of its trainer's weights, send after send."""

from __future__ import annotations

import math
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


class Stochastic:
    """Stochastic rounding; with a seed, the same draws at every send."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, seed: int | None = None):
        self._dtype, self._seed = dtype, seed
        self._running = torch.Generator().manual_seed(0)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        generator = self._running
        if self._seed is not None:
            own = sum(name.encode()) * 31 + len(name) + self._seed
            generator = torch.Generator().manual_seed(own)
        return stochastic_round(x, self._dtype, generator=generator).float()


class Feedback:
    """Rounding to nearest of the weights and the last send's rest."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        self._dtype = dtype
        self._rests: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        sent, self._rests[name] = round_with_feedback(x, self._dtype, self._rests.get(name))
        return sent.float()


def senders() -> dict[str, Send]:
    """Every way to send, by name, with no memory yet."""
    return {
        "bf16": partial(nearest, dtype=torch.bfloat16),
        "fp16": partial(nearest, dtype=torch.float16),
        "8 bits": partial(fraction, bits=8),
        "bf16, float32 head": float32_head,
        "bf16 stochastic": Stochastic(),
        "bf16 stochastic, same draws": Stochastic(seed=0),
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
