"""What of the mismatch tokens have in common: the part that a larger batch does not average out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from iscorrect.dumps import LogProbDump, Tokens
from iscorrect.dumps.names import Array
from iscorrect.dumps.tokens import as_tokens
from iscorrect.errors import check_number

KINDS = ("token", "pair", "position", "version", "context")

CERTAIN = 0.98
"""Probability from which on too little is at stake to see an error of the log-odds."""

CUT = 0.005
"""Share of the errors at either end that are drawn in, so that single tokens do not decide."""

FEWEST = 50
"""Tokens that have another one in their class, without which nothing is said."""


class Shared(NamedTuple):
    """What one kind of class explains of the errors.

    Attributes:
        share: of their variance, the part that tokens of one class have in common; without bias,
            so that it may be negative.
        null: the 95 % quantile of the share where the classes say nothing.
        p_value: how often a share this large comes about where they say nothing.
        classes: that have at least two tokens.
        tokens: in these classes.
    """

    share: float
    null: float
    p_value: float
    classes: int
    tokens: int


def shared_error(
    dump: LogProbDump | Tokens, *, permutations: int = 200, most: int = 1 << 16, seed: int = 0
) -> dict[str, Shared]:
    """The share of the variance of the log-odds error that tokens of one class have in common.

        ε = Δ/(1 − p),  share = σ_b²/(σ_b² + σ_w²)

    Δ log p is 1 − p times the difference of the log-odds; ε is what the engine's logits are off by.
    Errors of rounding are drawn anew for every context and share next to nothing by token or
    position; those of other weights do.

        token      the same token
        pair       the same token after the same token
        position   the same place in a sequence
        version    weights of the same version
        context    the same token after the same counted tokens of the same group: whether the
                   error repeats where everything does

    The variance between classes and that within are those of the analysis of variance with one
    random effect. The null permutes errors within each sequence, so that what a whole sequence
    has in common is none of it; for versions that do not change within a sequence it permutes
    versions over sequences.

    Args:
        dump: with token ids, versions and groups, as far as they are known.
        permutations: for the null.
        most: tokens that are looked at, of whole sequences at equal distances.
        seed: of the permutations.

    Returns:
        By kind of class; one that the dump does not know, or in which nothing repeats, is absent.

    Raises:
        InputError: no permutation, no token to look at, or a negative seed.

    References:
        Searle, Casella, McCulloch, Variance Components (1992), §3.6, for the estimate.

    >>> import torch
    >>> ids = torch.arange(8).repeat(30, 1)
    >>> off = 0.1 * torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1]).expand(30, 8)
    >>> rollout = torch.full((30, 8), -1.0)
    >>> found = shared_error(LogProbDump(
    ...     rollout_log_probs=rollout, old_log_probs=rollout + off, mask=ids >= 0, token_ids=ids,
    ... ))
    >>> found["token"].share > 0.9, found["token"].p_value < 0.01
    (True, True)
    """
    for name, number, least in (("permutations", permutations, 1), ("most", most, 1),
                                ("seed", seed, 0)):
        check_number("shared_error", name, number, "a whole number", least=least, whole=True)
    tokens = _some(as_tokens(dump, "shared_error"), most)
    p = np.exp((tokens.old + tokens.rollout) / 2)
    open_ = p < CERTAIN
    if np.count_nonzero(open_) < FEWEST:
        return {}
    error = tokens.d[open_] / (1 - p[open_])
    error = error.clip(*np.quantile(error, [CUT, 1 - CUT]))
    row = _numbered(tokens.row[open_])
    rng = np.random.default_rng(seed)

    @functools.cache
    def within() -> list[Array]:
        return [error[np.argsort(row + rng.random(len(row)))] for _ in range(permutations)]

    found = {}
    for name, label in _labels(tokens):
        classes = _Classes(label[open_])
        if classes.tokens < FEWEST or not 2 <= classes.number < classes.tokens:
            continue
        share = classes.share(error)
        each = _of_sequences(row, label[open_])
        null = (
            [classes.share(x) for x in within()] if each is None else
            [_Classes(rng.permutation(each)[row]).share(error) for _ in range(permutations)]
        )
        beyond = sum(x >= share for x in null)
        found[name] = Shared(
            share, float(np.quantile(null, 0.95)), (1 + beyond) / (1 + permutations),
            classes.number, classes.tokens,
        )
    return found


class _Classes:
    """The classes that have at least two tokens."""

    def __init__(self, label: Array) -> None:
        _, index, count = np.unique(label, return_inverse=True, return_counts=True)
        self.kept = (label >= 0) & (count[index] > 1)
        _, self.index, self.count = np.unique(
            index[self.kept], return_inverse=True, return_counts=True
        )
        self.number, self.tokens = len(self.count), len(self.index)

    def share(self, error: Array) -> float:
        """σ_b²/(σ_b² + σ_w²) of "n"; 0 where errors do not differ."""
        y = error[self.kept]
        n, k = self.tokens, self.number
        y = y - y.mean()
        total = float(y @ y)
        sums = np.bincount(self.index, weights=y)
        between = float((sums**2 / self.count).sum())
        mean_within = (total - between) / (n - k)
        size = (n - float((self.count**2).sum()) / n) / (k - 1)
        effect = (between / (k - 1) - mean_within) / size
        whole = effect + mean_within
        return effect / whole if whole > 0 else 0.0


def _labels(tokens: Tokens) -> Iterator[tuple[str, Array]]:
    """Classes "n" of each kind that is known; −1 for a token without one."""
    if tokens.ids is not None:
        ids = _numbered(tokens.ids)
        yield "token", ids
        pairs = ids * (ids.max() + 1) + np.r_[0, ids[:-1]]
        yield "pair", np.where(tokens.position > 0, pairs, -1)
    yield "position", tokens.position
    if tokens.version is not None:
        yield "version", _numbered(tokens.version)
    if tokens.ids is not None and tokens.group is not None:
        yield "context", contexts(tokens.ids, tokens.position, tokens.group[tokens.row])


def contexts(ids: Array, position: Array, group: Array) -> Array:
    """The same number for the same tokens up to here after the same prompt, "n"; by a hash."""
    factor = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers never vanish
    powers = np.cumprod(np.full(position.max() + 1, factor))
    terms = (ids.astype(np.uint64) + np.uint64(1)) * powers[position]
    sums = terms.cumsum()
    starts = np.maximum.accumulate(np.where(position == 0, np.arange(len(ids)), 0))
    prefix = sums - (sums - terms)[starts]
    return _numbered((_numbered(group).astype(np.uint64) + prefix * factor) * factor)


def _of_sequences(row: Array, label: Array) -> Array | None:
    """The class of each sequence, where its tokens have one class; "s"."""
    first = np.unique(row, return_index=True)[1]
    each: Array = label[first]
    return each if len(first) < len(row) and np.array_equal(each[row], label) else None


def _some(tokens: Tokens, most: int) -> Tokens:
    """Whole sequences at equal distances, of about so many tokens."""
    every = -(-len(tokens) // most)
    return tokens if every <= 1 else tokens.of_sequences(np.arange(tokens.count) % every == 0)


def _numbered(x: Array) -> Array:
    numbers: Array = np.unique(x, return_inverse=True)[1]
    return numbers
