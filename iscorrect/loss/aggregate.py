"""Aggregations: from per-token losses to a scalar."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from iscorrect.errors import (
    check_choice,
    check_number,
    check_per_token,
    describe,
    input_error,
    is_number,
)
from iscorrect.layout import Layout, as_layout, masked, wide
from iscorrect.loss.evidence import Scope
from iscorrect.ranks import Group, accumulator, check_member, sum_over

Name = Literal[
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "sum",
]
Normalizer: TypeAlias = Tensor | float


class Aggregation:
    """A weighted sum of per-token losses over a count: what an aggregation is made from.

        loss = Σ c x / N

    Both c and N depend on the layout alone, so the gradient of every token is known before any
    loss is, and micro-batches add up once they share N. Derive from it for one of your own, and
    override :meth:`coefficients`, :meth:`counted`, or both.

    Attributes:
        scope: how much of the layout the coefficient of a token depends on.

    >>> TokenMean()(torch.tensor([[1.0, 3.0]]), Layout(torch.tensor([[True, True]])))
    tensor(2.)
    """

    scope: ClassVar[Scope] = "token"

    def coefficients(self, layout: Layout, dtype: torch.dtype) -> Tensor | float:
        """What multiplies each token's loss, c: "b t", or a number that is the same for all."""
        return 1.0

    def counted(self, layout: Layout) -> Tensor | None:
        """Bool "b t", True once for each unit that N counts; None where nothing is divided by."""
        return layout.mask

    def denominator(self, layout: Layout) -> Tensor | None:
        """N, at least 1; "". None where nothing is divided by."""
        counted = self.counted(layout)
        if counted is None:
            return None
        return sum_over(torch.count_nonzero(counted), layout.sequence_group).clamp(min=1)

    def total(self, per_token: Tensor, layout: Layout) -> Tensor:
        """Σ c x, "", in float32 or wider; ``per_token`` "b t" is 0 outside the mask."""
        per_token = wide(per_token)
        coefficients = self.coefficients(layout, per_token.dtype)
        if isinstance(coefficients, Tensor):
            return (per_token * coefficients).sum()
        return per_token.sum() * coefficients if coefficients != 1 else per_token.sum()

    def divide(self, total: Tensor, layout: Layout, normalizer: Normalizer | None) -> Tensor:
        """Σ c x / N, ""; the normalizer stands for N where one is given."""
        scale = self.denominator(layout) if normalizer is None else normalizer
        if scale is None:
            return total
        if isinstance(scale, Tensor):
            scale = scale.reshape(())
            scale = torch.where((scale == 0) & (total == 0), 1, scale)
        return (total / scale).to(total.dtype)

    def __call__(self, per_token: Tensor, layout: Layout) -> Tensor:
        return self.divide(self.total(masked(per_token, layout.mask), layout), layout, None)


Aggregator: TypeAlias = Callable[[Tensor, Layout], Tensor]
"""An aggregation, or any callable (per_token "b t", layout) -> ""."""


@dataclass(frozen=True)
class TokenMean(Aggregation):
    """Mean over tokens: Σ x / N, N tokens of the mask (DAPO, arXiv 2503.14476)."""


@dataclass(frozen=True)
class SequenceMeanTokenSum(Aggregation):
    """Mean over sequences of the sum over their tokens: Σ_s Σ_t x / S, S sequences."""

    def counted(self, layout: Layout) -> Tensor | None:
        return layout.sequence_starts()


@dataclass(frozen=True)
class SequenceMeanTokenMean(SequenceMeanTokenSum):
    """Mean over sequences of the mean over their n_s tokens: Σ_s (Σ_t x / n_s) / S.

    References:
        GRPO (arXiv 2402.03300).
    """

    scope: ClassVar[Scope] = "sequence"

    def coefficients(self, layout: Layout, dtype: torch.dtype) -> Tensor | float:
        return layout.sequence_count(dtype).clamp(min=1).reciprocal()


@dataclass(frozen=True)
class SequenceMeanTokenSumNorm(SequenceMeanTokenSum):
    """Mean over sequences of the sum over their tokens, over a constant: Σ_s Σ_t x / (S · H).

    Args:
        horizon: H, the generation budget in tokens. The padded width is no property of the data.

    Raises:
        InputError: the horizon is no int > 0.

    References:
        Dr.GRPO (arXiv 2503.20783).
    """

    horizon: int

    def __post_init__(self) -> None:
        check_horizon("SequenceMeanTokenSumNorm", self.horizon)

    def coefficients(self, layout: Layout, dtype: torch.dtype) -> Tensor | float:
        return 1 / self.horizon


@dataclass(frozen=True)
class Sum(Aggregation):
    """Sum over tokens: Σ x."""

    def counted(self, layout: Layout) -> Tensor | None:
        return None


AGGREGATIONS: dict[str, Callable[..., Aggregation]] = {
    "token-mean": TokenMean,
    "seq-mean-token-sum": SequenceMeanTokenSum,
    "seq-mean-token-mean": SequenceMeanTokenMean,
    "seq-mean-token-sum-norm": SequenceMeanTokenSumNorm,
    "sum": Sum,
}
"""Aggregations by name. The names are verl's, whose horizon is the padded width."""


def aggregate(
    per_token: Tensor,
    mask: Tensor | Layout,
    how: Name | Aggregation = "token-mean",
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
        how: one of these names, or an :class:`Aggregation`.
        normalizer: what stands for N or S, such as the whole batch's count when ``per_token`` is a
            micro-batch of it; the micro-batches' values then add up to the whole batch's exactly.
        horizon: the generation budget in tokens, for "seq-mean-token-sum-norm" alone.

    Returns:
        "", float32 or wider. 0 where nothing counts.

    Raises:
        InputError: an unknown aggregation, "sum" with a normalizer, a horizon missing or idle.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> aggregate(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), mask, "seq-mean-token-mean")
    tensor(3.5000)
    """
    layout = as_layout("aggregate", mask)
    check_per_token("aggregate", layout.mask, gradient=("per_token",), per_token=per_token)
    spec = named_aggregation("aggregate", how, horizon)
    check_normalizer("aggregate", normalizer, spec)
    return spec.divide(spec.total(masked(per_token, layout.mask), layout), layout, normalizer)


def global_normalizer(
    mask: Tensor | Layout,
    how: Name | Aggregation = "token-mean",
    *,
    group: Group,
    gradients: Literal["averaged", "summed"],
) -> Tensor:
    """Denominator of the whole batch for one rank's share of it.

        averaged   N / world size, since DDP and FSDP average gradients over ranks
        summed     N

    Args:
        mask: bool "b t" of everything this rank will accumulate in one optimizer step, or a layout.
        how: the aggregation; it says whether N counts tokens or sequences.
        group: the ranks that together hold the batch, context-parallel ones included;
            ``torch.distributed.group.WORLD`` for all, None for this one alone.
        gradients: what happens to gradients across the ranks of the group.

    Returns:
        float64 "" (float32 on devices without it), for ``normalizer=``.

    Raises:
        InputError: "sum" has no denominator; ``gradients`` is neither of the two; this rank is not
            in the group.

    >>> global_normalizer(torch.ones(2, 3, dtype=torch.bool), group=None, gradients="averaged")
    tensor(6., dtype=torch.float64)
    """
    # N does not depend on the horizon
    any_horizon = 1 if isinstance(how, str) and how == "seq-mean-token-sum-norm" else None
    spec = named_aggregation("global_normalizer", how, any_horizon)
    check_choice("global_normalizer", "gradients", gradients, ("averaged", "summed"))
    layout = as_layout("global_normalizer", mask)
    counted = spec.counted(layout)
    if counted is None:
        raise input_error(
            "global_normalizer", "how", expected="an aggregation with a denominator",
            got=repr(how), fix="pass 'token-mean'",
        )
    check_member("global_normalizer", "group", group)
    count = torch.count_nonzero(counted).to(accumulator(counted.device))
    count = sum_over(count, group).clamp(min=1)
    averaged = gradients == "averaged" and group is not None
    return count / dist.get_world_size(group) if averaged else count


def named_aggregation(caller: str, how: object, horizon: int | None) -> Aggregation:
    """The aggregation called ``how``; one that is given as such is its own.

    >>> named_aggregation("aggregate", "seq-mean-token-sum-norm", 128)
    SequenceMeanTokenSumNorm(horizon=128)
    """
    takes = how == "seq-mean-token-sum-norm"
    if horizon is not None and not takes:
        raise input_error(
            caller, "horizon", expected=f"None for {how!r}", got=repr(horizon),
            fix="leave it out, or choose 'seq-mean-token-sum-norm'",
        )
    if isinstance(how, Aggregation):
        return how
    if isinstance(how, type) and issubclass(how, Aggregation):
        raise input_error(
            caller, "aggregation", expected="an aggregation, not a class", got=how.__name__,
            fix=f"pass {how.__name__}(), with its parentheses",
        )
    check_choice(caller, "aggregation", how, get_args(Name))
    if takes:
        check_horizon(caller, horizon)
        assert horizon is not None
        return SequenceMeanTokenSumNorm(horizon)
    return AGGREGATIONS[str(how)]()


def check_horizon(caller: str, horizon: object) -> None:
    """Raise unless a horizon is a number of tokens."""
    check_number(
        caller, "horizon", horizon, "the generation budget in tokens", above=0, whole=True,
        fix="pass horizon=max_new_tokens; the padded width is no property of the data",
    )


def check_normalizer(caller: str, normalizer: object, how: object) -> None:
    """Raise unless a normalizer is a positive number or a tensor of one, and has a place."""
    if normalizer is None:
        return
    if not isinstance(how, Aggregation):
        raise input_error(
            caller, "normalizer", expected="None for a callable aggregation",
            got=describe(normalizer), fix="divide inside the callable, or derive an Aggregation",
        )
    if isinstance(how, Sum):
        raise input_error(
            caller, "normalizer", expected="None for 'sum', which divides by nothing",
            got=describe(normalizer), fix="choose 'token-mean', or leave normalizer out",
        )
    if isinstance(normalizer, Tensor) and normalizer.numel() == 1:
        return
    if not is_number(normalizer) or not 0 < normalizer < math.inf:  # type: ignore[operator]
        raise input_error(
            caller, "normalizer", expected="a number > 0, or a tensor of one number",
            got=describe(normalizer) if isinstance(normalizer, Tensor) else repr(normalizer),
            fix="pass global_normalizer(...)",
        )
