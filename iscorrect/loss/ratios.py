"""Importance ratios at every level."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from iscorrect.errors import (
    check_choice,
    check_floating,
    check_number,
    check_per_token,
    input_error,
)
from iscorrect.layout import Layout, as_layout, masked, wide

Level = Literal["token", "sequence", "geometric", "prefix", "segment"]

IMPOSSIBLE = 1e4
"""Nats beyond which a number is no log-prob; the least probability of float64 is e^−745."""


def log_ratio(
    log_probs: Tensor, rollout_log_probs: Tensor, layout: Layout | Tensor
) -> Tensor:
    """Log-ratio of two policies at the sampled tokens.

        log ρ = log π − log μ

    Args:
        log_probs: "b t", log π, nats.
        rollout_log_probs: "b t", log μ, nats.
        layout: which tokens count; or a mask, bool "b t".

    Returns:
        "b t", nats, in float32 or wider; 0 outside the mask.

    Raises:
        InputError: log-probs that are no tensors, or of other tokens than the layout's.

    >>> mask = torch.tensor([[True, False]])
    >>> log_ratio(torch.tensor([[-1.0, 9.0]]), torch.tensor([[-1.5, 7.0]]), Layout(mask))
    tensor([[0.5000, 0.0000]])
    """
    mask = as_layout("log_ratio", layout).mask
    check_per_token(
        "log_ratio", mask, called="layout", gradient=("log_probs", "rollout_log_probs"),
        log_probs=log_probs, rollout_log_probs=rollout_log_probs,
    )
    return masked(difference(log_probs, rollout_log_probs), mask)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Difference a − b in float32 or wider: 16-bit inputs are upcast before the subtraction."""
    return wide(a) - wide(b)


def is_log_prob(x: Tensor) -> Tensor:
    """Where a number can be the log-prob of a sampled token; bool "b t".

        |x| < 10⁴ nats

    Neither NaN nor ±inf can, nor what masked logits leave behind, such as ``torch.finfo.min``: it
    is finite, and overflows in the next product.

    >>> is_log_prob(torch.tensor([-1.0, -torch.inf, torch.nan, torch.finfo(torch.float32).min]))
    tensor([ True, False, False, False])
    """
    return x.abs() < IMPOSSIBLE


def at_level(log_ratio: Tensor, layout: Layout | Tensor, level: Level) -> Tensor:
    """The log-ratio of the unit that each token belongs to.

        token      log ρ_t
        sequence   Σ_s log ρ_s, the log of the product over the sequence
        geometric  the mean of log ρ_s over the sequence; not a density ratio
        prefix     Σ_{s ≤ t} log ρ_s
        segment    Σ_s log ρ_s over the segment (turn)

    Args:
        log_ratio: "b t", nats.
        layout: the sequences and segments; or a mask, bool "b t".
        level: as above.

    Returns:
        "b t", nats, the unit's value on each of its tokens.

    Raises:
        InputError: an unknown level, or log-ratios of other tokens than the layout's.

    >>> layout = Layout(torch.ones(1, 2, dtype=torch.bool))
    >>> at_level(torch.tensor([[0.5, 1.0]]), layout, "sequence")
    tensor([[1.5000, 1.5000]])
    """
    layout = as_layout("at_level", layout)
    check_per_token(
        "at_level", layout.mask, called="layout", gradient=("log_ratio",), log_ratio=log_ratio
    )
    reductions = {
        "sequence": layout.sequence_total, "geometric": layout.sequence_mean,
        "prefix": layout.prefix_total, "segment": layout.segment_total,
    }
    if not isinstance(level, str) or level not in ("token", *reductions):
        check_level("at_level", level)
    return log_ratio if level == "token" else reductions[level](log_ratio)


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

    30.5 nats in float32, 341 in float64.

    >>> round(saturation(torch.float32), 1)
    30.5
    """
    return (math.log(torch.finfo(dtype).max) - 40 * math.log(2)) / 2


def saturated(log_ratio: Tensor) -> Tensor:
    """The log-ratio, held at :func:`saturation`; "…", nats.

    >>> saturated(torch.tensor([100.0, -2.0]))
    tensor([30.4985, -2.0000])
    """
    return log_ratio.clamp(max=saturation(log_ratio.dtype))


def ratio(log_ratio: Tensor) -> Tensor:
    """Ratio from its logarithm, held where sums of its squares are still finite.

        ρ = exp(min(log ρ, limit)), limit = 30.5 in float32

    Args:
        log_ratio: "b t", nats.

    Returns:
        "b t", ≥ 0 and finite, in float32 or wider.

    >>> ratio(torch.tensor([0.0, -torch.inf]))
    tensor([1., 0.])
    """
    check_floating("ratio", log_ratio=log_ratio)
    return saturated(wide(log_ratio)).exp()


def check_level(caller: str, level: object) -> None:
    """Raise unless ``level`` is one of the five."""
    check_choice(caller, "level", level, get_args(Level))


def check_band(caller: str, low: object, high: object) -> None:
    """Raise unless bounds on a ratio are nonnegative numbers, or None, with low ≤ high."""
    what = "a bound on the ratio itself, not on its logarithm"
    check_number(caller, "low", low, what, least=0, optional=True)
    check_number(caller, "high", high, what, least=0, optional=True)
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
        raise input_error(
            caller, "low", expected=f"at most high={high!r}", got=repr(low),
            fix="swap the two bounds",
        )
