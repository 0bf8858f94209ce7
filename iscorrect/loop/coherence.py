"""How large a batch shows the bias of an uncorrected gradient: what of it the sequences share."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from iscorrect.errors import check_number, describe, input_error
from iscorrect.ranks import Group, sum_over

FEWEST = 4
"""Batches without which there is no error to speak of."""

ALIKE = 2.0**-40
"""The noise over the squared length of gradients that differ by float32's rounding alone."""

SIZE = 8191
"""Numbers in a sketch: a prime, so that no width of a matrix divides it."""

PART = 1 << 24
"""Elements of a gradient that are sketched at a time."""


class Coherence(NamedTuple):
    """What of an uncorrected gradient's bias is shared, in units of the sampling noise.

    All are NaN where it was not measured: the batches are alike, or all but one of them are.

    Attributes:
        n_star: sequences in a batch from which on the shared bias exceeds the noise; inf where the
            estimate of what is shared is not positive.
        low: the least n* that the batches allow, at two standard errors; infinite where they show
            that nothing is shared.
        high: the largest; infinite where they do not show that anything is.
        share: 1/n*, the squared shared bias over the noise of one sequence; without bias, so that
            it may be negative.
        error: its standard error.
    """

    n_star: float
    low: float
    high: float
    share: float
    error: float


def coherence(uncorrected: Tensor, corrected: Tensor, *, sequences: float) -> Coherence:
    """From which batch size on an uncorrected gradient is more biased than noisy.

        δ_i = g_i − c_i
        1/n* = mean_{i≠j} δ_i · δ_j / tr Cov(g of one sequence)

    g_i and c_i are the gradients of a batch with weights of 1 and with importance weights, on the
    same samples. Their difference has the bias as its expectation, and little noise. Errors that
    are drawn anew for every context, as those of rounding are, average out between batches, and
    what is left is shared: what a larger batch does not remove. Below n* sequences a batch the
    noise of one update hides it; above, it decides. Where it stays from update to update it adds
    up, and noise does not, so that it shows in a run long before it shows in an update.

    The noise is n tr Cov(g_i), n sequences a batch. The error comes from a jackknife over batches.

    Args:
        uncorrected: "i k", the gradients g_i of batches of different prompts, or a
            :class:`GradientSketch` of each.
        corrected: "i k", c_i; weights of :func:`iscorrect.token_is`, or of the correction that is
            in use.
        sequences: n.

    Raises:
        InputError: other shapes, fewer than four batches, or values that are not finite.

    References:
        Compare McCandlish et al., "An empirical model of large-batch training" (2018), whose
        critical batch size relates the same noise to the gradient.

    >>> generator = torch.Generator().manual_seed(0)
    >>> corrected = torch.randn(50, 1000, generator=generator)
    >>> shared = torch.full((1000,), 0.1)  # squared 10; the noise of one of 8 sequences is 8,000
    >>> 600 < coherence(corrected + shared, corrected, sequences=8).n_star < 1000
    True
    """
    _check(uncorrected, corrected)
    check_number("coherence", "sequences", sequences, "the sequences of a batch", above=0)
    g = uncorrected.detach().double()
    delta = g - corrected.detach().double()
    of_bias, of_noise = delta @ delta.T, g @ g.T
    share, without_each = _shares(of_bias, of_noise, sequences)
    n = len(g)
    spread = (without_each - without_each.mean()).square().sum()
    error = math.sqrt((n - 1) / n * float(spread))
    if math.isnan(share + error):
        return Coherence(*[math.nan] * 5)
    n_star, low, high = (
        1 / x if x > 0 else math.inf for x in (share, share + 2 * error, share - 2 * error)
    )
    return Coherence(n_star, low, high, share, error)


def _shares(of_bias: Tensor, of_noise: Tensor, sequences: float) -> tuple[float, Tensor]:
    """The share of all batches; and without each of them, "i"; from inner products "i i"."""

    def shared(products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum over pairs, over the diagonal, and of the pairs that each batch is in."""
        own = products.diagonal()
        pairs = products.sum(1) - own
        return pairs.sum(), own, pairs

    n = len(of_bias)
    bias, _, bias_of = shared(of_bias)
    noise, own, noise_of = shared(of_noise)

    def ratio(bias: Tensor, own: Tensor, noise: Tensor, n: int) -> Tensor:
        pairs = n * (n - 1)
        of_batch = own / n - noise / pairs
        share = (bias / pairs) / (sequences * of_batch)
        return share.where(of_batch > ALIKE * own / n, math.nan)

    every = ratio(bias, own.sum(), noise, n)
    without = ratio(bias - 2 * bias_of, own.sum() - own, noise - 2 * noise_of, n - 1)
    return float(every), without


def _check(uncorrected: Tensor, corrected: Tensor) -> None:
    for name, x in (("uncorrected", uncorrected), ("corrected", corrected)):
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape != uncorrected.shape:
            raise input_error(
                "coherence", name, expected="a tensor `i k` of a gradient for each batch",
                got=describe(x), fix="pass torch.stack(sketches), of the same batches for both",
            )
        if not bool(x.isfinite().all()):
            raise input_error(
                "coherence", name, expected="finite", got="NaN or ±inf",
                fix="leave out batches whose gradient overflowed",
            )
    if len(uncorrected) < FEWEST:
        raise input_error(
            "coherence", "uncorrected", expected=f"of at least {FEWEST} batches",
            got=str(len(uncorrected)), fix="gather more; a hundred give n* to a tenth or so",
        )


class GradientSketch:
    """A few thousand numbers in the place of a gradient, whose inner products are the same.

        sketch_k = Σ_{i ≡ k} s_i g_i,  s_i = ±1 at random; E sketch(g) · sketch(h) = g · h

    The error of an inner product is about ‖g‖ ‖h‖/√8191, and averages out over pairs of batches.
    One sketch takes 32 kB, a hundred pairs 6.4 MB; while it is made, ten bytes for each of at most
    2²⁴ elements, 160 MB. Signs are drawn again for every gradient, not kept.

    Args:
        seed: of the signs; on ranks that hold different parts of the parameters (FSDP, tensor
            parallelism), a different one on each.
        size: numbers in a sketch, a prime.
        group: those ranks, whose sketches are added up; None: this one holds all.

    Raises:
        InputError: another size than a whole number of at least 1, or a seed that is none; at the
            call: no gradient, or a sparse one.

    >>> sketch = GradientSketch()
    >>> g = [torch.ones(30, 10), None, torch.ones(5)]
    >>> bool((sketch(g) @ sketch(g) - 305).abs() < 30)
    True
    """

    def __init__(self, *, seed: int = 0, size: int = SIZE, group: Group = None) -> None:
        check_number(
            "GradientSketch", "size", size, "how many numbers a sketch has", least=1, whole=True,
            fix="leave size out, or pass size=8191",
        )
        check_number("GradientSketch", "seed", seed, "of the signs", whole=True, fix="pass seed=0")
        self.seed, self.size, self.group = int(seed), int(size), group

    @torch.no_grad()
    def __call__(self, gradients: Iterable[Tensor | None]) -> Tensor:
        """The sketch of a gradient; float32 "k", on its device.

        Args:
            gradients: of every parameter, in the same order each time; None is left out, and stands
                for zeros. Of a sharded tensor pass the local part.
        """
        if not isinstance(gradients, Iterable) or isinstance(gradients, Tensor):
            raise input_error(
                "GradientSketch", "gradients", expected="the gradient of every parameter",
                got=describe(gradients), fix="pass [p.grad for p in model.parameters()]",
            )
        total: Tensor | None = None
        for number, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if not isinstance(gradient, Tensor):
                raise input_error(
                    "GradientSketch", "gradients", expected="tensors, or None",
                    got=f"{describe(gradient)} as number {number}",
                    fix="pass [p.grad for p in model.parameters()]",
                )
            if gradient.layout != torch.strided:
                raise input_error(
                    "GradientSketch", "gradients", expected="dense",
                    got=f"{gradient.layout} as number {number}",
                    fix="build the embedding with sparse=False",
                )
            if hasattr(gradient, "full_tensor"):
                raise input_error(
                    "GradientSketch", "gradients", expected="plain tensors",
                    got=f"a DTensor as number {number}",
                    fix="pass p.grad.to_local(), with seed=rank and the ranks' group",
                )
            draws = self.seed * 1_000_003 + number
            generator = torch.Generator(gradient.device)
            generator.manual_seed(draws)
            if total is None:
                total = torch.zeros(
                    self.size, device=gradient.device, dtype=torch.float32
                )
            own = torch.zeros_like(total)
            # whole rows of the sketch, so that a place does not depend on where parts begin
            step = max(PART // self.size, 1) * self.size
            for part in torch.split(gradient.reshape(-1), step):
                signs = torch.empty_like(part, dtype=torch.int8).random_(2, generator=generator)
                signed = part.float() * (2 * signs - 1)
                whole = len(signed) // self.size * self.size
                own += signed[:whole].view(-1, self.size).sum(0)
                own[: len(signed) - whole] += signed[whole:]
            # or all tensors smaller than a sketch would meet in its first places
            total += own.roll(random.Random(draws).randrange(self.size))
        if total is None:
            raise input_error(
                "GradientSketch", "gradients", expected="at least one tensor", got="none",
                fix="call it after backward(), with [p.grad for p in model.parameters()]",
            )
        return sum_over(total, self.group)
