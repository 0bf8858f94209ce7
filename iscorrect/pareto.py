"""The upper tail of a sample of weights: its Pareto index, and its expected order statistics.

Everything has a size known from the shape alone, so nothing asks the device how long the tail is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SHORTEST_TAIL = 5


class Tail(NamedTuple):
    """The largest log-weights of a sample and the generalised Pareto distribution fitted to them.

    Attributes:
        k: "", the Pareto index; inf where the tail has fewer than five members or no spread. Below
            ½ the weights have a variance, below 1 a mean.
        positions: int "m", where the largest entries stand in the flattened sample, largest first.
        smoothed: "m", nats, the expected order statistics, largest first, never above the sample's
            maximum.
        members: bool "m", which of them belong to the tail.
    """

    k: Tensor
    positions: Tensor
    smoothed: Tensor
    members: Tensor


def pareto_tail(log_weights: Tensor, units: Tensor) -> Tail:
    """Fit a generalised Pareto distribution to the M = min(S/5, 3 √S) largest of S weights.

    Args:
        log_weights: "b t", nats.
        units: bool "b t", one token per unit; S counts them.

    Returns:
        The tail. Its index is trustworthy below min(1 − 1/log₁₀ S, 0.7).

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", JMLR 25 (2024).
        Zhang & Stephens, "A new and efficient estimation method for the generalized Pareto
        distribution", Technometrics 51(3), 2009, with the weak prior of the former.

    >>> torch.manual_seed(0).initial_seed()
    0
    >>> log_weights = -0.4 * torch.rand(1, 4000, dtype=torch.float64).log()
    >>> tail = pareto_tail(log_weights, torch.ones(1, 4000, dtype=torch.bool))
    >>> bool((tail.k - 0.4).abs() < 0.1)
    True
    """
    sample = torch.where(units, log_weights, -torch.inf).flatten().double()
    size = sample.numel()
    longest = int(min(size / 5, 3 * size**0.5))
    count = torch.count_nonzero(units).to(sample.dtype)
    length = torch.minimum(count / 5, 3 * count.sqrt()).floor()

    top = torch.topk(sample, min(longest + 1, size))
    if longest < 1 or size <= longest:
        none = torch.zeros_like(top.indices[:0], dtype=torch.bool)
        return Tail(sample.new_tensor(math.inf), top.indices[:0], top.values[:0], none)
    largest = top.values[0]
    relative = top.values - largest
    cutoff = relative.gather(0, length.long().view(1)).clamp(
        min=math.log(torch.finfo(torch.float64).tiny)
    )
    relative = relative[:longest]
    members = (torch.arange(longest, device=sample.device) < length) & (relative > cutoff)
    n = torch.count_nonzero(members).to(sample.dtype)
    excess = torch.where(members, relative.exp() - cutoff.exp(), 0)
    k, sigma = _fit(excess, members, n)

    rank = n - torch.arange(longest, device=sample.device) - 0.5  # of the excess, smallest first
    quantile = sigma * torch.expm1(-k * torch.log1p(-rank / n)) / k
    quantile = torch.where(k == 0, -sigma * torch.log1p(-rank / n), quantile)
    smoothed = (quantile + cutoff.exp()).log().clamp(max=0) + largest
    fitted = (n >= SHORTEST_TAIL) & k.isfinite() & (sigma > 0)
    return Tail(
        torch.where(fitted, k, torch.inf), top.indices[:longest], smoothed, members & fitted
    )


def _fit(excess: Tensor, members: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean of index and scale; ``excess`` falls, is ≥ 0, and is 0 outside ``members``."""
    prior_scale, prior_index, prior_weight = 3, 0.5, 10
    size = excess.numel()
    candidates = 30 + int(size**0.5)
    m = 30 + n.sqrt().floor()
    quartile = (n - (n / 4 + 0.5).floor()).long().clamp(min=0, max=size - 1)

    i = torch.arange(1, candidates + 1, device=excess.device, dtype=excess.dtype)
    b = (1 - (m / (i - 0.5)).sqrt()) / (prior_scale * excess.gather(0, quartile.view(1)))
    b = b + 1 / excess[0]
    index = torch.log1p(-b[:, None] * excess).sum(1) / n
    likelihood = n * ((-b / index).log() - index - 1)
    weight = torch.where(i <= m, likelihood, -torch.inf).softmax(0)
    weight = torch.where(weight >= 10 * torch.finfo(torch.float64).eps, weight, 0)
    b = (weight * torch.where(weight > 0, b, 0)).sum() / weight.sum()
    k = torch.log1p(-b * excess).sum() / n
    return (n * k + prior_weight * prior_index) / (n + prior_weight), -k / b
