"""How numbers stand in tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from math import exp, isnan, sqrt


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|---|" + "---:|" * (len(head) - 1))
    return "\n".join(lines) + "\n"


def with_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    if len(values) < 2:
        return values[0], float("nan")
    return statistics.fmean(values), statistics.stdev(values) / sqrt(len(values))


def pretty(value: float) -> str:
    if isnan(value):
        return ""
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def share(mean: float, error: float, digits: int = 1) -> str:
    if isnan(mean):
        return "not measured"
    return f"{mean:.{digits}%}" + ("" if isnan(error) else f" ± {error:.{digits}%}")


def times(logs: Sequence[float]) -> str:
    """A geometric mean, and the factor that its standard error is."""
    mean, error = with_error(logs)
    return f"{exp(mean):.3g}" + (f" × {exp(error):.2f}^±1" if error > 0 else "")
