"""Sums over every token of a dump, and a uniform sample of its sequences, in one pass.

Errors are clustered: what answers to one prompt share is no evidence twice. Where groups are not
known, a cluster is a sequence, with its copies to the bit. Memory grows by 72 bytes with each
sequence, and by 48 for its update and 48 for its candidates, for comparing dumps in pairs and for
clusters that several pieces hold; errors of places need sums of squares only, and take the part of
a cluster in each piece for one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from iscorrect.dumps import Estimate, Tokens
from iscorrect.dumps.dump import UNITS
from iscorrect.dumps.names import Array

SAMPLE = 2**20

EDGES = {
    "position": (0, 16, 64, 256, 1024, 4096),
    "length": (0, 64, 256, 1024, 4096, 16384),
    "rollout probability": (0.0, 0.1, 0.5, 0.9, 0.99),
}

CELLS = 2**22  # sequences times places that are counted in one array

FEWEST_STEPS = 5  # of which growth is told

CANCELLED = 1e-13  # of a sum of squares: less is what rounding leaves of no variance

Z = 1.959964  # half of a 95 % interval, in standard errors


class Means:
    """Means over tokens of some values in some places, with clustered errors."""

    def __init__(self) -> None:
        self.sums: dict[int | str, Array] = {}

    def add(
        self, tokens: Tokens, cluster: Array, values: Array, keys: Sequence[int | str], index: Array
    ) -> None:
        """Take tokens in.

        Args:
            tokens: whose sequences they are.
            cluster: int "s", the number of each sequence's cluster.
            values: "m n".
            keys: the places.
            index: int "n", which place each token has.
        """
        places = len(keys)
        pairs = np.unique(tokens.row * places + index)
        sequences = np.bincount(pairs % places, minlength=places).astype(float)
        cell = cluster[tokens.row] * places + index
        if tokens.count * places > CELLS:
            filled, cell = np.unique(cell, return_inverse=True)
        else:
            filled = np.arange(tokens.count * places)
        of_place = filled % places
        number = np.bincount(cell, minlength=len(of_place)).astype(float)
        columns = [number, number * number, (number > 0).astype(float)]
        for x in values:
            total = np.bincount(cell, weights=x, minlength=len(of_place))
            columns += [total, total * total, total * number]
        of_places = [np.bincount(of_place, weights=c, minlength=places) for c in columns]
        sums = np.stack([*of_places, sequences])
        for key, of_key in zip(keys, sums.T, strict=True):
            if of_key[0]:
                self.sums[key] = self.sums.get(key, np.zeros(len(sums))) + of_key

    def tokens(self, key: int | str) -> float:
        """How many tokens a place has."""
        return float(self.sums[key][0])

    def sequences(self, key: int | str) -> int:
        """How many sequences have a token in a place."""
        return int(self.sums[key][-1])

    def clusters(self, key: int | str) -> int:
        """How many clusters have a token in a place."""
        return int(self.sums[key][2])

    def ess(self, key: int | str) -> float:
        """The effective share of a place's tokens, given their ratios and ratios squared."""
        first, second = self.mean(key, 2).value, self.mean(key, 3).value
        return first * first / second if second > 0 else math.nan

    def mean(self, key: int | str, value: int = 0) -> Estimate:
        """The mean of a value in a place; the error of a single cluster is infinite."""
        number, squares, clusters = self.sums[key][:3]
        total, of_squares, crossed = self.sums[key][3 + 3 * value : 6 + 3 * value]
        mean = total / number
        spread = max(float(of_squares - 2 * mean * crossed + mean * mean * squares), 0.0)
        if clusters < 2:
            return Estimate(float(mean), math.inf)
        error = math.sqrt(spread * clusters / (clusters - 1)) / number
        return Estimate(float(mean), float(error))


MEASURED = (
    "mismatch/kl_k1", "mismatch/kl_k3", "mismatch/log_prob_diff/mean", "tail/outside",
    "mismatch/ratio/mean",
)


@dataclass(frozen=True, eq=False)
class Rows:
    """What each sequence with a token adds to the sums, in the order of what it holds.

    Attributes:
        key: uint64 "s", the same for the same token ids, or without ids for the same log μ.
        copy: uint64 "s", the same for all that is the same to the bit, in one step.
        cluster: uint64 "s", the same for answers to one prompt, or without groups for copies.
        length: "s", its tokens.
        totals: "m s", the sums of what is measured.
    """

    key: Array
    copy: Array
    cluster: Array
    length: Array
    totals: Array

    @classmethod
    def of(cls, tokens: Tokens, values: Array) -> Rows:
        """Of tokens and what was measured on them, "m n"."""
        starts = _starts(tokens)
        rows = tokens.row[starts]
        copy = copies(tokens)
        return cls(
            _content(tokens, tokens.rollout if tokens.ids is None else tokens.ids),
            copy, copy if tokens.group is None else _of_groups(tokens)[rows],
            np.diff(np.r_[starts, len(tokens)]).astype(float),
            np.add.reduceat(values, starts, axis=1) if len(starts) else values[:, :0],
        )

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Those of several pieces, sorted by key."""
        order = np.argsort(np.concatenate([part.key for part in parts]), kind="stable")
        return cls(*(
            np.concatenate([getattr(part, name) for part in parts], axis=-1)[..., order]
            for name in ("key", "copy", "cluster", "length", "totals")
        ))

    @property
    def clusters(self) -> int:
        """How many clusters there are."""
        return len(np.unique(self.cluster))

    @property
    def times(self) -> int:
        """How often each sequence is there; 1 where some are there more often than others."""
        return int(np.gcd.reduce(np.unique(self.copy, return_counts=True)[1]))

    def mean(self, value: int) -> Estimate:
        """The mean of a value over tokens."""
        mean = float(self.totals[value].sum() / self.length.sum())
        return Estimate(mean, self.error(self.influence(value)))

    def influence(self, value: int) -> Array:
        """How far each sequence moves the mean of a value over tokens, "s"."""
        tokens = self.length.sum()
        mean = self.totals[value].sum() / tokens
        moved: Array = (self.totals[value] - mean * self.length) / tokens
        return moved

    def error(self, moved: Array) -> float:
        """The standard error of a sum of influences "s"; inf where one cluster is all there is."""
        total = np.bincount(np.unique(self.cluster, return_inverse=True)[1], weights=moved)
        c = len(total)
        return math.sqrt(float(total @ total) * c / (c - 1)) if c > 1 else math.inf


MIX = np.uint64(0x9E3779B97F4A7C15)


def copies(tokens: Tokens) -> Array:
    """A number for each sequence that has tokens: the same for copies to the bit in one step."""
    copy = _content(tokens, tokens.rollout) * MIX + _content(tokens, tokens.old)
    if tokens.ids is not None:
        copy = copy * MIX + _content(tokens, tokens.ids)
    if tokens.step is not None:
        copy = copy * MIX + tokens.step[tokens.row[_starts(tokens)]].astype(np.uint64)
    return copy


def _of_groups(tokens: Tokens) -> Array:
    """A number for the group of each sequence, the same in every piece of a dump; uint64 "s"."""
    assert tokens.group is not None
    groups, member = np.unique(tokens.group, return_inverse=True)
    texts = [tokens.names["group"][x] if "group" in tokens.names else str(x) for x in groups]
    digests = [hashlib.sha256(text.encode()).digest()[:8] for text in texts]
    return np.array([int.from_bytes(x, "little") for x in digests], np.uint64)[member]


def _starts(tokens: Tokens) -> Array:
    """The first token of each sequence that has any."""
    starts: Array = np.flatnonzero(np.r_[True, tokens.row[1:] != tokens.row[:-1]][: len(tokens)])
    return starts


def _content(tokens: Tokens, x: Array) -> Array:
    """A number for the values "n" of every sequence that has any, in their order; uint64."""
    if not len(tokens):
        return np.zeros(0, np.uint64)
    bits = (x if x.dtype == np.float64 else x.astype(np.int64)).view(np.uint64)
    mixed = bits ^ (tokens.position.astype(np.uint64) * MIX)
    for shift in (29, 32):  # so that sums of nearby numbers do not agree
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * MIX
    summed: Array = np.add.reduceat(mixed, _starts(tokens))
    return summed


UPDATE = ("policy/log_prob_diff/mean", "policy/kl_k3")
"""Of the policy being trained against π_old."""

CANDIDATES = ("candidates/listed", "candidates/first")
"""How often the sampled token is among the engine's candidates, and is the likeliest."""


GROWTH = ("mismatch/growth", "mismatch/growth/low", "mismatch/growth/high")


class Sums:
    """Sums over every token: of the whole dump and by place."""

    def __init__(self) -> None:
        self.rows: list[Rows] = []
        self.update: list[Rows] = []
        self.candidates: list[Rows] = []
        self.places: dict[str, Means] = {}
        self.probabilities = np.zeros(6)  # of 1, p, q, p², q², p q
        self.sequences = self.tokens = 0

    def add(self, tokens: Tokens) -> None:
        """Take the tokens of a piece in."""
        d, k3, outside = tokens.d, tokens.k3, tokens.outside
        values = np.stack([-d, k3, np.abs(d), outside, np.exp(np.minimum(d, 30))])
        rows = Rows.of(tokens, values)
        self.rows.append(rows)
        self.tokens += len(tokens)
        cluster = np.zeros(tokens.count, dtype=np.int64)
        cluster[np.unique(tokens.row)] = np.unique(rows.cluster, return_inverse=True)[1]
        p, q = np.exp(tokens.rollout), np.exp(tokens.old)
        self.probabilities += [len(p), *(x.sum() for x in (p, q, p * p, q * q, p * q))]
        length = np.bincount(tokens.row, minlength=tokens.count)
        self.sequences += int(np.count_nonzero(length))
        ratio = values[-1]
        values = np.stack([k3, outside, ratio, np.square(ratio)])
        for name, of_token in (
            ("position", tokens.position), ("length", length[tokens.row]),
            ("rollout probability", p),
        ):
            index = np.searchsorted(EDGES[name][1:], of_token, "right")
            self._place(name, tokens, cluster, values, range(len(EDGES[name])), index)
        step = None if tokens.step is None else tokens.step[tokens.row]
        units = {"step": step, **{name: getattr(tokens, name) for name in UNITS}}
        for name, unit in units.items():
            if unit is not None:
                keys, index = np.unique(unit, return_inverse=True)
                texts = tokens.names.get(name)
                labels = keys.tolist() if texts is None else [texts[key] for key in keys]
                self._place(name, tokens, cluster, values, labels, index)
        age = tokens.age
        if age is not None and (known := np.isfinite(age)).any():
            keys, index = np.unique(age[known], return_inverse=True)
            ages = [int(key) for key in keys.tolist()]
            self._place("age", tokens.where(known), cluster, values[:, known], ages, index)
        if tokens.current is not None and (known := np.isfinite(tokens.current)).any():
            e = (tokens.current - tokens.old)[known]
            values = np.stack([np.abs(e), np.expm1(np.minimum(e, 30)) - e])
            self.update.append(Rows.of(tokens.where(known), values))
        if tokens.candidate is not None:
            listed = np.isfinite(tokens.candidate)
            values = np.stack([listed, listed & (tokens.candidate == tokens.best)]).astype(float)
            self.candidates.append(Rows.of(tokens, values))

    def _place(
        self, name: str, tokens: Tokens, cluster: Array, values: Array,
        keys: Sequence[int | str], index: Array,
    ) -> None:
        self.places.setdefault(name, Means()).add(tokens, cluster, values, keys, index)

    def estimates(self, rows: Rows) -> dict[str, Estimate]:
        """What is measured on every token, with its error; the slope is per 1,000 tokens.

        Args:
            rows: those of all pieces.
        """
        found = {name: rows.mean(i) for i, name in enumerate(MEASURED)}
        for parts, names in ((self.update, UPDATE), (self.candidates, CANDIDATES)):
            more = Rows.join(parts) if parts else None
            if more is not None and len(more.length):
                found |= {name: more.mean(i) for i, name in enumerate(names)}
        k1 = found["mismatch/kl_k1"]
        return found | {"mismatch/sequence_slope": Estimate(-1000 * k1.value, 1000 * k1.error)}

    def pearson(self) -> float:
        """Correlation of the probabilities; NaN where one side is constant."""
        n, p, q, pp, qq, pq = self.probabilities
        of_p, of_q = n * pp - p * p, n * qq - q * q
        if of_p <= CANCELLED * n * pp or of_q <= CANCELLED * n * qq:
            return math.nan
        return float((n * pq - p * q) / math.sqrt(of_p * of_q))

    def mean_length(self) -> float:
        """Tokens of a sequence that has any."""
        return self.tokens / self.sequences

    def growth(self) -> dict[str, float]:
        """By what factor k3 grows from the first step to the last, and its 95 % interval."""
        means = self.places.get("step", Means())
        k3 = {key: means.mean(key).value for key in means.sums}
        return growth({key: x for key, x in k3.items() if isinstance(key, int)})


def growth(levels: Mapping[int, float]) -> dict[str, float]:
    """By what factor a metric grows from the first step to the last, and its 95 % interval.

    That of the line through its logarithm over the steps, as if steps were independent; nothing
    with fewer than five steps on which it is positive.

    >>> {name: round(x, 3) for name, x in growth({0: 1.0, 1: 2.0, 2: 4.0, 3: 8.0, 4: 16.0}).items()}
    {'mismatch/growth': 16.0, 'mismatch/growth/low': 16.0, 'mismatch/growth/high': 16.0}
    """
    dated = sorted((step, x) for step, x in levels.items() if x > 0)
    if len(dated) < FEWEST_STEPS:
        return {}
    x = np.array([float(step) for step, _ in dated])
    y = np.log([level for _, level in dated])
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    degrees = len(x) - 2
    residual = y - y.mean() - slope * centred
    error = math.sqrt(float(residual @ residual) / degrees / float(centred @ centred))
    reach = float(np.ptp(x))
    half = student(degrees) * error * reach
    return {
        name: math.exp(min(slope * reach + x, 700.0))
        for name, x in zip(GROWTH, (0.0, -half, half), strict=True)
    }


def student(degrees: int) -> float:
    """Half of a 95 % interval in standard errors, for so many degrees of freedom.

    >>> [round(student(n), 2) for n in (3, 10, 1000)]  # 3.18, 2.23, 1.96
    [3.16, 2.23, 1.96]
    """
    z, n = Z, degrees
    return (
        z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


class Sample:
    """Whole sequences with the smallest of random keys, which is a uniform sample."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)
        self.parts: list[Tokens] = []
        self.keys: list[Array] = []
        self.bar = 1.0

    def add(self, tokens: Tokens) -> None:
        """Take the tokens of a piece in."""
        keys = self.generator.random(tokens.count)
        self._keep(tokens, keys)
        while sum(map(len, self.parts)) > SAMPLE and sum(map(len, self.keys)) > 1:
            together = np.sort(np.concatenate(self.keys))
            self.bar = together[(len(together) - 1) // 2]
            before = zip(self.parts, self.keys, strict=True)
            self.parts, self.keys = [], []
            for part, of_part in before:
                self._keep(part, of_part)

    def _keep(self, tokens: Tokens, keys: Array) -> None:
        below = keys <= self.bar
        if below.any():
            self.parts.append(tokens if below.all() else tokens.of_sequences(below))
            self.keys.append(keys[below])

    def joined(self) -> Tokens:
        """The sample; at least one piece was added."""
        return Tokens.join(self.parts)
