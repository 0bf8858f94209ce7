"""The counted tokens of a dump in one line, and estimates with errors clustered by sequence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from iscorrect.dumps.dump import UNITS, LogProbDump
from iscorrect.dumps.names import Array, common_names
from iscorrect.dumps.rows import to_numpy
from iscorrect.errors import describe, input_error
from iscorrect.text import visible


class Estimate(NamedTuple):
    """A mean or a coefficient, and its standard error clustered by sequence."""

    value: float
    error: float

    @property
    def z(self) -> float:
        """How many standard errors it is away from zero."""
        return self.value / self.error if self.error > 0 else 0.0

    def __str__(self) -> str:
        known = f" ± {self.error:.2g}" if math.isfinite(self.error) else ""
        return f"{self.value:+.3g}{known}"


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens that count and are finite on both sides, sequence after sequence.

    Attributes:
        rollout: "n", log μ, nats.
        old: "n", log π_old, nats.
        row: int "n", the sequence of each token.
        position: int "n", how many tokens of its sequence come before it.
        count: how many sequences the dump has.
        gap: "n", surprisal less entropy under the trainer, −log π_old − H; NaN where the entropy is
            not finite; None without entropy.
        ids: int "n", or None.
        seen: bool "n", the same token came earlier in the row; None without ids.
        lead: "n", how much likelier the engine finds its first candidate than its second, nats;
            None without two candidates.
        best: "n", nats, what the engine reported for its first candidate, or None.
        candidate: "n", nats, the same for the candidate that was sampled; NaN where it is none of
            them; None without candidates' ids.
        current: "n", nats, log π of the policy being trained, or None.
        varentropy: "n", nats², of the trainer's distribution, or None.
        version: int "n", of the weights that sampled the token, or None; likewise ``turn``,
            ``engine`` and ``pack``.
        step: int "s", of each sequence, or None; likewise ``group``.
        number: int "s", of each sequence in the dump that these are a part of; None: as they are.
        lost: how many counted tokens are left out, as a log-prob of one side is not finite.
        names: the texts whose numbers ``version``, ``engine`` and ``group`` are.
    """

    rollout: Array
    old: Array
    row: Array
    position: Array
    count: int
    gap: Array | None
    ids: Array | None
    seen: Array | None
    lead: Array | None
    step: Array | None
    version: Array | None
    group: Array | None
    best: Array | None = None
    candidate: Array | None = None
    current: Array | None = None
    varentropy: Array | None = None
    turn: Array | None = None
    engine: Array | None = None
    pack: Array | None = None
    number: Array | None = None
    lost: int = 0
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, dump: LogProbDump) -> Tokens:
        """The tokens of a dump."""
        mask = to_numpy(dump.mask)
        rollout, old = to_numpy(dump.rollout_log_probs), to_numpy(dump.old_log_probs)
        counted = mask & np.isfinite(rollout) & np.isfinite(old)
        row, column = np.nonzero(counted)
        starts = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
        lengths = np.diff(np.r_[starts, len(row)])
        old = old[row, column].astype(np.float64)
        gap = None
        if dump.entropy is not None:
            gap = -old - to_numpy(dump.entropy)[row, column]
            gap = np.where(np.isfinite(gap), gap, np.nan)
        ids = seen = lead = None
        if dump.token_ids is not None:
            ids = to_numpy(dump.token_ids)[row, column]
            seen = _seen(to_numpy(dump.token_ids))[row, column]
        best = candidate = None
        if dump.top_k_log_probs is not None and dump.top_k_log_probs.shape[-1] > 0:
            top = to_numpy(dump.top_k_log_probs)[row, column].astype(np.float64)
            listed = None if dump.top_k_ids is None else to_numpy(dump.top_k_ids)[row, column]
            if listed is not None and ids is not None:
                same = listed == ids[:, None]
                at = same.argmax(1)
                candidate = np.where(same.any(1), top[np.arange(len(top)), at], np.nan)
            best, lead = _likeliest(top, listed)
        of_token = {name: getattr(dump, name) for name in UNITS}
        units = {n: None if x is None else to_numpy(x)[row, column] for n, x in of_token.items()}
        names = dict(dump.names)
        if dump.version is None and dump.policy_version is not None:
            units["version"] = to_numpy(dump.policy_version)[row]
            if "policy_version" in names:
                names["version"] = names["policy_version"]
        names.pop("policy_version", None)
        return cls(
            rollout=rollout[row, column].astype(np.float64), old=old, row=row,
            position=np.arange(len(row)) - np.repeat(starts, lengths), count=len(mask), gap=gap,
            ids=ids, seen=seen, lead=lead, step=_optional(dump.step), group=_optional(dump.group),
            best=best, candidate=candidate,
            current=_counted(dump.log_probs, row, column),
            varentropy=_counted(dump.varentropy, row, column),
            lost=int(np.count_nonzero(mask)) - len(row), names=names, **units,
        )

    @classmethod
    def join(cls, parts: Sequence[Tokens]) -> Tokens:
        """The tokens of several dumps, with what every one of them has."""
        first = list(accumulate((part.count for part in parts), initial=0))
        joined: dict[str, Any] = {"count": first[-1], "lost": sum(part.lost for part in parts)}
        texts: dict[str, tuple[str, ...]] = {}
        for name in (*OF_TOKEN, *OF_SEQUENCE):
            values = [getattr(part, name) for part in parts]
            if any(x is None for x in values):
                joined[name] = None
                continue
            if name == "row":
                values = [row + start for row, start in zip(values, first, strict=False)]
            if any(name in part.names for part in parts):
                named = [(x, p.names.get(name)) for x, p in zip(values, parts, strict=True)]
                values, texts[name] = common_names(named)
            joined[name] = np.concatenate(values)
        return cls(**joined, names=texts)

    def label(self, name: str, value: int) -> str:
        """What a version, engine or group is called: its text, or its number."""
        return visible(self.names[name][value]) if name in self.names else str(value)

    def sequence(self, row: int) -> int:
        """The number of a sequence in the dump that these tokens are of."""
        return int(row if self.number is None else self.number[row])

    @property
    def age(self) -> Array | None:
        """The trainer's version less the token's, "n"; NaN where a version is no number.

        None without steps or versions.
        """
        if self.step is None or self.version is None:
            return None
        step, version = self.step[self.row], self.version
        if "version" in self.names:
            texts = (re.fullmatch(r"-?[0-9]+", text) for text in self.names["version"])
            numbers = [float(text[0]) if text else math.nan for text in texts]
            version = np.array([*numbers, math.nan])[version]
        age: Array = (step - version).astype(float)
        return age

    def __len__(self) -> int:
        return len(self.row)

    @property
    def d(self) -> Array:
        """The log-ratio log ρ "n", nats."""
        return self.old - self.rollout

    @property
    def sequences(self) -> int:
        """How many sequences have a token here."""
        return len(np.unique(self.row))

    @property
    def k3(self) -> Array:
        """The KL estimate k3 = ρ − 1 − log ρ "n", with log ρ at most 30 so that sums stay finite.

        >>> import torch
        >>> one = torch.tensor([[-1.0]])
        >>> dump = LogProbDump(rollout_log_probs=one, old_log_probs=0 * one, mask=one < 0)
        >>> Tokens.of(dump).k3.round(3)
        array([0.718])
        """
        k3: Array = np.expm1(np.minimum(self.d, 30)) - self.d
        return k3

    @property
    def outside(self) -> Array:
        """Whether the ratio lies outside [1/2, 2]; bool "n"."""
        outside: Array = np.abs(self.d) > math.log(2)
        return outside

    def where(self, keep: Array) -> Tokens:
        """Some of the tokens, bool "n"; sequences keep their numbers."""
        return replace(self, **self._indexed(OF_TOKEN, keep))

    def with_entropy(self) -> Tokens:
        """The tokens whose entropy is known; where that of none is, all of them without it."""
        known = np.zeros(len(self), dtype=bool) if self.gap is None else np.isfinite(self.gap)
        return self.where(known) if known.any() else replace(self, gap=None)

    def of_sequences(self, keep: Array) -> Tokens:
        """The tokens of some sequences, bool "s", which are numbered anew."""
        some = self.where(keep[self.row])
        return replace(
            some, row=(np.cumsum(keep) - 1)[some.row], count=int(np.count_nonzero(keep)),
            **self._indexed(OF_SEQUENCE, keep),
        )

    def _indexed(self, names: Sequence[str], keep: Array) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in names}
        return {name: None if x is None else x[keep] for name, x in values.items()}

    def mean(self, x: Array) -> Estimate:
        """Mean of "n" over tokens."""
        value = float(x.mean())
        return Estimate(value, self._error(x - value) / len(x))

    def regress(self, y: Array, *x: Array) -> tuple[list[Estimate], float]:
        """Least squares of y on x and a constant.

        Returns:
            the coefficient of each x, and the share of y's variance that they explain.
        """
        columns = np.stack([np.ones_like(y), *x], axis=1)
        coefficients = np.linalg.lstsq(columns, y, rcond=None)[0]
        residual = y - columns @ coefficients
        inverse = np.linalg.pinv(columns.T @ columns)
        errors = [self._error(residual * (columns @ inverse[k])) for k in range(1, len(x) + 1)]
        estimates = [Estimate(float(b), e) for b, e in zip(coefficients[1:], errors, strict=True)]
        variance = float(y.var())
        return estimates, 1 - float(residual.var()) / variance if variance > 0 else 0.0

    def _error(self, x: Array) -> float:
        """Standard error of the sum of x; inf where one sequence is all there is."""
        totals = np.bincount(self.row, weights=x, minlength=self.count)
        s = self.sequences
        return math.sqrt(float((totals**2).sum()) * s / (s - 1)) if s > 1 else math.inf

    def typical(self) -> float:
        """Robust standard deviation of log ρ."""
        return 1.4826 * float(np.median(np.abs(self.d)))

    def logit_noise(self) -> float:
        """Typical difference of a token's log-odds, where the model is least certain of its noise.

        The largest median of |log ρ| / (1 − p) over three bins of confidence. On a free choice
        among equals, all logits move together and nothing is seen of their noise.
        """
        p = np.exp((self.old + self.rollout) / 2)
        # log p − log q is the difference of the log-odds times about 1 − p
        noise = np.abs(self.d) / (1 - np.minimum(p, 0.999))
        edges = (0, 0.1, 0.5, 0.99)
        bins = [noise[(p >= a) & (p < b)] for a, b in pairwise(edges)]
        filled = [float(np.median(x)) for x in bins if len(x) >= 12]
        return max(filled) if filled else float(np.median(noise))


OF_TOKEN = (
    "rollout", "old", "row", "position", "gap", "ids", "seen", "lead", "best", "candidate",
    "current", "varentropy", *UNITS,
)
OF_SEQUENCE = ("step", "group", "number")


def as_tokens(
    dump: LogProbDump | Tokens, caller: str = "Tokens", argument: str = "dump"
) -> Tokens:
    """The tokens of a dump; tokens as they are.

    Raises:
        InputError: neither, such as a path.
    """
    if not isinstance(dump, (LogProbDump, Tokens)):
        raise input_error(
            caller, argument, expected="a LogProbDump or its Tokens", got=describe(dump),
            fix="read a file with iscorrect.dumps.read_dump",
        )
    return dump if isinstance(dump, Tokens) else Tokens.of(dump)


def _optional(x: Tensor | None) -> Array | None:
    return None if x is None else to_numpy(x)


def _counted(x: Tensor | None, row: Array, column: Array) -> Array | None:
    return None if x is None else to_numpy(x)[row, column].astype(np.float64)


def _likeliest(top: Array, ids: Array | None) -> tuple[Array, Array | None]:
    """The likeliest candidate "n", and how far it leads; vLLM lists the sampled token before them.

    >>> best, lead = _likeliest(np.array([[-3.0, -0.5, -1.0]]), None)
    >>> best.tolist(), lead.tolist()
    ([-0.5], [0.5])
    """
    if ids is not None:  # and once more where it is among them
        again = ((ids[:, 1:] == ids[:, :1]) & np.isfinite(top[:, 1:])).any(1)
        top = np.column_stack([np.where(again, np.nan, top[:, 0]), top[:, 1:]])
    falling = -np.sort(-top, axis=1)  # NaN last
    if top.shape[1] == 1:
        return falling[:, 0], None
    with np.errstate(invalid="ignore"):
        return falling[:, 0], falling[:, 0] - falling[:, 1]


def _seen(ids: Array) -> Array:
    """Whether the same id stands earlier in the row; bool "b t"."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    again = np.zeros_like(ids, dtype=bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    seen = np.empty_like(again)
    np.put_along_axis(seen, order, again, axis=1)
    return seen
