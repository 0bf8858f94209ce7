"""What is taken from a reward: its prompt's mean, half of it, or what a critic expects."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, silu

from benchmarks.lab.chain.policy import Parameters
from iscorrect import group_advantages

RATE, UPDATES, WIDTH = 1e-2, 2, 32
"""Of Adam, how often it looks at each batch, and units of a network of one layer."""


def beyond_the_mean(rewards: Tensor) -> Tensor:
    """What each sequence earned beyond the mean of its prompt's; "p n" -> "(p n)"."""
    prompts, answers = rewards.shape
    group = torch.arange(prompts).repeat_interleave(answers)
    return group_advantages(rewards.flatten(), group, estimator="dr-grpo")


def beyond_half(rewards: Tensor) -> Tensor:
    """What it earned beyond half of that mean; "p n" -> "(p n)"."""
    return (rewards - rewards.mean(1, keepdim=True) / 2).flatten()


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

    def beyond(self, contexts: tuple[Tensor, ...], rewards: Tensor) -> Tensor:
        """What each token's sequence earned beyond what was expected; it then learns from them.

        Args:
            contexts: of tokens, "(p n) t …".
            rewards: float64 "p n".

        Returns:
            "(p n) t".
        """
        rewards = rewards.flatten()
        with torch.no_grad():
            expected = self.network(self.weights, *contexts)[..., 0].sigmoid().double()
        for _ in range(UPDATES):
            logits = self.network(self.weights, *contexts)[..., 0]
            target = rewards[:, None].expand_as(logits).to(logits.dtype)
            self.optimizer.zero_grad()
            binary_cross_entropy_with_logits(logits, target).backward()
            self.optimizer.step()
        return rewards[:, None] - expected
