"""The token ids that a sampler kept at each position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from iscorrect.errors import describe, input_error


class Support(NamedTuple):
    """The token ids that the sampler kept at each position, as rows of different lengths (CSR).

    Attributes:
        ids: int "m", kept ids of position 0, then of position 1, and so on.
        offsets: int "n+1", rising from 0 to m; position i kept ids[offsets[i]:offsets[i+1]].
            Positions are those of the target, flattened.
    """

    ids: Tensor
    offsets: Tensor


def check_target(
    caller: str, target: Tensor, shape: tuple[int, ...], *, of: str, hint: str | None = None
) -> None:
    """Raise unless there is one token id for each position of ``of``."""
    integer = isinstance(target, Tensor) and not target.is_floating_point()
    if not integer or target.dtype == torch.bool:
        raise input_error(
            caller, "target", expected="an integer tensor `...`", got=describe(target),
            fix="pass token ids",
        )
    if target.shape == shape:
        return
    if shape and target.shape == (*shape[:-1], shape[-1] + 1):
        hint = f"{of} at t predict token t + 1: pass target[..., 1:]"
    raise input_error(
        caller, "target", expected=f"of shape {tuple(shape)}", got=describe(target),
        fix=hint or f"pass one token id per position of the {of}",
    )


def check_ids(caller: str, name: str, ids: Tensor, vocabulary: int) -> None:
    """Raise on a token id that the vocabulary does not have, where a look costs nothing.

    On a GPU it would make the host wait, and in a graph or under vmap there is no value to look
    at; there such a token's log-prob is NaN.
    """
    values = type(ids) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(ids)
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not values:
        return
    outside = (ids < 0) | (ids >= vocabulary)
    if bool(outside.any()):
        raise input_error(
            caller, name, expected=f"token ids in [0, {vocabulary}) where it counts",
            got=str(ids[outside][0].item()),
            fix="mask ignored positions, and give the head's full vocabulary",
        )


def check_support(caller: str, support: Tensor | Support, target: Tensor) -> None:
    """Raise unless either form is of as many positions as the target."""
    if isinstance(support, Support):
        if support.offsets.shape != (target.numel() + 1,) or support.ids.ndim != 1:
            raise input_error(
                caller, "support", expected=f"ids `m` and offsets `{target.numel() + 1}`",
                got=f"ids {describe(support.ids)}, offsets {describe(support.offsets)}",
                fix="give one more offset than there are target positions",
            )
    elif (not isinstance(support, Tensor) or support.is_floating_point()
          or support.shape[:-1] != target.shape):
        raise input_error(
            caller, "support", expected=f"int {(*target.shape, 'k')}, −1 in unused places",
            got=describe(support),
            fix="pad the kept ids of each position with −1, or pass Support(ids, offsets)",
        )


def as_rows(caller: str, support: Tensor | Support, target: Tensor) -> Support:
    """Either form of a support as rows of different lengths."""
    check_support(caller, support, target)
    if isinstance(support, Support):
        return support
    kept = support.reshape(target.numel(), support.shape[-1])
    used = kept >= 0
    return Support(kept[used], torch.nn.functional.pad(used.sum(1).cumsum(0), (1, 0)))


class KeptIds(NamedTuple):
    """Rows of a support, and where they begin as the host knows it too.

    Attributes:
        ids: int "m".
        offsets: int "n+1".
        bounds: the same numbers on the host, so that cutting rows out needs no synchronisation.
    """

    ids: Tensor
    offsets: Tensor
    bounds: list[int]

    @classmethod
    def of(cls, support: Support) -> KeptIds:
        """All rows; asks a GPU once for the offsets."""
        return cls(*support, support.offsets.tolist())

    def cut(self, part: slice) -> KeptIds:
        """Rows that follow one another."""
        start, stop, _ = part.indices(len(self.bounds) - 1)
        stop = max(start, stop)
        bounds = self.bounds[start : stop + 1]
        return KeptIds(
            self.ids[bounds[0] : bounds[-1]], self.offsets[start : stop + 1] - bounds[0],
            [x - bounds[0] for x in bounds],
        )

    def select(self, index: Tensor) -> KeptIds:
        """Any rows; asks a GPU once for their offsets."""
        lengths = self.offsets.diff()[index]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        bounds: list[int] = offsets.tolist()
        shift = self.offsets[:-1][index] - offsets[:-1]
        shift = shift.repeat_interleave(lengths, output_size=bounds[-1])
        places = torch.arange(len(shift), device=shift.device) + shift
        return KeptIds(self.ids[places], offsets, bounds)
