"""What samples on the chain: by how, and how much, it differs from the policy that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.lab.chain.policy import logits, rounded_logits, to_bits, to_levels

Sampler = Callable[[Mapping[str, Tensor], Tensor, torch.Generator], Tensor]
"""Weights, features "… f" and random numbers -> logits "… v" that it samples from."""


@dataclass(frozen=True)
class Engine:
    """What samples.

    Attributes:
        sampler: gives the logits that it samples from; it reports their log-probs.
        behind: updates by which its weights are older than the trainer's.
        bits: of mantissa that the weights have on both sides; None: all.
    """

    sampler: Sampler
    behind: int = 0
    bits: int | None = None


def plain(weights: Mapping[str, Tensor], features: Tensor, _: torch.Generator) -> Tensor:
    """As the trainer computes."""
    return logits(weights, features)


def rounding(body: int | None, head: int | None, *, own_weights: int | None = None) -> Sampler:
    """Rounds activations, and its own copy of the weights."""

    def sampler(weights: Mapping[str, Tensor], features: Tensor, _: torch.Generator) -> Tensor:
        mine = {name: to_bits(x, own_weights) for name, x in weights.items()}
        return rounded_logits(mine, features, body=body, head=head)

    return sampler


def quantised(levels: int) -> Sampler:
    """Has weights at 2 ``levels`` + 1 levels a column."""
    return lambda weights, features, generator: plain(
        to_levels(weights, levels), features, generator
    )


def noisy(size: float) -> Sampler:
    """Adds normal noise of this size, in nats, to every logit, drawn anew each time."""

    def sampler(weights: Mapping[str, Tensor], features: Tensor, g: torch.Generator) -> Tensor:
        exact = logits(weights, features)
        return exact + size * torch.randn(exact.shape, generator=g)

    return sampler


def at_temperature(temperature: float) -> Sampler:
    """Samples at this temperature and reports so; the trainer scores at 1."""
    return lambda weights, features, _: logits(weights, features) / temperature


def top_p(share: float) -> Sampler:
    """Samples from the likeliest tokens that make up this share, and reports so, renormalised."""

    def sampler(weights: Mapping[str, Tensor], features: Tensor, _: torch.Generator) -> Tensor:
        exact = logits(weights, features)
        ordered, order = exact.softmax(-1).sort(-1, descending=True)
        cut = ordered.cumsum(-1) - ordered >= share
        return exact.masked_fill(cut.gather(-1, order.argsort(-1)), -torch.inf)

    return sampler


BITS = (10, 8, 7, 6, 5, 4)
LAGS = (1, 2, 4, 8, 16)

ENGINES: dict[str, Engine] = {
    "exact": Engine(plain),
    **{f"activations-{m}": Engine(rounding(m, m), bits=m) for m in BITS},
    **{f"weights-{m}": Engine(rounding(None, None, own_weights=m)) for m in BITS},
    **{f"both-{m}": Engine(rounding(m, m, own_weights=m)) for m in BITS},
    "body-7": Engine(rounding(7, None), bits=7),
    "head-7": Engine(rounding(None, 7), bits=7),
    "int8": Engine(quantised(127)), "int4": Engine(quantised(7)), "int3": Engine(quantised(3)),
    **{f"noise-{size:g}": Engine(noisy(size)) for size in (0.1, 0.3, 1.0)},
    **{f"behind-{lag}": Engine(plain, behind=lag) for lag in LAGS},
    **{f"temperature-{t:g}": Engine(at_temperature(t)) for t in (0.8, 1.1, 1.3)},
    "top-p-0.9": Engine(top_p(0.9)), "top-p-0.99": Engine(top_p(0.99)),
}
"""Engines by name. Bits are of mantissa: 10 is FP16, 7 is BF16. "activations": on both sides the
weights are rounded alike, and the engine alone rounds what it computes; "body" has an FP32 head,
"head" rounds its logits alone. "weights" and "both": the trainer keeps float32."""
