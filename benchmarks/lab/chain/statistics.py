"""What counts of runs carry: intervals and tests."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt

NORMAL = 1.959963984540054
"""The 97.5 % quantile."""


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share.

    >>> [round(x, 3) for x in wilson(0, 3)]
    [0.0, 0.561]
    """
    share, spread = count / of, NORMAL**2 / of
    middle = share + spread / 2
    reach = sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (middle - reach) / (1 + spread)), min(1.0, (middle + reach) / (1 + spread))


def interval(count: int, of: int) -> str:
    """A count with the 95 % interval of its share.

    >>> interval(0, 3)
    '0 of 3 (0% to 56%)'
    """
    low, high = wilson(count, of)
    return f"{count} of {of} ({low:.0%} to {high:.0%})"


def fisher(a: int, of_a: int, b: int, of_b: int) -> float:
    """Two-sided p of equal shares: the chance of tables that are no likelier than this one.

    >>> round(fisher(14, 34, 0, 34), 5)
    2e-05
    """
    both = a + b

    def chance(x: int) -> int:
        return comb(of_a, x) * comb(of_b, both - x)

    tables = range(max(0, both - of_b), min(both, of_a) + 1)
    seen = chance(a)
    return sum(chance(x) for x in tables if chance(x) <= seen) / comb(of_a + of_b, both)


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
