"""What happens to one block of logits: some tokens c, some rows v of the head.

A block is "v c" or "c v"; ``axis`` says which of its axes is that of the vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iscorrect.gradients import scaled
from iscorrect.head.inputs import Head
from iscorrect.head.support import KeptIds
from iscorrect.ranks import Group, sum_over


class Kernels(NamedTuple):
    """The work on every logit beside the products.

    Attributes:
        total: (z, largest "c", axis) -> the new largest and Σ exp(z − largest), both "c".
        derivative: (z, reference "c", factor "c", axis, out) -> exp(z − reference) · factor in the
            dtype of ``out``; without a reference z · factor.
        scaled: (x, factor "", dtype) -> x · factor, rounded once.
        exponentials: whether ``total`` leaves exp(z − largest) in place of z.
    """

    total: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    derivative: Callable[[Tensor, Tensor | None, Tensor, int, Tensor], Tensor]
    scaled: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    exponentials: bool


def _total_in_place(z: Tensor, largest: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    largest = torch.maximum(largest, z.amax(axis))
    return largest, z.sub_(largest.unsqueeze(axis)).exp_().sum(axis)


def _derivative_in_place(
    z: Tensor, reference: Tensor | None, factor: Tensor, axis: int, out: Tensor
) -> Tensor:
    if reference is not None:
        z.sub_(reference.unsqueeze(axis)).exp_()
    # rounded by the kernel that multiplies
    return torch.mul(z, factor.unsqueeze(axis), out=out)


def _total(z: Tensor, before: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The compiler reads z once where the maximum that is subtracted is that of z alone."""
    here = z.amax(axis)
    total = (z - here.unsqueeze(axis)).exp().sum(axis)
    largest = torch.maximum(before, here)
    # a block that the support excludes has nothing but −inf
    return largest, torch.where(here == -torch.inf, 0, total * (here - largest).exp())


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (x * factor).to(dtype)


def _derivative(
    z: Tensor, reference: Tensor, factor: Tensor, axis: int, dtype: torch.dtype
) -> Tensor:
    return ((z - reference.unsqueeze(axis)).exp() * factor.unsqueeze(axis)).to(dtype)


EAGER = Kernels(_total_in_place, _derivative_in_place, scaled, exponentials=True)
"""Four passes over the logits and one, 24 and 6 bytes each where the result has 16 bits."""


def kernels_for(head: Head, dtype: torch.dtype) -> Kernels:
    """Those that a head asks for, where there are any: on a GPU, for float32 without a soft cap."""
    device = head.weight.device
    plain = device.type == "cpu" or head.softcap is not None or dtype != torch.float32
    return compiled(device) if head.compile_kernels and not plain else EAGER


@cache
def compiled(device: torch.device) -> Kernels:
    """One kernel that reads the logits, 4 bytes each, and one that reads them again, 6.

    torch.compile needs a compiler; without one these are the kernels of eager mode.
    """
    total, derivative, scaled = (_for_any_length(f) for f in (_total, _derivative, _scaled))
    z, one = torch.zeros(2, 3, device=device), torch.ones(2, device=device)
    try:
        total(z, one, 1)
        derivative(z, one, one, 1, torch.bfloat16)
        scaled(z, one[0], torch.bfloat16)
    except Exception as error:
        warnings.warn(f"the head's kernels stay eager: {error}", stacklevel=2)
        return EAGER

    def derivative_like(
        z: Tensor, reference: Tensor | None, factor: Tensor, axis: int, out: Tensor
    ) -> Tensor:
        made: Tensor = derivative(z, reference, factor, axis, out.dtype)
        return made

    return Kernels(total, derivative_like, scaled, exponentials=False)


def _for_any_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for matrices of so many columns and any number of rows.

    Where it may not count on the columns it reads one entry at a time.
    """
    made = torch.compile(function)

    def call(*arguments: object) -> object:
        for x in arguments:
            if isinstance(x, Tensor) and x.ndim:
                torch._dynamo.maybe_mark_dynamic(x, 0)
                if x.ndim == 2:
                    torch._dynamo.mark_static(x, 1)
        return made(*arguments)

    return call


class Entry(NamedTuple):
    """The target's entry of each token, where it is in these rows."""

    axis: int
    row: Tensor
    held: Tensor

    @classmethod
    def of(cls, target: Tensor, rows: slice, head: Head, axis: int) -> Entry:
        row = target - (head.start + rows.start)
        last = rows.stop - rows.start - 1
        return cls(axis, row.clamp(0, last).unsqueeze(axis), (row >= 0) & (row <= last))

    def replace(self, z: Tensor, value: Tensor | float, otherwise: Tensor) -> Tensor:
        """Write ``value``; returns what stood there, or ``otherwise``."""
        stood = z.gather(self.axis, self.row).squeeze(self.axis)
        new = torch.where(self.held, value, stood).to(z.dtype)
        z.scatter_(self.axis, self.row, new.unsqueeze(self.axis))
        return torch.where(self.held, stood, otherwise)


class Allowed(NamedTuple):
    """What the support allows.

    Attributes:
        token: "m", which token.
        row: "m", which row of the head.
        nothing: "c", tokens that no id is kept for.
        outside: "c", tokens with an id that the vocabulary does not have.
    """

    token: Tensor
    row: Tensor
    nothing: Tensor
    outside: Tensor

    @classmethod
    def of(cls, support: KeptIds | None, head: Head) -> Allowed | None:
        if support is None:
            return None
        counts, ids = support.offsets.diff(), support.ids
        token = torch.arange(len(counts), device=counts.device)
        token = token.repeat_interleave(counts, output_size=len(ids))
        wrong = ((ids < 0) | (ids >= head.vocabulary)).int()
        outside = torch.zeros_like(counts, dtype=torch.int32).index_add_(0, token, wrong)
        return cls(token, ids - head.start, counts == 0, outside > 0)

    def restrict(self, z: Tensor, rows: slice, axis: int) -> None:
        """Other logits become −inf; those of tokens without a support stay."""
        row, n = self.row - rows.start, rows.stop - rows.start
        # one row more, for those of other blocks
        allowed = torch.zeros(n + 1, len(self.nothing), dtype=torch.bool, device=z.device)
        kept = torch.ones((), dtype=torch.bool, device=z.device)
        allowed[torch.where((row >= 0) & (row < n), row, n), self.token] = kept
        z.masked_fill_(~(allowed[:-1] | self.nothing).movedim(0, axis), -torch.inf)


class Moments:
    """Mean and spread of a token's logits under the softmax, merged block by block.

    u is a logit less the running maximum:

    weight = Σ e^u,  first = Σ e^u u,  second = Σ e^u (u − first/weight)²
    """

    def __init__(self, lowest: Tensor, axis: int):
        self.largest, self.axis = lowest, axis
        self.weight = self.first = self.second = torch.zeros_like(lowest)

    def add(self, z: Tensor) -> None:
        """Logits of a block."""
        largest = z.amax(self.axis)
        block = Moments(torch.maximum(self.largest, largest), self.axis)
        # what has probability 0 adds nothing
        u = (z - block.largest.unsqueeze(self.axis)).clamp_(min=-(torch.finfo(z.dtype).max ** 0.25))
        e = u.exp()
        block.weight, block.first = e.sum(self.axis), (e * u).sum(self.axis)
        mean = block.first / _positive(block.weight)
        block.second = e.mul_(u.sub_(mean.unsqueeze(self.axis)).square_()).sum(self.axis)
        self.join(block)

    def join(self, other: Moments) -> None:
        """Add the moments of other rows."""
        largest = torch.maximum(self.largest, other.largest)
        self._raise(largest)
        other._raise(largest)
        apart = other.first / _positive(other.weight) - self.first / _positive(self.weight)
        both = self.weight * other.weight / _positive(self.weight + other.weight)
        self.second = self.second + other.second + apart.square() * both
        self.weight, self.first = self.weight + other.weight, self.first + other.first

    def _raise(self, largest: Tensor) -> None:
        """Take them about another maximum."""
        shift, self.largest = self.largest - largest, largest
        fade = shift.exp()
        self.first = fade * (self.first + torch.where(self.weight > 0, self.weight * shift, 0))
        self.weight, self.second = fade * self.weight, fade * self.second

    def over(self, largest: Tensor, log_total: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """Entropy and variance of the surprisal, of the rows on all ranks."""
        self._raise(largest)
        mean = sum_over(self.first, group) / log_total.exp()
        apart = self.first / _positive(self.weight) - mean
        second = sum_over(self.second + self.weight * apart.square(), group)
        return log_total - mean, second / log_total.exp()


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)
