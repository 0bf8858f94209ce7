"""The policy of the chain: a residual network of some 10,000 parameters, and its rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.lab.chain.world import ERR, OK, World, ahead, features_of

Parameters = dict[str, Tensor]
WIDTH, HIDDEN, LAYERS = 32, 64, 2
OFFSET = 20.0
"""Added to logits before they are rounded: those of language models lie that far from 0."""


def untrained(world: World) -> Parameters:
    """Normal weights, from the task's seed."""
    generator = torch.Generator().manual_seed(world.task + 100)

    def drawn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(rows)

    layers = {
        f"{name}{i}": drawn(*shape) for i in range(LAYERS)
        for name, shape in (("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH)))
    }
    return {"in": drawn(world.width, WIDTH), **layers, "head": drawn(WIDTH, world.vocab)}


def logits(weights: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """In float32; "… f" -> "… v"."""
    x = features @ weights["in"]
    for i in range(LAYERS):
        x = x + functional.silu(normalised(x) @ weights[f"up{i}"]) @ weights[f"down{i}"]
    return normalised(x) @ weights["head"]


def rounded_logits(
    weights: Mapping[str, Tensor], features: Tensor, *, body: int | None, head: int | None
) -> Tensor:
    """The same with every product, norm and sum rounded.

    Args:
        weights: as they are.
        features: "… f".
        body: bits of mantissa up to the head's input; None: all that float32 has.
        head: bits of mantissa of the logits.
    """
    x = to_bits(to_bits(features, body) @ weights["in"], body)
    for i in range(LAYERS):
        up = to_bits(to_bits(normalised(x), body) @ weights[f"up{i}"], body)
        down = to_bits(to_bits(functional.silu(up), body) @ weights[f"down{i}"], body)
        x = to_bits(x + down, body)
    return to_bits(to_bits(normalised(x), body) @ weights["head"] + OFFSET, head)


def normalised(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def to_bits(x: Tensor, bits: int | None) -> Tensor:
    """Rounded to so many explicit bits of mantissa, as float32 (Veltkamp's splitting).

    >>> to_bits(torch.tensor([1.0 + 2**-8]), 7), to_bits(torch.tensor([1.0 + 2**-8]), 8)
    (tensor([1.]), tensor([1.0039]))
    """
    if bits is None:
        return x
    wide = x * float(2 ** (23 - bits) + 1)
    return wide - (wide - x)


def to_levels(weights: Mapping[str, Tensor], levels: int) -> Parameters:
    """Layers with weights at −levels, …, levels times a scale for each column, the rest alone."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(0, keepdim=True).clamp(min=1e-12) / levels
        return (x / scale).round() * scale

    return {
        name: x if name in ("in", "head") else rounded(x) for name, x in weights.items()
    }


def warm_start(world: World, *, reward: float = 0.5, steps: int = 1500) -> Parameters:
    """A policy that has learnt the task halfway, so that what kills a sequence is one rare token.

    It imitates right tokens, in ERR as in OK, and then its logits are scaled until J is ``reward``.
    """
    generator = torch.Generator().manual_seed(world.task + 200)
    weights = {name: x.requires_grad_() for name, x in untrained(world).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=3e-3)
    right = world.of_kind[OK].double() / world.right
    for step in range(steps):
        kind = torch.randint(world.kinds, (512,), generator=generator)
        state = torch.randint(ERR + 1, (512,), generator=generator)
        log_probs = logits(weights, features_of(world, kind, state, generator)).log_softmax(-1)
        optimizer.zero_grad()
        (-(right[kind] * log_probs).sum(-1).mean()).backward()
        for settings in optimizer.param_groups:
            settings["lr"] = 3e-3 * (1 - step / steps) + 1e-4
        optimizer.step()
    weights = {name: x.detach() for name, x in weights.items()}
    return scaled_to(world, weights, reward, generator)


def scaled_to(
    world: World, weights: Parameters, reward: float, generator: torch.Generator
) -> Parameters:
    """The head scaled so that J on eight draws of the features is ``reward``, by bisection."""
    raw = [logits(weights, world.features(generator)).double() for _ in range(8)]

    def reached(scale: float) -> float:
        each = [ahead(world, (scale * x).softmax(-1)).reward.mean() for x in raw]
        return torch.stack(each).mean().item()

    low, high = 0.1, 10.0
    if not reached(low) < reward < reached(high):
        raise ArithmeticError(
            f"no scale of the head between {low:g} and {high:g} gives J = {reward:g} at T = "
            f"{world.length}: give warm_start more steps"
        )
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if reached(middle) < reward else (low, middle)
    return {**weights, "head": weights["head"] * low}
