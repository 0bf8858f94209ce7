"""What is known of a chunk of tokens, and the sums that chunks add to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from iscorrect.head.block import Moments
from iscorrect.head.inputs import Counted, Head


@dataclass(eq=False)
class Gradients:
    """Sums of what the chunks give, in float32 or wider; None where nothing asks for them.

    Attributes:
        hidden: "m d", or "m+1 d" where some of the hidden states are on other ranks.
        weight: "v d", without any meaning as long as it is ``fresh``.
        bias: "v".
        here: m.
        fresh: nothing has been added to ``weight``.
        exponent: int "", where ``weight`` is to be multiplied by 2^exponent.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    here: int
    fresh: bool = True
    exponent: Tensor | None = None
    _late: tuple[dist.Work, Callable[[], None]] | None = None

    @classmethod
    def of(
        cls, head: Head, tokens: Counted, *, hidden: bool, weight: bool, bias: bool
    ) -> Gradients:
        """Sums of nothing yet."""
        dtype, device = head.wide(tokens.hidden), tokens.hidden.device
        # one row more, for tokens whose hidden states are on other ranks
        m, d = tokens.hidden.shape
        m += tokens.part is not None
        return cls(
            torch.zeros(m, d, dtype=dtype, device=device) if hidden else None,
            # contiguous, whatever the strides of the parameter
            torch.empty(head.weight.shape, dtype=dtype, device=device) if weight else None,
            torch.zeros(len(head.weight), dtype=dtype, device=device) if bias else None,
            len(tokens.hidden),
        )

    def reduce(self, sums: Tensor, group: dist.ProcessGroup, then: Callable[[], None]) -> None:
        """Sum a chunk's rows of ``hidden`` over ranks while the next chunk is worked on."""
        self.settle()
        work = dist.all_reduce(sums, group=group, async_op=True)
        self._late = (work, then)

    def settle(self) -> None:
        """Wait for what other ranks add to the rows of ``hidden``."""
        if self._late is not None:
            work, then = self._late
            work.wait()
            then()
            self._late = None

    def total(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden "m d", weight and bias, once all chunks are through."""
        self.settle()
        if self.fresh and self.weight is not None:
            self.weight.zero_()
        if self.exponent is not None and self.weight is not None:
            self.weight.mul_(power_of_two(self.exponent))
            self.exponent = None
        hidden = None if self.hidden is None else self.hidden[: self.here]
        return hidden, self.weight, self.bias


@dataclass(frozen=True, eq=False)
class Reading:
    """What is known of some tokens "c" once all logits have been seen.

    Attributes:
        log_probs: of the targets, z_y − largest − log_total.
        largest: logit.
        log_total: log Σ exp(z − largest).
        moments: entropy and variance of the surprisal, or nothing.
        kept: what saves computing the logits again, or None.
    """

    log_probs: Tensor
    largest: Tensor
    log_total: Tensor
    moments: tuple[Tensor, ...] = ()
    kept: Kept | None = None

    def __getitem__(self, part: slice | Tensor) -> Reading:
        return Reading(self.log_probs[part], self.largest[part], self.log_total[part])

    @classmethod
    def joined(cls, readings: list[Reading]) -> Reading:
        log_probs, largest, log_total, moments = zip(
            *[(x.log_probs, x.largest, x.log_total, x.moments) for x in readings], strict=True
        )
        return cls(
            torch.cat(log_probs), torch.cat(largest), torch.cat(log_total),
            tuple(torch.cat(x) for x in zip(*moments, strict=True)),
        )


class Kept(NamedTuple):
    """What the reading of a chunk leaves behind, but for the targets.

    Attributes:
        values: "v c" or "c v" for each block of rows, logits z, or exp(z − reference).
        references: "c" for each block of rows; None where the values are logits.
        hidden: "c d".
    """

    values: list[Tensor]
    references: dict[int, Tensor] | None
    hidden: Tensor


class Slopes(NamedTuple):
    """What multiplies the derivatives of some tokens' log-probs.

    Attributes:
        scale: "c"; where there is a power, 2^power is still to be multiplied.
        power: int "c", or None.
        idle: bool "c", tokens whose derivative is 0 whatever else is there; None: none.
        hidden: "c d".
        states: "c d", what the gradient of the weight takes for ``hidden``.
    """

    scale: Tensor
    power: Tensor | None
    idle: Tensor | None
    hidden: Tensor
    states: Tensor


@dataclass(eq=False)
class Sums:
    """What some blocks of the head's rows add to a chunk's log-probs.

    Attributes:
        largest: "c", logit but for the target's.
        others: "c", Σ exp(z − largest) without the target's.
        own: "c", the target's logit, or 0 where it is not among the rows.
        references: "c", by block.
        moments: entropy and variance, or None.
        mean: "c d", Σ exp(z − largest) ∂z/∂h without the target's, or None.
    """

    largest: Tensor
    others: Tensor
    own: Tensor
    references: dict[int, Tensor] = field(default_factory=dict)
    moments: Moments | None = None
    mean: Tensor | None = None

    @classmethod
    def joined(cls, parts: list[Sums]) -> Sums:
        first, *rest = parts
        for part in rest:
            largest = torch.maximum(first.largest, part.largest)
            mine, theirs = (first.largest - largest).exp(), (part.largest - largest).exp()
            first.largest, first.own = largest, first.own + part.own
            first.others = mine * first.others + theirs * part.others
            if first.mean is not None and part.mean is not None:
                first.mean.mul_(rearrange(mine, "c -> c 1"))
                first.mean.addcmul_(part.mean, rearrange(theirs, "c -> c 1"))
            if first.moments is not None and part.moments is not None:
                first.moments.join(part.moments)
        return first


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32.

    >>> power_of_two(torch.tensor([-1, 3]))
    tensor([0.5000, 8.0000])
    """
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def split_exponent(scale: Tensor) -> tuple[Tensor, Tensor]:
    """``scale`` as m · 2^e, so that float16 holds m · p, and e waits for the float32 sums."""
    mantissa, exponent = torch.frexp(scale)
    return mantissa, torch.where(mantissa == 0, -126, exponent)


def in_unit(hidden: Tensor, power: Tensor, into: Gradients) -> Tensor:
    """Rows times 2^power, over the unit in which the weight's gradient is summed.

    The unit is the largest 2^power there has been, so float16 holds the rows.
    """
    unit = power.amax()
    if into.exponent is not None:
        assert into.weight is not None
        unit = torch.maximum(unit, into.exponent)
        into.weight.mul_(power_of_two(into.exponent - unit))
    into.exponent = unit
    rows = rearrange(power_of_two(power - unit), "c -> c 1")
    return torch.mul(hidden, rows, out=torch.empty_like(hidden))
