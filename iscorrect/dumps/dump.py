"""Log-probs of both sides for the same tokens, with what is known of each sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from iscorrect.dumps.names import common_names, is_unicode
from iscorrect.errors import check_mask, check_per_token, describe, input_error

Row: TypeAlias = dict[str, Any]
"""One sequence: canonical names to arrays of its tokens, or to its number or text."""

UNITS = ("version", "turn", "engine", "pack")

PER_TOKEN = {
    "rollout_log_probs": np.float32,
    "old_log_probs": np.float32,
    "mask": np.bool_,
    "log_probs": np.float32,
    "token_ids": np.int64,
    "advantages": np.float32,
    "entropy": np.float32,
    "varentropy": np.float32,
    **dict.fromkeys(UNITS, np.int64),
}

SPREAD = ("advantages", *UNITS)
"""Fields of tokens that may be given by one value for each sequence."""

TOP = "top_k_log_probs"

PER_CANDIDATE = {"top_k_ids": np.int64, TOP: np.float32}

PER_SEQUENCE = ("step", "policy_version", "group")

INTEGERS = ("token_ids", "top_k_ids", *UNITS, *PER_SEQUENCE)

IDS = ("policy_version", "group", "version", "engine")
"""Fields that may be text: numbers of :attr:`LogProbDump.names`."""

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
        advantages: "b t", or "b" for one of each sequence.
        entropy: "b t", of the trainer's distribution, nats.
        varentropy: "b t", variance of the trainer's log-probs under its own distribution, nats².
        version: int "b t", of the weights that sampled the token, or "b"; likewise the next three.
        turn: int "b t", of a conversation, counted from 0.
        engine: int "b t", which engine, rank or host sampled the token.
        pack: int "b t", how many sequences come before the token's in its packed row.
        step: int "b", of the training run: the version of the trainer's weights.
        policy_version: int "b", of the weights that the engine held, where it held the same
            throughout.
        group: int "b", same number for answers to the same prompt.
        top_k_ids: int "b t k", the engine's likeliest tokens, likeliest first.
        top_k_log_probs: "b t k", what the engine reported for them.
        names: for versions, engines and groups that are text: the field's texts, of which its
            tensor holds the numbers.

    A log-prob that is not finite stays where it is, to be counted.

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
    version: Tensor | None = None
    turn: Tensor | None = None
    engine: Tensor | None = None
    pack: Tensor | None = None
    step: Tensor | None = None
    policy_version: Tensor | None = None
    group: Tensor | None = None
    top_k_ids: Tensor | None = None
    top_k_log_probs: Tensor | None = None
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_mask("LogProbDump", self.mask)
        if self.mask.ndim != 2:
            raise input_error(
                "LogProbDump", "mask", expected="of two axes, `b t`", got=describe(self.mask),
                fix="pad the sequences with iscorrect.pad_sequences, or pass x[None] for one",
            )
        for name in SPREAD:
            x = getattr(self, name)
            if isinstance(x, Tensor) and tuple(x.shape) in ((len(self),), (len(self), 1)):
                spread = x.reshape(-1, 1).expand(self.mask.shape)
                object.__setattr__(self, name, spread)
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
        for name, texts in self.names.items():
            self._check_names(name, texts)

    def _check_names(self, name: str, texts: tuple[str, ...]) -> None:
        x = getattr(self, name) if name in IDS else None
        if x is None or not all(isinstance(text, str) and is_unicode(text) for text in texts):
            raise input_error(
                "LogProbDump", "names", expected="texts in Unicode of fields that are given and"
                f" may be text: {', '.join(IDS)}", got=repr(name),
                fix="pass the field as numbers of its texts, and the texts as names",
            )
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < len(texts):
            raise input_error(
                "LogProbDump", name, expected=f"from 0 to {len(texts) - 1}, numbers of its names",
                got=f"{int(x.min())} to {int(x.max())}",
                fix="leave names out where the field is a number of its own",
            )

    def given(self) -> dict[str, Tensor]:
        """The tensors of this dump by name, without those that are None."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "names"}
        return {name: x for name, x in named.items() if x is not None}

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def num_tokens(self) -> int:
        """How many tokens count."""
        return int(torch.count_nonzero(self.mask))

    def rows(self, index: Tensor | slice) -> LogProbDump:
        """Some of the sequences, as often as ``index`` names them."""
        some = {name: x[index] for name, x in self.given().items()}
        return LogProbDump(**some, names=self.names)

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
    joined: dict[str, Any] = {}
    texts: dict[str, tuple[str, ...]] = {}
    for name in names:
        parts = [getattr(dump, name) for dump in dumps]
        if any(name in dump.names for dump in dumps):
            numbers, texts[name] = common_names(
                [(x.cpu().numpy(), d.names.get(name)) for x, d in zip(parts, dumps, strict=True)]
            )
            parts = [torch.from_numpy(x) for x in numbers]
        if name not in PER_SEQUENCE:
            deep = max(x.shape[2] for x in parts) if name in PER_CANDIDATE else None
            sides = (width,) if deep is None else (width, deep)
            parts = [_widened(x, sides, -torch.inf if name == TOP else 0) for x in parts]
        joined[name] = torch.cat(parts)
    return LogProbDump(**joined, names=texts)


def _widened(x: Tensor, sides: tuple[int, ...], fill: float) -> Tensor:
    """"b t …" filled up to the given sides after the first."""
    wide = x.new_full((len(x), *sides), fill)
    wide[tuple(slice(side) for side in x.shape)] = x
    return wide
