"""What counts of runs carry: intervals and tests."""

from __future__ import annotations

from collections.abc import Sequence

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

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
