"""How large a mismatch is for a token of its confidence, and what is beyond doubt."""

from __future__ import annotations

import math

import numpy as np

from iscorrect.dumps import Estimate, Tokens
from iscorrect.dumps.names import Array
from iscorrect.dumps.tokens import OF_SEQUENCE

SEQUENCES, TOKENS = 8, 1024
"""Fewer sequences have no error of their own; fewer tokens leave most causes unseen."""


def doubtless(estimate: Estimate, tokens: Tokens) -> bool:
    """Beyond 4.5 standard errors, and more where few sequences say how large those are."""
    s = tokens.sequences
    return s >= 8 and abs(estimate.z) > 4.5 * (1 + 8 / s)


def few(tokens: Tokens) -> str:
    """How many there are and how many there must be, in words; "" where there are enough."""
    s, n = tokens.sequences, len(tokens)
    if s >= SEQUENCES and n >= TOKENS:
        return ""
    return (
        f"{s} sequences and {n} tokens, where {SEQUENCES} and {TOKENS:,} are the least from which"
        " errors can be told"
    )


def relative(d: Array, log_p: Array) -> Array:
    """|d| relative to what noise on the logits makes of it where the log-prob is log_p."""
    x: Array = np.abs(d) / (1.02 - np.minimum(np.exp(np.minimum(log_p, 0.0)), 1.0))
    return x


def confident(tokens: Tokens) -> Array:
    """Whether the token's noise can be seen at all: p below 0.99, or every token; bool "n"."""
    seen = tokens.rollout < math.log(0.99)
    return seen if int(seen.sum()) >= 12 else np.ones(len(tokens), dtype=bool)


def levels(tokens: Tokens) -> tuple[Tokens, Array]:
    """Tokens whose noise can be seen, and log |Δ| of each less what its confidence explains.

    Confidence is that of the engine, which sampled the tokens, in sixteen bins of equal size; a
    level of 0.7 is a mismatch twice as large as is usual for such tokens.
    """
    seen = tokens.where(confident(tokens))
    size = np.abs(seen.d)
    positive = size[size > 0]
    floor = 1e-2 * float(np.median(positive)) if len(positive) else 1.0
    x = np.log(np.maximum(size, floor))
    order = np.argsort(seen.rollout, kind="stable")
    bins = np.empty(len(seen), dtype=np.int64)
    bins[order] = np.arange(len(seen)) * 16 // max(len(seen), 1)
    count = np.maximum(np.bincount(bins, minlength=16), 1)
    return seen, x - (np.bincount(bins, weights=x, minlength=16) / count)[bins]


def of_token(tokens: Tokens, name: str) -> Array | None:
    """A field of tokens, or one of sequences spread over their tokens; int "n"."""
    x: Array | None = getattr(tokens, name)
    return x[tokens.row] if x is not None and name in OF_SEQUENCE else x


def distinct(tokens: Tokens) -> Array:
    """The same number for sequences with the same log-probs; int "s"."""
    key = np.bincount(tokens.row, weights=tokens.rollout * (1 + tokens.position),
                      minlength=tokens.count)
    numbers: Array = np.unique(key, return_inverse=True)[1]
    return numbers
