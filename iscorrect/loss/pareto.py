"""The upper tail of a sample of weights: its Pareto index, and its expected order statistics.

Everything has a size known from the shape alone, so nothing asks the device how long the tail is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from iscorrect.errors import check_mask, check_per_token
from iscorrect.ranks import Group, accumulator, check_member, gather_over, objects_over, sum_over

SHORTEST_TAIL = 5


class Tail(NamedTuple):
    """The largest log-weights of a sample and the generalised Pareto distribution fitted to them.

    Attributes:
        k: "", the Pareto index; inf where the tail has fewer than five members or no spread. Below
            ½ the weights have a variance, below 1 a mean.
        positions: int "m", where the largest entries stand in the flattened sample.
        smoothed: "m", nats, their expected order statistics, never above the sample's maximum.
        members: bool "m", which of them belong to the tail.
    """

    k: Tensor
    positions: Tensor
    smoothed: Tensor
    members: Tensor


def pareto_tail(log_weights: Tensor, units: Tensor, *, group: Group = None) -> Tail:
    """Fit a generalised Pareto distribution to the M = min(S/5, 3 √S) largest of S weights.

    Args:
        log_weights: "b t", nats.
        units: bool "b t", one token per unit; S counts them.
        group: the ranks that together hold the sample; None: this one.

    Returns:
        The tail, of its members those that this rank holds. Its index is trustworthy below
        min(1 − 1/log₁₀ S, 0.7).

    Raises:
        InputError: log-weights and units are not of the same tokens.

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
    check_mask("pareto_tail", units, "units")
    check_per_token(
        "pareto_tail", units, called="units", gradient=("log_weights",), log_weights=log_weights
    )
    check_member("pareto_tail", "group", group)
    here = torch.where(units, log_weights, -torch.inf).flatten().to(accumulator(units.device))
    top = torch.topk(here, _longest(here.numel(), group))
    sample, first = gather_over(top.values, group)
    positions = top.indices
    count = sum_over(torch.count_nonzero(units).to(here.dtype), group)
    length = torch.minimum(count / 5, 3 * count.sqrt()).floor()
    longest = len(sample) - 1
    if longest < 1:
        none = torch.zeros_like(positions, dtype=torch.bool)
        return Tail(here.new_tensor(math.inf), positions, here.gather(0, positions), none)

    order = torch.argsort(sample, descending=True, stable=True)
    largest = sample.amax()
    relative = sample[order] - largest
    cutoff = relative.gather(0, length.long().clamp(max=longest).view(1)).clamp(
        min=math.log(torch.finfo(here.dtype).tiny)
    )
    members = (torch.arange(longest + 1, device=here.device) < length) & (relative > cutoff)
    n = torch.count_nonzero(members).to(here.dtype)
    excess = torch.where(members, relative.exp() - cutoff.exp(), 0)
    k, sigma = _fit(excess, n)

    rank = n - torch.arange(longest + 1, device=here.device) - 0.5  # smallest excess first
    quantile = sigma * torch.expm1(-k * torch.log1p(-rank / n)) / k
    quantile = torch.where(k == 0, -sigma * torch.log1p(-rank / n), quantile)
    smoothed = (quantile + cutoff.exp()).log().clamp(max=0) + largest
    fitted = (n >= SHORTEST_TAIL) & k.isfinite() & (sigma > 0)
    mine = torch.argsort(order)[first : first + len(positions)]
    return Tail(
        torch.where(fitted, k, torch.inf), positions, smoothed[mine], (members & fitted)[mine]
    )


def _longest(size: int, group: Group) -> int:
    """How many of this rank's values may belong to the tail, or bound it from below."""
    everywhere = size
    if group is not None:
        everywhere = sum(objects_over(size, group))
    return min(size, int(min(everywhere / 5, 3 * everywhere**0.5)) + 1)


def _fit(excess: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean of index and scale; ``excess`` falls, is ≥ 0, and 0 beyond n members."""
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
    weight = torch.where(weight >= 10 * torch.finfo(excess.dtype).eps, weight, 0)
    b = (weight * torch.where(weight > 0, b, 0)).sum() / weight.sum()
    k = torch.log1p(-b * excess).sum() / n
    return (n * k + prior_weight * prior_index) / (n + prior_weight), -k / b
