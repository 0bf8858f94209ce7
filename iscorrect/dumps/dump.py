"""Log-probs of both sides for the same tokens, with what is known of each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from iscorrect.errors import check_mask, check_per_token, describe, input_error

Array: TypeAlias = npt.NDArray[Any]
Row: TypeAlias = dict[str, Any]
"""One sequence: canonical names to arrays of its tokens, or to a number for the sequence."""

PER_TOKEN = {
    "rollout_log_probs": np.float32,
    "old_log_probs": np.float32,
    "mask": np.bool_,
    "log_probs": np.float32,
    "token_ids": np.int64,
    "advantages": np.float32,
    "entropy": np.float32,
    "varentropy": np.float32,
}

TOP = "top_k_log_probs"

PER_CANDIDATE = {"top_k_ids": np.int64, TOP: np.float32}

PER_SEQUENCE = ("step", "policy_version", "group")

INTEGERS = ("token_ids", "top_k_ids", *PER_SEQUENCE)

REQUIRED = ("rollout_log_probs", "old_log_probs", "mask")

LOG_PROBS = ("rollout_log_probs", "old_log_probs", "log_probs")


@dataclass(frozen=True, eq=False, kw_only=True)
class LogProbDump:
    """What the engine and the trainer said about the same tokens.

    Args:
        rollout_log_probs: "b t", log μ, nats, as the engine reported.
        old_log_probs: "b t", log π_old, nats, the trainer's at the weights the rollout used.
        mask: bool "b t", the tokens that enter the loss; other positions may hold anything.
        log_probs: "b t", log π, nats, of the policy being trained.
        token_ids: int "b t".
        advantages: "b t".
        entropy: "b t", of the trainer's distribution, nats.
        varentropy: "b t", variance of the trainer's log-probs under its own distribution, nats².
        step: int "b", of the training run.
        policy_version: int "b", of the weights that the engine held.
        group: int "b", same number for answers to the same prompt.
        top_k_ids: int "b t k", the engine's likeliest tokens, likeliest first.
        top_k_log_probs: "b t k", what the engine reported for them.

    Raises:
        InputError: shapes or dtypes do not fit together.

    >>> dump = LogProbDump(
    ...     rollout_log_probs=torch.tensor([[-1.0, -2.0]]),
    ...     old_log_probs=torch.tensor([[-1.1, -1.9]]), mask=torch.tensor([[True, True]]),
    ... )
    >>> dump.num_tokens
    2
    """

    rollout_log_probs: Tensor
    old_log_probs: Tensor
    mask: Tensor
    log_probs: Tensor | None = None
    token_ids: Tensor | None = None
    advantages: Tensor | None = None
    entropy: Tensor | None = None
    varentropy: Tensor | None = None
    step: Tensor | None = None
    policy_version: Tensor | None = None
    group: Tensor | None = None
    top_k_ids: Tensor | None = None
    top_k_log_probs: Tensor | None = None

    def __post_init__(self) -> None:
        check_mask("LogProbDump", self.mask)
        if self.mask.ndim != 2:
            raise input_error(
                "LogProbDump", "mask", expected="of two axes, `b t`", got=describe(self.mask),
                fix="pad the sequences with iscorrect.pad_sequences, or pass x[None] for one",
            )
        given = self.given()
        floats: dict[str, Any] = {n: x for n, x in given.items() if PER_TOKEN.get(n) is np.float32}
        check_per_token("LogProbDump", self.mask, **floats)
        for name, x in given.items():
            if name in INTEGERS and (x.is_floating_point() or x.dtype == torch.bool):
                raise input_error(
                    "LogProbDump", name, expected="a tensor of whole numbers", got=describe(x),
                    fix=f"pass {name}.long()",
                )
            if name in PER_SEQUENCE:
                expected = tuple(self.mask.shape[:1])
            elif name in PER_CANDIDATE:
                expected = (*self.mask.shape, *x.shape[2:3])
            else:
                expected = tuple(self.mask.shape)
            if tuple(x.shape) != expected:
                raise input_error(
                    "LogProbDump", name, expected=f"of shape {expected}", got=describe(x),
                    fix="pass values of the same sequences and tokens as the mask",
                )

    def given(self) -> dict[str, Tensor]:
        """The tensors of this dump by name, without those that are None."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in named.items() if x is not None}

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def num_tokens(self) -> int:
        """How many tokens count."""
        return int(torch.count_nonzero(self.mask))

    def rows(self, index: Tensor | slice) -> LogProbDump:
        """Some of the sequences, as often as ``index`` names them."""
        return LogProbDump(**{name: x[index] for name, x in self.given().items()})

    def __repr__(self) -> str:
        optional = ", ".join(name for name in self.given() if name not in REQUIRED)
        return f"LogProbDump({len(self)} sequences, {self.num_tokens} tokens; {optional or '-'})"


def concatenate(dumps: Sequence[LogProbDump]) -> LogProbDump:
    """All sequences of several dumps, with the fields that every one of them has.

    Raises:
        InputError: there is none.
    """
    if not dumps:
        raise input_error(
            "concatenate", "dumps", expected="at least one dump", got="none",
            fix="pass the dumps to join",
        )
    names = [n for n in dumps[0].given() if all(getattr(d, n) is not None for d in dumps)]
    width = max(dump.mask.shape[1] for dump in dumps)
    joined = {}
    for name in names:
        parts = [getattr(dump, name) for dump in dumps]
        if name not in PER_SEQUENCE:
            deep = max(x.shape[2] for x in parts) if name in PER_CANDIDATE else None
            sides = (width,) if deep is None else (width, deep)
            parts = [_widened(x, sides, -torch.inf if name == TOP else 0) for x in parts]
        joined[name] = torch.cat(parts)
    return LogProbDump(**joined)


def _widened(x: Tensor, sides: tuple[int, ...], fill: float) -> Tensor:
    """"b t …" filled up to the given sides after the first."""
    wide = x.new_full((len(x), *sides), fill)
    wide[tuple(slice(side) for side in x.shape)] = x
    return wide
