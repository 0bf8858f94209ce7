"""From per-token losses to a scalar, and the advantages that go into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from iscorrect.errors import check_mask, describe, input_error
from iscorrect.layout import Layout, as_layout, masked
from iscorrect.ranks import Group, gather_over

Aggregation = Literal[
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "sum",
]
Aggregator: TypeAlias = Callable[[Tensor, Layout], Tensor]
Normalizer: TypeAlias = Tensor | float
Estimator = Literal["grpo", "dr-grpo", "rloo"]


def aggregate(
    per_token: Tensor,
    mask: Tensor | Layout,
    how: Aggregation = "token-mean",
    *,
    normalizer: Normalizer | None = None,
    horizon: int | None = None,
) -> Tensor:
    """Per-token losses to a scalar.

        token-mean               Σ x / N
        seq-mean-token-sum       Σ_s Σ_t x / S
        seq-mean-token-mean      Σ_s (Σ_t x / n_s) / S
        seq-mean-token-sum-norm  Σ_s Σ_t x / (S · horizon)
        sum                      Σ x

    N counts tokens of the mask, S sequences with a token in it, n_s tokens of a sequence.

    Args:
        per_token: "b t".
        mask: bool "b t", or a layout.
        how: as above.
        normalizer: what stands for N or S, such as the whole batch's count when ``per_token`` is a
            micro-batch of it; the micro-batches' values then add up to the whole batch's exactly.
        horizon: the generation budget in tokens, for "seq-mean-token-sum-norm" alone.

    Returns:
        "". 0 where nothing counts.

    Raises:
        InputError: an unknown aggregation, "sum" with a normalizer, a horizon missing or idle.

    References:
        "token-mean": DAPO; "seq-mean-token-mean": GRPO; "seq-mean-token-sum-norm": Dr.GRPO. The
        names are verl's, whose horizon is the padded width.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> aggregate(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), mask, "seq-mean-token-mean")
    tensor(3.5000)
    """
    layout = as_layout("aggregate", mask)
    check_aggregation("aggregate", how, horizon)
    if how == "sum" and normalizer is not None:
        raise input_error(
            "aggregate", "normalizer", expected="None for 'sum', which divides by nothing",
            got=describe(normalizer), fix="choose 'token-mean', or leave normalizer out",
        )
    per_token = masked(per_token, layout.mask)
    return aggregate_masked(per_token, layout, how, normalizer, horizon)


def aggregate_masked(
    per_token: Tensor,
    layout: Layout,
    how: Aggregation,
    normalizer: Normalizer | None,
    horizon: int | None,
) -> Tensor:
    """:func:`aggregate` of what is 0 outside the mask already, unchecked."""
    if how == "seq-mean-token-mean":
        per_token = per_token / layout.sequence_count(per_token.dtype).clamp(min=1)
    total = per_token.sum()
    if how == "sum":
        return total
    scale = denominator(layout, how) if normalizer is None else normalizer
    mean = total / (scale if horizon is None else scale * horizon)
    return mean.to(total.dtype)  # a normalizer counts in float64


def denominator(layout: Layout, how: Aggregation) -> Tensor:
    """What an aggregation divides by: tokens or sequences, at least 1; ""."""
    count = layout.count() if how == "token-mean" else layout.num_sequences()
    return count.clamp(min=1)


def global_normalizer(
    mask: Tensor | Layout,
    how: Aggregation = "token-mean",
    *,
    group: dist.ProcessGroup | None = None,
    gradients: Literal["averaged", "summed"],
) -> Tensor:
    """Denominator of the whole batch for one rank's share of it.

        averaged   N / world size, since DDP and FSDP average gradients over ranks
        summed     N

    Without torch.distributed running, or on one rank, both are N.

    Args:
        mask: bool "b t" of everything this rank will accumulate in one optimizer step, or a layout.
        how: the aggregation; counts tokens for "token-mean", sequences for "seq-…".
        group: the ranks that together hold the batch, context-parallel ones included; None: all.
        gradients: what happens to gradients across the ranks of the group.

    Returns:
        float64 "" (float32 on devices without it), for ``normalizer=``.

    Raises:
        InputError: "sum" has no denominator; ``gradients`` is neither of the two.

    >>> global_normalizer(torch.ones(2, 3, dtype=torch.bool), gradients="averaged")
    tensor(6., dtype=torch.float64)
    """
    if how == "sum":
        raise input_error(
            "global_normalizer", "how", expected="an aggregation with a denominator",
            got="'sum'", fix="pass 'token-mean'",
        )
    check_aggregation("global_normalizer", how, horizon=1 if how.endswith("norm") else None)
    if gradients not in ("averaged", "summed"):
        raise input_error(
            "global_normalizer", "gradients", expected="'averaged' or 'summed'",
            got=repr(gradients), fix="pass 'averaged' under DDP and FSDP",
        )
    layout = as_layout("global_normalizer", mask)
    counted = layout.mask if how == "token-mean" else layout.sequence_starts()
    count = torch.count_nonzero(counted).to(accumulator(counted.device))
    if not (dist.is_available() and dist.is_initialized()):
        return count.clamp(min=1)
    dist.all_reduce(count, group=group)
    count = count.clamp(min=1)
    return count / dist.get_world_size(group) if gradients == "averaged" else count


def accumulator(device: torch.device) -> torch.dtype:
    """The widest floating type of a device; counts to 2⁵³ are exact in float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_aggregation(caller: str, how: object, horizon: int | None) -> None:
    """Raise unless ``how`` is known and a horizon is given exactly where one is needed."""
    if how not in get_args(Aggregation):
        raise input_error(
            caller, "aggregation", expected="one of " + ", ".join(map(repr, get_args(Aggregation))),
            got=repr(how), fix="pass 'token-mean', or a callable (per_token, layout) -> scalar",
        )
    needs = how == "seq-mean-token-sum-norm"
    if needs and (horizon is None or horizon <= 0):
        raise input_error(
            caller, "horizon", expected="the generation budget in tokens, an int > 0",
            got=repr(horizon), fix="pass horizon=max_new_tokens; the padded width is not a property"
            " of the data",
        )
    if horizon is not None and not needs:
        raise input_error(
            caller, "horizon", expected=f"None for {how!r}", got=repr(horizon),
            fix="leave it out, or choose 'seq-mean-token-sum-norm'",
        )


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    keep: Tensor | None = None,
    *,
    estimator: Estimator = "grpo",
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
        "b", float32 or wider; 0 where a group has fewer than two kept responses (for "dr-grpo":
        where it has one, which is its own mean).

    Raises:
        InputError: shapes differ, ids are not integers, or the estimator is unknown.

    References:
        GRPO (arXiv 2402.03300); Dr.GRPO (arXiv 2503.20783); RLOO (arXiv 2402.14740).

    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([7, 7, 7]), estimator="rloo")
    tensor([ 0.5000, -1.0000,  0.5000])
    """
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise input_error(
            "group_advantages", "rewards", expected="a floating-point tensor `b`",
            got=describe(rewards), fix="pass one reward per response",
        )
    if group_ids.shape != rewards.shape or group_ids.is_floating_point():
        raise input_error(
            "group_advantages", "group_ids", expected=f"an integer tensor {tuple(rewards.shape)}",
            got=describe(group_ids), fix="pass one prompt id per response",
        )
    if keep is not None:
        check_mask("group_advantages", keep)
    if keep is not None and keep.shape != rewards.shape:
        raise input_error(
            "group_advantages", "keep", expected=f"of shape {tuple(rewards.shape)}",
            got=describe(keep), fix="reduce a `b t` keep mask with .any(-1) or .all(-1)",
        )
    if estimator not in get_args(Estimator):
        raise input_error(
            "group_advantages", "estimator", expected="'grpo', 'dr-grpo' or 'rloo'",
            got=repr(estimator), fix="pass estimator='grpo'",
        )
    here = len(rewards)
    keep = torch.ones_like(rewards, dtype=torch.bool) if keep is None else keep
    rewards, first = gather_over(
        rewards.to(torch.promote_types(rewards.dtype, torch.float32)), batch_group
    )
    group_ids, keep = gather_over(group_ids, batch_group)[0], gather_over(keep, batch_group)[0]
    order = torch.argsort(group_ids, stable=True)
    layout = Layout(keep[order], sequence_ids=group_ids[order])
    sorted_rewards = rewards[order]
    n = layout.sequence_count(rewards.dtype)
    centered = sorted_rewards - layout.sequence_mean(sorted_rewards)
    if estimator == "dr-grpo":
        advantages = centered
    elif estimator == "rloo":
        advantages = torch.where(n > 1, centered * n / (n - 1).clamp(min=1), 0)
    else:
        variance = layout.sequence_total(centered.square()) / (n - 1).clamp(min=1)
        advantages = torch.where(n > 1, centered / (variance.sqrt() + eps), 0)
    advantages = masked(advantages, layout.mask)
    return torch.empty_like(advantages).scatter(0, order, advantages)[first : first + here]
