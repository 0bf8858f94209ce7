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

from iscorrect.errors import input_error
from iscorrect.layout import masked

Units: TypeAlias = Tensor
"""bool "b t": one token for each unit (token, sequence, …) of the ratio's level."""

Limit: TypeAlias = float | Callable[[Tensor, Units], Tensor]
"""A bound on the ratio: a number, or a callable (ratio "b t", units bool "b t") -> ""."""


def ionides_cap(ratio: Tensor, units: Units) -> Tensor:
    """Cap that grows with the sample, so that truncated importance sampling stays consistent.

        C = √n · mean(ρ)

    Args:
        ratio: "b t", ≥ 0.
        units: bool "b t", one token per unit; n counts them.

    Returns:
        "", ≥ 0.

    References:
        Ionides, "Truncated importance sampling", JCGS 17(2), 2008.

    >>> ionides_cap(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool))
    tensor(2.)
    """
    n = torch.count_nonzero(units).clamp(min=1).to(ratio.dtype)
    return masked(ratio, units).sum() / n.sqrt()


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


def ess_cap(ratio: Tensor, units: Units, target: float) -> Tensor:
    """Largest cap at which the truncated weights keep an effective sample size.

        C = max {c : ESS(min(ρ, c)) ≥ target}, ESS(w) = (Σ w)² / (n Σ w²)

    ESS falls as the cap rises, from 1 at a cap below every ratio, so bisection on log c finds it.

    Args:
        ratio: "b t", ≥ 0.
        units: bool "b t", one token per unit.
        target: in (0, 1].

    Returns:
        "", the cap; the largest ratio where no truncation is needed.

    >>> ratios = torch.tensor([[1.0, 1.0, 1.0, 9.0]])
    >>> cap = ess_cap(ratios, torch.ones(1, 4, dtype=torch.bool), target=0.8)
    >>> bool(2.6 < cap < 2.7)
    True
    """
    ratio = masked(ratio, units)
    n = torch.count_nonzero(units).clamp(min=1)
    top = ratio.max() if ratio.numel() else ratio.sum()
    tiny = torch.finfo(ratio.dtype).tiny
    low = torch.where(units & (ratio > 0), ratio, torch.inf).min() if ratio.numel() else top
    low = torch.minimum(low, top).clamp(min=tiny).log()
    high = top.clamp(min=tiny).log()
    fits = (_ess(ratio, top, n) >= target) | (top == 0)
    for _ in range(40):
        middle = (low + high) / 2
        enough = _ess(ratio, middle.exp(), n) >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(fits, top, low.exp())


def _ess(ratio: Tensor, cap: Tensor, n: Tensor) -> Tensor:
    # relative to the cap, so that squares neither overflow nor vanish
    weights = torch.minimum(ratio, cap) / cap.clamp(min=torch.finfo(ratio.dtype).tiny)
    return weights.sum().square() / (n * weights.square().sum()).clamp(min=1e-30)


@dataclass(frozen=True)
class IonidesCap:
    """:func:`ionides_cap` as a limit for a bound.

    >>> IonidesCap()(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool))
    tensor(2.)
    """

    def __call__(self, ratio: Tensor, units: Units) -> Tensor:
        return ionides_cap(ratio, units)


@dataclass(frozen=True)
class MSEOptimalCap:
    """:func:`mse_optimal_cap` as a limit for a bound, with n and χ² taken from the batch.

    The sample's χ² underestimates a heavy tail, and the cap with it.

    >>> MSEOptimalCap()(torch.ones(1, 64), torch.ones(1, 64, dtype=torch.bool))
    tensor(2.)
    """

    def __call__(self, ratio: Tensor, units: Units) -> Tensor:
        n = torch.count_nonzero(units).clamp(min=1).to(ratio.dtype)
        chi2 = masked((ratio - 1).square(), units).sum() / n
        return mse_optimal_cap(n, chi2)


@dataclass(frozen=True)
class ESSCap:
    """:func:`ess_cap` as a limit for a bound.

    >>> ESSCap(target=0.9)(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool))
    tensor(1.)
    """

    target: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise input_error(
                "ESSCap", "target", expected="in (0, 1], a fraction of the sample",
                got=repr(self.target), fix="pass target=0.5",
            )

    def __call__(self, ratio: Tensor, units: Units) -> Tensor:
        return ess_cap(ratio, units, self.target)
