"""What counts of runs carry: intervals and tests."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import NamedTuple

from scipy import stats


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share.

    >>> [round(x, 3) for x in wilson(0, 3)]
    [0.0, 0.561]
    """
    low, high = stats.binomtest(count, of).proportion_ci(method="wilson")
    return float(low), float(high)


def interval(count: int, of: int) -> str:
    """A count with the 95 % interval of its share.

    >>> interval(0, 3)
    '0 of 3 (0% to 56%)'
    """
    low, high = wilson(count, of)
    return f"{count} of {of} ({low:.0%} to {high:.0%})"


def fisher(a: int, of_a: int, b: int, of_b: int) -> float:
    """Fisher's two-sided p of equal shares.

    >>> round(fisher(14, 34, 0, 34), 5)
    2e-05
    """
    return float(stats.fisher_exact([[a, of_a - a], [b, of_b - b]]).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p, adjusted for how many of them there are.

    Raises:
        ValueError: a p is not a number, which has no rank.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if any(map(isnan, p_values)):
        raise ValueError(f"holm: p_values must be numbers, got {list(p_values)}")
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


class Difference(NamedTuple):
    """Of two means.

    Attributes:
        mean: the difference.
        low: of its 95 % interval.
        high: of the same.
        p: two-sided, of no difference.
    """

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def welch(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Mean of ``a`` less mean of ``b``, by Welch's test.

    >>> print(welch([0.9, 0.8, 0.85], [0.4, 0.5, 0.6]))
    +0.350 (+0.142 to +0.558)
    """
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval()
    mean = sum(a) / len(a) - sum(b) / len(b)
    return Difference(mean, float(low), float(high), float(test.pvalue))
