"""From per-token losses to a scalar, and the advantages that go into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from iscorrect.errors import describe, input_error
from iscorrect.layout import Layout, as_layout, masked
from iscorrect.ranks import accumulator

Aggregation = Literal[
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "sum",
]

Aggregator: TypeAlias = Callable[[Tensor, Layout], Tensor]

Normalizer: TypeAlias = Tensor | float


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
