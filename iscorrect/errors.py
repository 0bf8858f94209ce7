"""The one exception of the library, and the checks that raise it.

Checks read shapes, dtypes, devices and ``requires_grad`` only, never values: they cost under a
microsecond and never synchronise with the device.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


class InputError(ValueError):
    """An argument that cannot be used, and what to pass instead."""


def input_error(caller: str, argument: str, *, expected: str, got: str, fix: str) -> InputError:
    """The error that every check raises, with its message in one form.

    >>> print(input_error("Truncate", "cap", expected="a number > 0", got="-1", fix="pass cap=2"))
    Truncate: `cap` must be a number > 0, got -1. Fix: pass cap=2.
    """
    end = "" if fix.endswith("?") else "."
    return InputError(f"{caller}: `{argument}` must be {expected}, got {got}. Fix: {fix}{end}")


def describe(x: object) -> str:
    """Dtype and shape of a tensor, type of anything else, as messages print them.

    >>> describe(torch.zeros(2, 3))
    'float32 (2, 3)'
    """
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    return type(x).__name__


def is_part(x: object) -> bool:
    """Whether ``x`` can be called on tensors: a callable, and not the class of one.

    >>> is_part(len), is_part(int)
    (True, False)
    """
    return callable(x) and not isinstance(x, type)


def check_choice(caller: str, argument: str, value: object, known: Sequence[object]) -> None:
    """Raise unless ``value`` is one of some names.

    >>> check_choice("group_advantages", "estimator", "rloo", ["grpo", "rloo"])
    """
    if not (isinstance(value, str) and value in known):
        near = difflib.get_close_matches(str(value), [str(name) for name in known], n=1)
        raise input_error(
            caller, argument, expected="one of " + ", ".join(map(repr, known)), got=repr(value),
            fix=f"did you mean {near[0]!r}?" if near else f"pass {argument}={known[0]!r}",
        )


def check_flag(caller: str, argument: str, value: object) -> None:
    """Raise unless ``value`` is True or False; other truthy things, such as "no", are refused.

    >>> check_flag("Correction", "normalize", False)
    """
    if not isinstance(value, bool):
        raise input_error(
            caller, argument, expected="True or False", got=repr(value),
            fix=f"pass {argument}=True or {argument}=False; in text true or false",
        )


def is_integer(x: Tensor) -> bool:
    """Whether a tensor holds integers: no floats, complex numbers or bools.

    >>> is_integer(torch.tensor([1])), is_integer(torch.tensor([True]))
    (True, False)
    """
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def is_number(x: object) -> bool:
    """Whether ``x`` is a real number, numpy's included, and no bool.

    >>> is_number(2), is_number(True)
    (True, False)
    """
    return isinstance(x, Real) and not isinstance(x, bool)


def check_shape(caller: str, argument: str, x: Tensor, mask: Tensor, what: str) -> None:
    """Raise unless what a part of the user's returned has the mask's shape.

    >>> check_shape("Correction", "bound", torch.ones(2), torch.ones(2).bool(), "weights")
    """
    if x.shape != mask.shape:
        raise input_error(
            caller, argument, expected=f"to return {what} of shape {tuple(mask.shape)}",
            got=describe(x), fix="keep the token axis: a value of a whole sequence stands on each"
            " of its tokens, as evidence.layout.sequence_total gives it",
        )


def check_number(
    caller: str,
    argument: str,
    value: object,
    what: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    optional: bool = False,
    whole: bool = False,
    fix: str | None = None,
) -> None:
    """Raise unless ``value`` is a real number in a range.

    Args:
        caller: what the message begins with.
        argument: its name.
        value: what was given.
        what: the quantity and its unit, such as "a divergence in nats".
        least: the smallest that will do.
        above: what it must exceed.
        most: the largest that will do.
        optional: whether None will do.
        whole: whether it must be a whole number.
        fix: what to pass instead; None: ``what`` says it.

    >>> check_number("BinaryKL", "limit", 0.1, "a divergence in nats", least=0)
    >>> check_number("ESSCap", "target", 2, "a share of the sample", above=0, most=1)
    Traceback (most recent call last):
        ...
    iscorrect.errors.InputError: ESSCap: `target` must be in (0, 1], a share of the sample, got 2. \
Fix: pass target as a share of the sample.
    """
    if value is None and optional:
        return
    number = is_number(value) and (not whole or isinstance(value, Integral))
    if number and least <= value <= most and value > above:  # type: ignore[operator]
        return
    kind = "a whole number" if whole else "a number"
    if most < math.inf:
        expected = f"in ({above:g}" if above > -math.inf else f"in [{least:g}"
        expected += f", {most:g}]"
    elif above > -math.inf:
        expected = f"{kind} > {above:g}"
    else:
        expected = f"{kind} >= {least:g}" if least > -math.inf else kind
    raise input_error(
        caller, argument, expected=f"{expected}, {what}{', or None' if optional else ''}",
        got=repr(value), fix=fix or f"pass {argument} as {what}",
    )


def import_extra(caller: str, module: str, extra: str) -> Any:
    """A module of an optional package.

    Args:
        caller: what the message begins with.
        module: its name.
        extra: of this package, which brings it too.

    Raises:
        InputError: it is not installed.

    >>> import_extra("read_dump", "json", "parquet").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise input_error(
            caller, package, expected="an installed package", got="none that can be imported",
            fix=f"pip install {package}, which the extra {extra!r} brings too",
        ) from error


def check_mask(
    caller: str, mask: object, argument: str = "mask", *, expected: str = "a bool tensor"
) -> None:
    """Raise unless ``mask`` is a bool tensor with a token axis."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise input_error(
            caller, argument, expected=expected, got=describe(mask),
            fix=f"pass {argument}.bool()" if isinstance(mask, Tensor) else "pass a bool tensor,"
            " True where a token counts",
        )
    if mask.ndim == 0:
        raise input_error(
            caller, argument, expected="at least one-dimensional (its last axis is the token)",
            got=describe(mask), fix="pass the mask as `b t`",
        )


def check_floating(caller: str, **tensors: object) -> None:
    """Raise unless every tensor is of floating-point numbers of 16 bits or more.

    >>> check_floating("k3", log_ratio=torch.zeros(2))
    """
    for name, x in tensors.items():
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.element_size() > 1):
            raise input_error(
                caller, name, expected="a floating-point tensor of 16 bits or more",
                got=describe(x), fix="pass a torch tensor of float32 or wider",
            )


def check_per_token(
    caller: str, mask: Tensor, *, called: str = "mask", gradient: Sequence[str] = (),
    optional: Sequence[str] = (), **tensors: Tensor | None,
) -> None:
    """Raise unless every tensor is floating, shaped and placed like ``mask``.

    Args:
        caller: what the message begins with.
        mask: bool "b t".
        called: the name that the mask has as an argument.
        gradient: names of the tensors that may carry gradient; the others may not.
        optional: names of those that may be None.
        tensors: by argument name.
    """
    for name, x in tensors.items():
        if x is None and name in optional:
            continue
        check_floating(caller, **{name: x})
        assert x is not None
        if x.shape != mask.shape:
            raise input_error(
                caller, name, expected=f"of shape {tuple(mask.shape)} like `{called}`",
                got=describe(x), fix=_shape_hint(x, mask),
            )
        if x.device != mask.device:
            raise input_error(
                caller, name, expected=f"on {mask.device} like `{called}`", got=str(x.device),
                fix=f"pass {name}.to({called}.device)",
            )
        if x.requires_grad and name not in gradient and torch.is_grad_enabled():
            raise input_error(
                caller, name, expected="without gradient", got="a tensor that requires grad",
                fix=f"pass {name}.detach(), or look whether it was swapped with `log_probs`",
            )


def _shape_hint(x: Tensor, mask: Tensor) -> str:
    if x.ndim == 1:
        return (
            "pass one number per token: of values per packed sequence, values[ids], with ids the"
            " sequence of each token"
        )
    if x.ndim == mask.ndim and x.shape[:-1] == mask.shape[:-1]:
        if abs(x.shape[-1] - mask.shape[-1]) == 1:
            return (
                "one token too many or too few: log-probs of the next token belong to positions 1.."
                " of the mask, so slice mask[..., 1:] and log-probs alike"
            )
        return "pass both over the same tokens (response only, or prompt and response)"
    if x.ndim == 2 and x.T.shape == mask.shape:
        return "the axes are swapped: pass `b t`, not `t b`"
    return "pass all per-token tensors as `b t`, padded alike"
