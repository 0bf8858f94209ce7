"""How tensors fit in FP16: what overflows, what becomes 0, what rounding costs.

FP16 has three bits more than BF16 and a far smaller range: from 65520 on it is infinite, below 2⁻¹⁴
it loses bits, and up to 2⁻²⁵ it is 0. All counts are of what ``x.to(torch.float16)`` makes of x.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from iscorrect.text import number, percent

Kind = Literal["weight", "activation", "gradient", "activation gradient"]

OVERFLOW = 65520.0
BF16_ROUNDING = 2**-9  # the largest relative error of rounding to BF16
MEASURED_AT_ONCE = 2**18  # entries


@dataclass(frozen=True)
class Range:
    """How one tensor, or the sum of several, fits in FP16.

    Attributes:
        name: of a parameter, or of the module that gave the tensor; "… (input)" where it took it.
        kind: weight, activation, gradient (of a parameter), or activation gradient.
        dtype: as stored.
        entries: how many.
        nonfinite: NaN or infinite as stored.
        nonzero: finite and not 0 as stored.
        overflow: finite as stored, infinite in FP16.
        zero: not 0 as stored, 0 in FP16.
        subnormal: below 2⁻¹⁴ in FP16, and not 0.
        largest: |x| of the finite entries.
        squares: Σ x² over the entries that are finite in FP16, as are the sums below.
        zero_squares: Σ x² over those that become 0.
        fp16_squares, bf16_squares: Σ (round(x) − x)².
        fp16_relative, bf16_relative: Σ ((round(x) − x) / x)² over entries that are not 0.
        octaves: of gradients, how many entries lie in (2^(k−1), 2^k], by k.
    """

    name: str
    kind: Kind
    dtype: str = ""
    entries: int = 0
    nonfinite: int = 0
    nonzero: int = 0
    overflow: int = 0
    zero: int = 0
    subnormal: int = 0
    largest: float = 0.0
    squares: float = 0.0
    zero_squares: float = 0.0
    fp16_squares: float = 0.0
    bf16_squares: float = 0.0
    fp16_relative: float = 0.0
    bf16_relative: float = 0.0
    octaves: Counter[int] = field(default_factory=Counter, repr=False)

    def __add__(self, other: Range) -> Range:
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        return replace(self, largest=max(self.largest, other.largest), **sums)

    @property
    def fp16_error(self) -> float:
        """‖FP16(x) − x‖ / ‖x‖."""
        # the squares of float64 entries below 2⁻⁵³⁷ are 0
        return math.sqrt(self.fp16_squares / self.squares) if self.squares else float(self.zero > 0)

    @property
    def bf16_error(self) -> float:
        """‖BF16(x) − x‖ / ‖x‖."""
        return math.sqrt(self.bf16_squares / self.squares) if self.squares else 0.0

    @property
    def zero_norm(self) -> float:
        """The share of the norm that becomes 0: √(Σ x² over ``zero`` / Σ x²)."""
        return math.sqrt(self.zero_squares / self.squares) if self.squares else float(self.zero > 0)

    @property
    def harm(self) -> str:
        """Why the tensor cannot be in FP16, by the rule of ``audit_fp16``; empty where it can."""
        reasons = []
        if self.nonfinite:
            reasons.append(f"{self.nonfinite:,} not finite")
        if self.overflow and "gradient" not in self.kind:
            reasons.append(f"{self.overflow:,} overflow, up to {number(self.largest)}")
        if self.kind == "weight" and 2 * self.zero > self.nonzero:
            reasons.append(f"{percent(self.zero / self.nonzero)} become 0")
        elif self.fp16_error > BF16_ROUNDING and "gradient" not in self.kind:
            reasons.append(f"loses {percent(self.fp16_error)} of its norm")
        return ", ".join(reasons)

    def to_dict(self) -> dict[str, Any]:
        """Counts, the largest entry, errors of the norm and of an entry (root mean square)."""
        nonzero = max(1, self.nonzero)
        return {
            "name": self.name, "kind": self.kind, "dtype": self.dtype,
            **{name: getattr(self, name) for name in COUNTS}, "largest": self.largest,
            "fp16_error": self.fp16_error, "bf16_error": self.bf16_error,
            "fp16_entry_error": math.sqrt(self.fp16_relative / nonzero),
            "bf16_entry_error": math.sqrt(self.bf16_relative / nonzero),
            "harm": self.harm,
        }


COUNTS = ("entries", "nonfinite", "nonzero", "overflow", "zero", "subnormal")
SUMS = (
    *COUNTS, "squares", "zero_squares", "fp16_squares", "bf16_squares", "fp16_relative",
    "bf16_relative", "octaves",
)


def measure(name: str, kind: Kind, x: Tensor) -> Range:
    """The range of a tensor, taken piece by piece.

    Args:
        name: of the tensor.
        kind: of the tensor.
        x: floating-point, of any shape.

    >>> r = measure("w", "weight", torch.tensor([65520.0, 65519.0, 1e-5, 2**-25, 0.0]))
    >>> r.overflow, r.subnormal, r.zero
    (1, 1, 1)
    """
    pieces = torch.split(x.detach().reshape(-1), MEASURED_AT_ONCE)
    start = Range(name, kind, str(x.dtype).removeprefix("torch."))
    return sum((_measure_flat(start, piece) for piece in pieces if piece.numel()), start)


def _measure_flat(empty: Range, x: Tensor) -> Range:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rounded = x.to(torch.float16).to(x.dtype)
    entries, nonfinite, overflow = x.numel(), 0, 0
    largest, nonzero = x.abs().amax(), int(x.count_nonzero())
    octaves = _octaves(x) if "gradient" in empty.kind else Counter[int]()
    if not rounded.abs().amax().isfinite():  # rare, and finding which takes long
        finite, fits = x.isfinite(), rounded.isfinite()
        nonfinite, overflow = int((~finite).sum()), int((finite & ~fits).sum())
        largest, nonzero = x.where(finite, 0).abs().amax(), nonzero - nonfinite
        x, rounded = x.where(fits, 0), rounded.where(fits, 0)
    survive = int(rounded.count_nonzero())
    zero = nonzero - overflow - survive
    subnormal = int((rounded.abs() < 2**-14).sum()) - (entries - survive)
    fp16, bf16 = rounded - x, x.to(torch.bfloat16) - x
    return replace(
        empty, entries=entries, nonfinite=nonfinite, nonzero=nonzero, overflow=overflow, zero=zero,
        subnormal=subnormal, largest=float(largest), squares=_squares(x),
        zero_squares=_squares(x[rounded == 0]) if zero else 0.0, fp16_squares=_squares(fp16),
        bf16_squares=_squares(bf16),
        fp16_relative=_squares((fp16 / x).nan_to_num(0)),  # 0 / 0 is no error
        bf16_relative=_squares((bf16 / x).nan_to_num(0)),
        octaves=octaves,
    )


def _squares(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64) ** 2)


def _octaves(x: Tensor) -> Counter[int]:
    mantissa, exponent = torch.frexp(x[x.isfinite() & (x != 0)])
    octaves = exponent - (mantissa.abs() == 0.5).int()
    lowest = int(octaves.min()) if octaves.numel() else 0
    counts = torch.bincount(octaves - lowest).tolist()
    return Counter({lowest + i: n for i, n in enumerate(counts) if n})
