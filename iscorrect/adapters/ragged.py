"""Lists with one tensor per sample, as rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from iscorrect.errors import describe, input_error
from iscorrect.layout import pad_sequences


def pad_together(
    caller: str, fix: str, **lists: Sequence[Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Pad lists that describe the same samples.

    Args:
        caller: named in errors.
        fix: how the caller's user gets lists of one length.
        lists: by name, "t_i" for sample i.

    Returns:
        each list as "b t", filled with 0, and which positions exist, bool "b t".

    Raises:
        InputError: a list has another number of samples, or a sample another number of tokens,
            than in the first list.

    >>> import torch
    >>> padded, present = pad_together("f", "", a=[torch.ones(2), torch.ones(1)])
    >>> padded["a"].tolist(), present.tolist()
    ([[1.0, 1.0], [1.0, 0.0]], [[True, True], [True, False]])
    """
    check_together(caller, fix, **lists)
    rows = {name: pad_sequences(tensors) for name, tensors in lists.items()}
    present = next(iter(rows.values()))[1]
    return {name: padded for name, (padded, _) in rows.items()}, present


def check_together(caller: str, fix: str, **lists: Sequence[Tensor]) -> None:
    """Raise unless lists hold as many samples, and each sample as many tokens, as the first."""
    (first, expected), *others = lists.items()
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if not isinstance(x, Tensor) or not x.ndim:
                raise input_error(
                    caller, f"{name}[{i}]", expected="a tensor `t`", got=describe(x), fix=fix
                )
    for name, tensors in others:
        if len(tensors) != len(expected):
            raise input_error(
                caller, name, expected=f"{len(expected)} samples like {first}",
                got=str(len(tensors)), fix=fix,
            )
        for i, (x, y) in enumerate(zip(tensors, expected, strict=True)):
            if len(x) != len(y):
                raise input_error(
                    caller, f"{name}[{i}]", expected=f"{len(y)} tokens long like {first}[{i}]",
                    got=str(len(x)), fix=fix,
                )
