"""Means over seeds, with the errors that they have."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from math import exp, log, sqrt
from pathlib import Path

from scipy import stats

from benchmarks.lab.cells import pretty

Row = dict[str, str]
"""Of a record."""


def rows_of(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mean(values: Sequence[float]) -> str:
    """A mean, with its 95 % interval where there are three values or more."""
    middle = statistics.fmean(values)
    if len(values) < 3:
        return pretty(middle)
    half = half_width(values)
    if abs(middle) < 1e-9 * half:  # what is left of a sum that cancels
        middle = 0.0
    return f"{middle:.3g} ± {short(half)}"


def half_width(values: Sequence[float]) -> float:
    """Of Student's 95 % interval of the mean."""
    point = float(stats.t.ppf(0.975, len(values) - 1))
    return point * statistics.stdev(values) / sqrt(len(values))


def p_of(values: Sequence[float]) -> float:
    """Of Student's test that the mean is zero; 1 where they do not vary or are fewer than three."""
    if len(values) < 3 or len({*values}) == 1:
        return 1.0
    return float(stats.ttest_1samp(values, 0).pvalue)


def geometric(values: Sequence[float]) -> str:
    """A geometric mean, with the ends of its 95 % interval where there are three or more."""
    logs = [log(x) for x in values]
    middle = statistics.fmean(logs)
    if len(values) < 3:
        return short(exp(middle))
    half = half_width(logs)
    return f"{short(exp(middle))} ({short(exp(middle - half))} to {short(exp(middle + half))})"


def short(x: float) -> str:
    """Two digits that count."""
    return f"{float(f'{x:.2g}'):,.0f}" if x >= 10 else f"{x:.2g}"


def number_of(seeds: Sequence[object]) -> str:
    return "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
