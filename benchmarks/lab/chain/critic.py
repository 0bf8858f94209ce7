"""What reward is to be expected at a context, learnt from the samples that a policy learns from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, silu

from benchmarks.lab.chain.policy import Parameters

RATE, UPDATES, WIDTH = 1e-2, 2, 32
"""Of Adam, how often it looks at each batch, and units of a network of one layer."""


def layer(inputs: int, generator: torch.Generator) -> Parameters:
    """Weights of a network of one hidden layer."""
    drawn = torch.randn(inputs, WIDTH, generator=generator) / math.sqrt(inputs)
    return {"in": drawn, "bias": torch.zeros(WIDTH), "head": torch.zeros(WIDTH, 1)}


def of_layer(weights: Mapping[str, Tensor], contexts: Tensor) -> Tensor:
    """Its logits; "… f" -> "… 1"."""
    return silu(contexts @ weights["in"] + weights["bias"]) @ weights["head"]


class Critic:
    """A network that learns the chance that a sequence is right, by cross-entropy.

    Args:
        weights: of the network; its head is set to 0, so that 1/2 is expected everywhere at first.
        network: weights and what describes contexts -> logits "… 1".
    """

    def __init__(self, weights: Parameters, network: Callable[..., Tensor]):
        self.network = network
        self.weights = {name: x.clone() for name, x in weights.items()}
        self.weights["head"].zero_()
        parameters = [x.requires_grad_() for x in self.weights.values()]
        self.optimizer = torch.optim.Adam(parameters, lr=RATE)

    def advantages(self, rewards: Tensor, *contexts: Tensor) -> Tensor:
        """What each token's sequence earned beyond what was expected; it then learns from them.

        Args:
            rewards: float64 "n".
            contexts: of tokens "n t …".
        """
        with torch.no_grad():
            expected = self.network(self.weights, *contexts)[..., 0].sigmoid().double()
        for _ in range(UPDATES):
            logits = self.network(self.weights, *contexts)[..., 0]
            target = rewards[:, None].expand_as(logits).to(logits.dtype)
            self.optimizer.zero_grad()
            binary_cross_entropy_with_logits(logits, target).backward()
            self.optimizer.step()
        return rewards[:, None] - expected
