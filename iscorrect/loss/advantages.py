"""Advantages of responses against the others of their prompt."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from iscorrect.errors import (
    check_choice,
    check_mask,
    check_number,
    describe,
    input_error,
    is_integer,
)
from iscorrect.layout import Layout, masked
from iscorrect.ranks import Group, accumulator, check_member, gather_over

Baseline = Literal["grpo", "dr-grpo", "rloo"]

ROUNDING = 16
"""Units in the last place of a group's largest reward up to which a difference is rounding."""


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    keep: Tensor | None = None,
    *,
    estimator: Baseline = "grpo",
    eps: float = 1e-6,
    batch_group: Group = None,
) -> Tensor:
    """Advantages of responses against the others of their prompt.

        dr-grpo  A_i = r_i − mean_j r_j
        grpo     the same, divided by (std_j r_j + eps), std with n − 1
        rloo     A_i = r_i − mean_{j ≠ i} r_j

    Args:
        rewards: "b".
        group_ids: int "b", equal for responses to one prompt, in any order.
        keep: bool "b", the responses that baselines are taken over; the others get advantage 0, so
            that a rejected response neither trains nor moves its group's baseline. None: all.
        estimator: as above.
        eps: for "grpo".
        batch_group: the ranks over which responses to a prompt are spread; None: this one.

    Returns:
        "b", float32 or wider; 0 where all rewards of a group are equal, and where a group has
        fewer than two kept responses (for "dr-grpo": where it has one, which is its own mean). A
        kept reward that is NaN or infinite makes its group's advantages so: leave such responses
        out with ``keep``.

    Raises:
        InputError: shapes differ, ids are not integers, or the estimator is unknown.

    References:
        GRPO (arXiv 2402.03300); Dr.GRPO (arXiv 2503.20783); RLOO (arXiv 2402.14740).

    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([7, 7, 7]), estimator="rloo")
    tensor([ 0.5000, -1.0000,  0.5000])
    """
    numbers = isinstance(rewards, Tensor) and rewards.is_floating_point()
    if not numbers or rewards.ndim != 1:
        raise input_error(
            "group_advantages", "rewards", expected="a floating-point tensor `b`",
            got=describe(rewards), fix="pass one reward per response",
        )
    ids = isinstance(group_ids, Tensor) and is_integer(group_ids)
    if not ids or group_ids.shape != rewards.shape:
        raise input_error(
            "group_advantages", "group_ids", expected=f"an integer tensor {tuple(rewards.shape)}",
            got=describe(group_ids),
            fix="pass one prompt id per response, such as torch.arange(b) // group_size",
        )
    if keep is not None:
        check_mask("group_advantages", keep, "keep")
    if keep is not None and keep.shape != rewards.shape:
        raise input_error(
            "group_advantages", "keep", expected=f"of shape {tuple(rewards.shape)}",
            got=describe(keep), fix="reduce a `b t` keep mask with .any(-1) or .all(-1)",
        )
    check_choice("group_advantages", "estimator", estimator, get_args(Baseline))
    check_number("group_advantages", "eps", eps, "what is added to the deviation", least=0)
    check_member("group_advantages", "batch_group", batch_group)
    here = len(rewards)
    keep = torch.ones_like(rewards, dtype=torch.bool) if keep is None else keep
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    rewards, first = gather_over(rewards.to(accumulator(rewards.device)), batch_group)
    group_ids, keep = gather_over(group_ids, batch_group)[0], gather_over(keep, batch_group)[0]
    order = torch.argsort(group_ids, stable=True)
    layout = Layout(keep[order], sequence_ids=group_ids[order])
    sorted_rewards = rewards[order]
    n = layout.sequence_count(rewards.dtype)
    centered = sorted_rewards - layout.sequence_mean(sorted_rewards)
    # The mean of equal numbers is not always that number; what it is off by is no advantage.
    size = layout.sequence_max(sorted_rewards.abs())
    rounding = torch.where(size.isfinite(), ROUNDING * torch.finfo(size.dtype).eps * size, 0)
    centered = torch.where(centered.abs() <= rounding, 0, centered)
    if estimator == "dr-grpo":
        advantages = centered
    elif estimator == "rloo":
        advantages = torch.where(n > 1, centered * n / (n - 1).clamp(min=1), 0)
    else:
        variance = layout.sequence_total(centered.square()) / (n - 1).clamp(min=1)
        spread = (n > 1) & (variance != 0)  # NaN stays
        advantages = torch.where(spread, centered / (variance.sqrt() + eps), 0)
    advantages = masked(advantages, layout.mask).to(dtype)
    return torch.empty_like(advantages).scatter(0, order, advantages)[first : first + here]
