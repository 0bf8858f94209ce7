"""Caps that depend on the data: from the sample size, the χ² of the weights, or a target ESS.

Each is a function of quantities, and a frozen spec that a bound takes in place of a number:
``Truncate(cap=IonidesCap())``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from iscorrect.errors import check_mask, check_number, check_per_token
from iscorrect.layout import masked, wide
from iscorrect.loss.evidence import Evidence
from iscorrect.ranks import Group, check_member, max_over, sum_over

Limit: TypeAlias = float | Callable[[Tensor, Evidence], Tensor]
"""A bound on the ratio: a number, or a callable (ratio "b t", evidence) -> ""."""


def ionides_cap(n: Tensor, mean: Tensor) -> Tensor:
    """Cap that grows with the sample, so that truncated importance sampling stays consistent.

        C = √n · mean(ρ)

    Args:
        n: "", number of units in the estimate.
        mean: "", mean of their ratios.

    Returns:
        "", ≥ 0.

    References:
        Ionides, "Truncated importance sampling", JCGS 17(2), 2008.

    >>> ionides_cap(torch.tensor(64.0), torch.tensor(1.0))
    tensor(8.)
    """
    return n.sqrt() * mean


def mse_optimal_cap(n: Tensor, chi2: Tensor) -> Tensor:
    """Cap that minimises the worst-case mean squared error of a truncated estimate.

        C* = (n (1 + χ²)² / 8)^⅓, the minimiser of (1+χ²)²/(16 C²) + C/n

    Args:
        n: "", number of units in the estimate.
        chi2: "", χ²(π‖μ) of one unit, E ρ² − 1.

    Returns:
        "", ≥ 0.

    References:
        The bound is derived in docs/estimators.md: |bias| ≤ K(1+χ²)/(4C), variance ≤ K²C/n.

    >>> mse_optimal_cap(torch.tensor(64.0), torch.tensor(1.0))
    tensor(3.1748)
    """
    return (n * (1 + chi2).square() / 8) ** (1 / 3)


def ess_cap(ratio: Tensor, units: Tensor, target: float, *, group: Group = None) -> Tensor:
    """Largest cap at which the truncated weights keep an effective sample size.

        C = max {c : ESS(min(ρ, c)) ≥ target}, ESS(w) = (Σ w)² / (n Σ w²)

    ESS falls as the cap rises, from 1 at a cap below every ratio, so bisection on log c finds it.

    Args:
        ratio: "b t", ≥ 0.
        units: bool "b t", one token per unit.
        target: in (0, 1].
        group: the ranks that together hold the sample; None: this one.

    Returns:
        "", the cap; the largest ratio where no truncation is needed.

    Raises:
        InputError: the target is no share, or ratios and units are not of the same tokens.

    >>> ratios = torch.tensor([[1.0, 1.0, 1.0, 9.0]])
    >>> cap = ess_cap(ratios, torch.ones(1, 4, dtype=torch.bool), target=0.8)
    >>> bool(2.6 < cap < 2.7)
    True
    """
    check_number("ess_cap", "target", target, "a share of the sample", above=0, most=1)
    check_mask("ess_cap", units, "units")
    check_per_token("ess_cap", units, called="units", gradient=("ratio",), ratio=ratio)
    check_member("ess_cap", "group", group)
    ratio = masked(wide(ratio), units)
    n = sum_over(torch.count_nonzero(units), group).clamp(min=1)
    tiny = torch.finfo(ratio.dtype).tiny
    nothing = ratio.new_zeros(1)
    top = max_over(torch.cat([ratio.flatten(), nothing]).max(), group)
    inverse = masked(ratio.reciprocal(), ratio.bool())
    bottom = 1 / max_over(torch.cat([inverse.flatten(), nothing]).max(), group).clamp(min=tiny)
    low, high = torch.minimum(bottom, top).clamp(min=tiny).log(), top.clamp(min=tiny).log()
    fits = (_ess(ratio, top, n, group) >= target) | (top == 0)
    for _ in range(40):
        middle = (low + high) / 2
        enough = _ess(ratio, middle.exp(), n, group) >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(fits, top, low.exp())


def _ess(ratio: Tensor, cap: Tensor, n: Tensor, group: Group) -> Tensor:
    # relative to the cap, so that squares neither overflow nor vanish
    weights = torch.minimum(ratio, cap) / cap.clamp(min=torch.finfo(ratio.dtype).tiny)
    sums = sum_over(torch.stack([weights.sum(), weights.square().sum()]), group)
    return sums[0].square() / (n * sums[1]).clamp(min=1e-30)


@dataclass(frozen=True)
class IonidesCap:
    """:func:`ionides_cap` of the batch, as a limit for a bound.

    >>> IonidesCap()
    IonidesCap()
    """

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        return ionides_cap(evidence.batch_count(), evidence.batch_mean(ratio))


@dataclass(frozen=True)
class MSEOptimalCap:
    """:func:`mse_optimal_cap` of the batch, as a limit for a bound.

    The sample's χ² underestimates a heavy tail, and the cap with it.

    >>> MSEOptimalCap()
    MSEOptimalCap()
    """

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        chi2 = evidence.batch_mean((ratio - 1).square())
        return mse_optimal_cap(evidence.batch_count().clamp(min=1), chi2)


@dataclass(frozen=True)
class ESSCap:
    """:func:`ess_cap` of the batch, as a limit for a bound.

    Args:
        target: effective share of the sample, in (0, 1].

    Raises:
        InputError: the target is not in (0, 1].

    >>> ESSCap(target=0.9)
    ESSCap(target=0.9)
    """

    target: float = 0.5

    def __post_init__(self) -> None:
        check_number("ESSCap", "target", self.target, "a share of the sample", above=0, most=1)

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        return ess_cap(ratio, evidence.units, self.target, group=evidence.layout.batch_group)
