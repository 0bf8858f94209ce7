"""Importance ratios at every level, and what bounds and rules may look at."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from iscorrect.errors import input_error
from iscorrect.layout import Layout, masked

Level = Literal["token", "sequence", "geometric", "prefix", "segment"]


def log_ratio(log_probs: Tensor, rollout_log_probs: Tensor, layout: Layout) -> Tensor:
    """Log-ratio of two policies at the sampled tokens.

        log ρ = log π − log μ

    Args:
        log_probs: "b t", log π, nats.
        rollout_log_probs: "b t", log μ, nats.
        layout: which tokens count.

    Returns:
        "b t", nats, in float32 or wider; 0 outside the mask.

    >>> mask = torch.tensor([[True, False]])
    >>> log_ratio(torch.tensor([[-1.0, 9.0]]), torch.tensor([[-1.5, 7.0]]), Layout(mask))
    tensor([[0.5000, 0.0000]])
    """
    return masked(difference(log_probs, rollout_log_probs), layout.mask)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """A − b in float32 or wider: 16-bit inputs are upcast before they are subtracted."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide) - b.to(wide)


def is_finite(x: Tensor) -> Tensor:
    """``x.isfinite()``, which on a CPU takes fifty times as long as this; bool "b t"."""
    return ~(x - x).bool()


def at_level(log_ratio: Tensor, layout: Layout, level: Level) -> Tensor:
    """The log-ratio of the unit that each token belongs to.

        token      log ρ_t
        sequence   Σ_s log ρ_s, the log of the product over the sequence
        geometric  the mean of log ρ_s over the sequence; not a density ratio
        prefix     Σ_{s ≤ t} log ρ_s
        segment    Σ_s log ρ_s over the segment (turn)

    Args:
        log_ratio: "b t", nats.
        layout: the sequences and segments.
        level: as above.

    Returns:
        "b t", nats, the unit's value on each of its tokens.

    >>> layout = Layout(torch.ones(1, 2, dtype=torch.bool))
    >>> at_level(torch.tensor([[0.5, 1.0]]), layout, "sequence")
    tensor([[1.5000, 1.5000]])
    """
    if level == "token":
        return log_ratio
    if level == "sequence":
        return layout.sequence_total(log_ratio)
    if level == "geometric":
        return layout.sequence_mean(log_ratio)
    if level == "prefix":
        return layout.prefix_total(log_ratio)
    return layout.segment_total(log_ratio)


def units(layout: Layout, level: Level) -> Tensor:
    """One counted token for each unit of a level, so that a mean over them is a mean over units.

    Args:
        layout: the sequences and segments.
        level: token and prefix: every counted token; sequence and geometric: the first of each
            sequence; segment: the first of each segment.

    Returns:
        bool "b t".

    >>> units(Layout(torch.tensor([[False, True, True]])), "sequence")
    tensor([[False,  True, False]])
    """
    if level in ("sequence", "geometric"):
        return layout.sequence_starts()
    if level == "segment":
        return layout.segment_starts()
    return layout.mask


def saturation(dtype: torch.dtype) -> float:
    """The log-ratio at which ratios saturate: a trillion squares of them still add up finite.

    30.5 nats in float32, 341 in float64. Metrics count it as `is/saturated`.

    >>> round(saturation(torch.float32), 1)
    30.5
    """
    return (math.log(torch.finfo(dtype).max) - 40 * math.log(2)) / 2


def ratio(log_ratio: Tensor) -> Tensor:
    """Ratio from its logarithm, held where sums of its squares are still finite.

        ρ = exp(min(log ρ, limit)), limit = 30.5 in float32

    Args:
        log_ratio: "b t", nats.

    Returns:
        "b t", ≥ 0 and finite.

    >>> ratio(torch.tensor([0.0, -torch.inf]))
    tensor([1., 0.])
    """
    return log_ratio.clamp(max=saturation(log_ratio.dtype)).exp()


def check_level(caller: str, level: object) -> None:
    """Raise unless ``level`` is one of the five."""
    if level not in get_args(Level):
        raise input_error(
            caller, "level", expected="one of " + ", ".join(map(repr, get_args(Level))),
            got=repr(level), fix="'sequence' is the product, 'geometric' the mean of the logs",
        )


def check_bounds(
    caller: str, *, low: float | None = None, high: float | None = None, **others: float | None
) -> None:
    """Raise unless bounds on a ratio are nonnegative numbers with low ≤ high."""
    for name, value in {"low": low, "high": high, **others}.items():
        if value is not None and (isinstance(value, bool) or not value >= 0):
            raise input_error(
                caller, name, expected="a number >= 0, a bound on the ratio itself",
                got=repr(value), fix=f"pass {name} as a ratio, not as a log-ratio",
            )
    if low is not None and high is not None and low > high:
        raise input_error(
            caller, "low", expected=f"at most high={high!r}", got=repr(low),
            fix="swap the two bounds",
        )
