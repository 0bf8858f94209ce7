"""May this model switch from BF16 to FP16, and with which loss scale."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from iscorrect.errors import describe, input_error, is_number
from iscorrect.fp16.checkpoints import FLOATS, Source, Stored, stored
from iscorrect.fp16.ranges import OVERFLOW, Kind, Range, measure
from iscorrect.text import Table, finite, number, percent, visible

PLURAL: dict[Kind, str] = {
    "weight": "weights", "activation": "activations", "gradient": "gradients",
    "activation gradient": "activation gradients",
}

MOST = 12  # tensors that are printed


class Scales(NamedTuple):
    """Loss scales, powers of two: ``smallest`` saves the small gradients, ``largest`` the large."""

    smallest: float
    largest: float


@dataclass(frozen=True)
class FP16Audit:
    """What :func:`audit_fp16` found; printing it shows the tables and the verdict.

    Attributes:
        rows: one per tensor; activations in the order of the forward pass, their gradients in that
            of the backward pass.
        skipped: dtype of each tensor that is not a float of 16 bits or more, by name.
        underflow: the share of gradient entries that may become 0.
    """

    rows: tuple[Range, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    underflow: float = 0.01

    def of(self, *kinds: Kind) -> list[Range]:
        """The rows of these kinds."""
        return [row for row in self.rows if row.kind in kinds]

    def total(self, kind: Kind) -> Range:
        """The sum over the rows of a kind."""
        return sum(self.of(kind), start=Range(PLURAL[kind], kind))

    @property
    def totals(self) -> list[Range]:
        """The sum of each kind that was seen."""
        return [self.total(kind) for kind in PLURAL if self.of(kind)]

    @property
    def scales(self) -> Scales | None:
        """Which loss scales the gradients need and stand; None where they were not seen.

        From ``smallest`` on, at most ``underflow`` of the nonzero entries of the parameters'
        gradients become 0; up to ``largest``, no gradient overflows. Where the first exceeds the
        second, no loss scale will do.
        """
        gradients = self.total("gradient")
        if not gradients.nonzero:
            return None
        lost = 0
        for octave in sorted(gradients.octaves):
            lost += gradients.octaves[octave]
            if lost > self.underflow * gradients.nonzero:
                break
        # an entry of (2^(k−1), 2^k] is rounded to the least number, 2⁻²⁴, or more from 2^(−24−k) on
        smallest = 2.0 ** (-24 - octave)
        largest = max(row.largest for row in self.of("gradient", "activation gradient"))
        mantissa, exponent = math.frexp(OVERFLOW / largest)
        return Scales(smallest, 2.0 ** (exponent - 1 - (mantissa == 0.5)))

    @property
    def scale(self) -> float | None:
        """The loss scale nearest to 1 that will do; None where none will, or none is known."""
        if self.scales is None or self.scales.smallest > self.scales.largest:
            return None
        return min(max(1.0, self.scales.smallest), self.scales.largest)

    @property
    def harms(self) -> list[tuple[Range, str]]:
        """The tensors that keep the model from FP16, and why: weights, the worst first; others."""
        harms = [(row, row.harm) for row in self.rows if row.harm]
        if self.scales and self.scale is None:
            needed = self.scales.smallest
            harms += [
                (row, f"overflows at the scale {_power(needed)} that the small need")
                for row in self.of("gradient", "activation gradient")
                if row.largest * needed >= OVERFLOW
            ]
        return sorted(harms, key=lambda harm: _order(harm[0]))

    @property
    def verdict(self) -> Literal["safe", "safe with loss scaling", "not safe"]:
        """"safe" only where gradients were seen and need no loss scale."""
        if self.harms:
            return "not safe"
        return "safe" if self.scale == 1 else "safe with loss scaling"

    @property
    def ending(self) -> str:
        """The verdict with what it rests on, as one line."""
        if self.harms:
            names = [visible(row.name) for row, _ in self.harms]
            more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
            return f"not safe because of these tensors: {', '.join(names[:MOST])}{more}"
        if self.scale == 1:
            return "safe: these gradients need no loss scale (fp16_scaler guards later ones)"
        if self.scales:
            start = _power(min(self.scales.largest, 2.0**16))
            return f"safe with loss scaling: fp16_scaler(device, scale={start.replace('^', '**')})"
        seen, unseen, how = (
            ("weights and activations", "gradients", "loss") if self.of("activation")
            else ("weights", "activations and gradients", "inputs=…, loss")
        )
        return (
            f"safe with loss scaling, as far as {seen} can tell: {unseen} were not seen"
            f" (audit_fp16(model, {how}=…) looks at them)"
        )

    def blocks(self) -> list[str | Table]:
        """Tables and lines that say what was found; the last is the verdict."""
        blocks: list[str | Table] = []
        if self.skipped:
            dtypes = Counter(self.skipped.values())
            skipped = ", ".join(f"{n:,} of {dtype}" for dtype, n in dtypes.items())
            blocks.append(f"Skipped, being no floats of 16 bits or more: {skipped}.\n")
        blocks.append(Table(
            "What FP16 makes of it",
            ["", "entries", "largest", "overflow", "to 0", "subnormal", "error", "in BF16"],
            [[f"{len(self.of(total.kind)):,} {total.name}", f"{total.entries:,}",
              number(total.largest), f"{total.overflow:,}", f"{total.zero:,}",
              f"{total.subnormal:,}", percent(total.fp16_error), percent(total.bf16_error)]
             for total in self.totals],
        ))
        if any(row.dtype == "bfloat16" for row in self.of("weight")):
            blocks.append("Weights stored in BF16 are exact in FP16 from 2^-17 to 65504.")
        if activations := self.of("activation"):
            peak = max(activations, key=lambda row: row.largest)
            room = number(OVERFLOW / peak.largest) if peak.largest else "∞"
            blocks.append(f"Largest activation: {number(peak.largest)} at {visible(peak.name)};"
                          f" FP16 has room for {room} times as much.")
            if first := next((row for row in activations if row.overflow), None):
                blocks.append(f"The first to overflow is {visible(first.name)}.")
        if self.scales:
            blocks += self._of_scales(self.scales)
        if harms := self.harms:
            blocks += ["", Table(
                "Not safe in FP16", ["tensor", "because"],
                [[visible(row.name), because if row.kind == "weight" else f"{row.kind}: {because}"]
                 for row, because in harms[:MOST]],
            )]
            if len(harms) > MOST:
                blocks.append(f"… and {len(harms) - MOST:,} more; --json or .harms has all.")
        return [*blocks, f"\n{self.ending[0].upper()}{self.ending[1:]}"]

    def _of_scales(self, scales: Scales) -> list[str]:
        total = self.total("gradient")
        lines = [
            f"Without loss scaling {percent(total.zero / total.nonzero)} of the gradients' nonzero"
            f" entries become 0, {percent(total.zero_norm)} of their"
            f" norm. At most {percent(self.underflow)} do from a scale of {_power(scales.smallest)}"
            f" on; nothing overflows up to {_power(scales.largest)}."
        ]
        return lines if self.scale is not None else [*lines, "So no loss scale will do."]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        held: dict[str, Any] = finite({
            "verdict": self.verdict, "ending": self.ending,
            "harms": [
                {"name": row.name, "kind": row.kind, "because": because}
                for row, because in self.harms
            ],
            "scale": self.scale, "scales": self.scales and self.scales._asdict(),
            "totals": {total.kind: total.to_dict() for total in self.totals},
            "tensors": [row.to_dict() for row in self.rows], "skipped": dict(self.skipped),
        })
        return held

    def __str__(self) -> str:
        return "\n".join(map(str, self.blocks()))


def _order(row: Range) -> tuple[float, float]:
    worst = (-row.nonfinite - row.overflow, -row.fp16_error)
    return worst if row.kind == "weight" else (1, 0)


def _power(scale: float) -> str:
    return f"2^{math.frexp(scale)[1] - 1}"


def audit_fp16(
    source: Source,
    *,
    inputs: Mapping[str, Any] | Sequence[Any] | Tensor | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    underflow: float = 0.01,
) -> FP16Audit:
    """Whether a model may switch from BF16 to FP16, and which tensors keep it from that.

    A weight or an activation is harmful where

    * an entry overflows, or is not finite to begin with;
    * ‖FP16(x) − x‖ > 2⁻⁹ ‖x‖: FP16 takes a larger share of its norm than BF16 may of any tensor.
      A few subnormal entries are normal in a trained model, and they pass, for they are off by no
      more than 2⁻²⁵; a tensor of such entries does not pass;
    * of a weight, more than half of the nonzero entries become 0, however small they are beside
      the others.

    Gradients are judged by the loss scale that they need. Adam divides each entry by its own size,
    so it is how many become 0 that counts, not their norm.

    Weights alone tell little: what overflows is mostly activations, and how much scaling gradients
    need shows in gradients only. Without ``loss`` the verdict is at best "safe with loss scaling",
    as far as what was seen can tell. Tensors inside a module's own arithmetic, such as attention
    scores, are not seen at all.

    Args:
        source: a model; its state dict; or a path: a `.safetensors` file, a directory of them with
            or without index, or a `.bin` or `.pt` file with a state dict. `.safetensors` are read
            piece by piece, in memory that does not grow with the checkpoint.
        inputs: what the model is called with, as ``model(**inputs)``, ``model(*inputs)`` or
            ``model(inputs)``. It runs in its own dtype, which should be FP32 or BF16, in eval mode.
        loss: of the model's output, a scalar, divided by as much as in training.
        underflow: share of the nonzero entries of the parameters' gradients that may become 0.

    Returns:
        An :class:`FP16Audit`; print it.

    Raises:
        InputError: a path that cannot be read, or arguments that do not go together.

    References:
        Micikevicius et al., Mixed Precision Training, arXiv 1710.03740: underflow of gradients.
        Qi et al., arXiv 2510.26788: FP16 against the mismatch of reinforcement learning.

    >>> audit = audit_fp16({"fine": torch.ones(3), "large": torch.tensor([1e5, 65519.0])})
    >>> audit.verdict, [(row.name, reason) for row, reason in audit.harms]
    ('not safe', [('large', '1 overflow, up to 1.00e+05')])
    """
    if not (is_number(underflow) and 0 <= underflow < 1):
        raise input_error(
            "audit_fp16", "underflow", expected="a share in [0, 1)", got=repr(underflow),
            fix="pass underflow=0.01",
        )
    if inputs is not None and not isinstance(source, nn.Module):
        raise input_error(
            "audit_fp16", "source", expected="a model where `inputs` are given",
            got=describe(source), fix="pass the nn.Module itself",
        )
    if not (inputs is None or isinstance(inputs, Mapping | Sequence | Tensor)):
        raise input_error(
            "audit_fp16", "inputs", expected="a dict, a sequence or a tensor",
            got=describe(inputs), fix="pass what the model is called with",
        )
    if loss is not None and inputs is None:
        raise input_error(
            "audit_fp16", "inputs", expected="given where `loss` is", got="None",
            fix="pass what the model is called with",
        )
    audit = audit_weights("audit_fp16", stored("audit_fp16", source))
    seen = []
    if isinstance(source, nn.Module) and inputs is not None:
        seen = _watched(source, inputs, loss)
    return FP16Audit((*audit.rows, *seen), audit.skipped, underflow)


def audit_weights(caller: str, tensors: Iterable[Stored]) -> FP16Audit:
    """The audit of weights alone; a tied one counts once.

    Args:
        caller: what messages begin with.
        tensors: of :func:`iscorrect.fp16.checkpoints.stored`.

    Raises:
        InputError: none of them is a float of 16 bits or more.
    """
    rows, skipped = [], {}
    for name, dtype, pieces, first in tensors:
        if name != first:
            continue
        if dtype in FLOATS.values():
            ranges = (measure(name, "weight", piece) for piece in pieces)
            rows.append(sum(ranges, Range(name, "weight", dtype)))
        else:
            skipped[name] = dtype
    if not rows:
        raise input_error(
            caller, "source", expected="weights in FP64, FP32, BF16 or FP16",
            got=", ".join(sorted(set(skipped.values()))) or "no tensor",
            fix="pass the checkpoint as it was before quantisation" if skipped else "pass another",
        )
    return FP16Audit(tuple(rows), skipped)


def _watched(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any] | Tensor,
    loss: Callable[[Any], Tensor] | None,
) -> list[Range]:
    """Ranges of activations and gradients of one call, in the order in which they arise."""
    seen: dict[tuple[str, Kind], Range] = {}

    def record(name: str, kind: Kind, x: Tensor) -> None:
        row = measure(name, kind, x)
        seen[name, kind] = seen[name, kind] + row if (name, kind) in seen else row

    def watch(name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: Any, named: Any) -> None:
            for x in _tensors([args, named]):
                record(f"{name} (input)", "activation", x)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            for x in _tensors(output):
                record(name, "activation", x)
                if x.requires_grad and x.ndim:  # the loss itself stays in float32
                    hook = partial(record, name, "activation gradient")
                    hooks.enter_context(x.register_hook(hook))  # type: ignore[no-untyped-call]

        # what functions make between modules, such as gate × up, shows where a leaf takes it
        if not any(True for _ in module.children()):
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.enter_context(module.register_forward_hook(after))

    modes = {module: module.training for module in model.modules()}
    with contextlib.ExitStack() as hooks:
        try:
            for name, module in model.named_modules():
                watch(name or type(model).__name__, module)
            with torch.set_grad_enabled(loss is not None):
                output = _call(model.eval(), inputs)
                gradients = {} if loss is None else _gradients(model, loss(output))
        finally:
            for module, training in modes.items():
                module.training = training
    for name, gradient in gradients.items():
        record(name, "gradient", gradient)
    return list(seen.values())


def _call(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any] | Tensor) -> Any:
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _tensors(x: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested outputs."""
    if isinstance(x, Tensor):
        if x.is_floating_point():
            yield x
    elif isinstance(x, Mapping):
        yield from _tensors(list(x.values()))
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(x):
        yield from _tensors(list(vars(x).values()))


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad and parameters):
        raise input_error(
            "audit_fp16", "loss", expected="a scalar that depends on parameters with gradient",
            got=describe(loss), fix="return the loss itself, and let the parameters require grad",
        )
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    if not any(g.any() for g in gradients.values()):
        raise input_error(
            "audit_fp16", "loss", expected="one whose gradient is not 0", got="a gradient of zeros",
            fix="pass inputs and a loss as in training, with advantages that are not 0",
        )
    return gradients
