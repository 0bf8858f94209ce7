"""Log-probs that do not belong to their tokens: found first, and set aside."""

from __future__ import annotations

import math

import numpy as np

from iscorrect.diagnose import causes
from iscorrect.diagnose.findings import Finding
from iscorrect.diagnose.scale import confident, distinct, relative
from iscorrect.dumps import Tokens
from iscorrect.dumps.names import Array

# Where the other side is below this, a log-prob of exactly 0 is no rounded certainty.
UNLIKELY = math.log(0.5)


def misaligned(tokens: Tokens) -> Finding | None:
    """Values that match those of another position."""
    def distance(lag: int) -> float:
        ahead, behind = slice(abs(lag), None), slice(None, len(tokens) - abs(lag))
        a, b = (behind, ahead) if lag > 0 else (ahead, behind)
        old, rollout = tokens.old[a], tokens.rollout[b]
        # two certain tokens match wherever they stand
        same = tokens.row[a] == tokens.row[b]
        pairs = np.abs(old - rollout)[same & (np.minimum(old, rollout) < math.log(0.9))]
        return float(np.median(pairs)) if same.sum() >= 50 and len(pairs) >= 16 else math.inf

    here = distance(0)
    lag = min((-2, -1, 1, 2), key=distance)
    if not 0.1 <= here < math.inf or distance(lag) > 0.25 * here:
        return None
    return Finding(
        "log-probs match at another position",
        f"rollout_log_probs of the token {abs(lag)} {'later' if lag > 0 else 'earlier'} match"
        f" old_log_probs to a median of {distance(lag):.2g} nats, those of the same token to"
        f" {here:.2g}",
        (causes.SHIFTED,), here / max(distance(lag), 1e-12),
    )


def above_zero(tokens: Tokens) -> tuple[Finding | None, Tokens]:
    """Log-probs that no probability has."""
    impossible = np.maximum(tokens.rollout, tokens.old) > 0.01
    n = int(impossible.sum())
    if n == 0:
        return None, tokens
    side = "rollout" if (tokens.rollout > 0.01).sum() >= (tokens.old > 0.01).sum() else "old"
    return Finding(
        "log-probs above 0",
        f"{n} tokens ({n / len(tokens):.2%}) of {side}_log_probs are above 0, up to"
        f" {float(np.maximum(tokens.rollout, tokens.old).max()):.3g}",
        (causes.NEGATED, causes.CORRUPTED), n / len(tokens),
    ), tokens.where(~impossible)


def constants(tokens: Tokens) -> tuple[Finding | None, Tokens]:
    """One value in many places where the other side varies."""
    sides = {"rollout": _repeated(tokens, tokens.rollout, tokens.old),
             "old": _repeated(tokens, tokens.old, tokens.rollout)}
    side = max(sides, key=lambda name: sides[name].sum())
    filled = sides[side]
    n = int(filled.sum())
    if n < 3:
        return None, tokens
    x = getattr(tokens, side)
    other = tokens.old if side == "rollout" else tokens.rollout
    values, counts = np.unique(x[filled], return_counts=True)
    value = float(values[counts.argmax()])
    place, among, where = _place(tokens, filled)
    if value == 0 and place == "" and float((other[filled] < UNLIKELY).mean()) < 0.05:
        rest = tokens.where(~filled)
        excess = rest.mean(np.expm1(np.minimum(rest.d, 30)))
        if excess.value < -3 * excess.error:
            return None, tokens  # certainty of a truncated sampler: the other tokens show it too
    more = f" (and {len(values) - 1} other values)" if len(values) > 1 else ""
    spread = np.quantile(other[filled], (0.05, 0.95))
    likeliest = {
        "last": (causes.STOP_TOKEN, causes.MISSING), "turn": (causes.TURN_END, causes.STOP_TOKEN),
        "runs": (causes.ENVIRONMENT, causes.PREFILLED, causes.MISSING),
        "begins": (causes.PREFILLED, causes.ENVIRONMENT, causes.MISSING),
    }.get(place, (causes.MISSING, causes.SENTINEL, causes.CANDIDATE) if value == 0
          else (causes.SENTINEL, causes.MISSING))
    located = f"{among:.0%} of them {where}"
    everywhere = float((x == value).mean())
    if everywhere > 0.99:
        likeliest = (causes.GREEDY, *likeliest)
        located = f"it is the value of {everywhere:.1%} of all tokens"
    return Finding(
        "one value in many places",
        f"{side}_log_probs are {value:.6g}{more} on {n} tokens ({n / len(tokens):.2%}) in"
        f" {len(np.unique(tokens.row[filled]))} of {tokens.sequences} sequences, where the other"
        f" side says {spread[0]:.3g} to {spread[1]:.3g}; {located}",
        likeliest, n / len(tokens),
    ), tokens.where(~filled)


def _repeated(tokens: Tokens, x: Array, other: Array) -> Array:
    """Whether a token's value stands elsewhere too while the other side varies; bool "n".

    Equal contexts and rounded logits make equal values as well, but then those of the other side
    are near each other.
    """
    values, inverse = np.unique(x, return_inverse=True)
    # Copies of a sequence, as in a bootstrap sample, have its values.
    rows = distinct(tokens)[tokens.row]
    _, first = np.unique(rows * (tokens.position.max() + 1) + tokens.position, return_index=True)
    count = np.bincount(inverse[first], minlength=len(values))
    total = np.bincount(inverse[first], weights=other[first], minlength=len(values))
    apart = relative(tokens.d, other)
    usual = apart[confident(tokens) & (apart > 0)]
    limit = 8 * 1.4826 * (float(np.median(usual)) if len(usual) else 1e-6)
    varies = relative(other - (total / np.maximum(count, 1))[inverse], other) > limit
    off = (apart > limit) & varies
    wrong, impossible = (
        np.bincount(inverse[first], weights=w[first], minlength=len(values))
        for w in (off, off & (np.abs(tokens.d) > 3))
    )
    many = max(8, 1e-3 * len(first))
    constant = (wrong >= 0.4 * count) & ((wrong >= many) | (impossible >= 3))
    found: Array = constant[inverse] | ((x == 0) & (other < UNLIKELY)) | _closing(tokens, x, other)
    return found


def _closing(tokens: Tokens, x: Array, other: Array) -> Array:
    """Zeros at the end of nearly all sequences, where the other side is not certain; bool "n"."""
    ends = np.r_[tokens.row[1:] != tokens.row[:-1], True]
    zero = x == 0
    closing = ends & zero
    placeholder = (
        closing.sum() >= max(8, 0.9 * ends.sum())
        and (zero & ~ends).sum() < 0.2 * len(tokens)
        and float(np.median(-other[closing])) > max(0.02, tokens.typical())
    )
    return closing if placeholder else np.zeros(len(tokens), dtype=bool)


def _place(tokens: Tokens, filled: Array) -> tuple[str, float, str]:
    """Where the filled tokens stand: a name, the share of them, and the place in words."""
    ends = np.r_[tokens.row[1:] != tokens.row[:-1], True]
    in_runs = float((run_lengths(filled, tokens.row)[filled] >= 4).mean())
    if in_runs > 0.7:
        opened = _opens(tokens, filled)
        return "begins" if opened else "runs", in_runs, (
            "in runs of four or more" + (" that mostly begin a sequence" if opened else "")
            + ": the engine did not sample them"
        )
    last, closed = float(ends[filled].mean()), float(filled[ends].mean())
    if last >= 0.9:
        return "last", last, "the last token of their sequence"
    if tokens.turn is not None:
        closing = ends | np.r_[tokens.turn[1:] != tokens.turn[:-1], True]
        at_turns = float(closing[filled].mean())
        if at_turns >= 0.9:
            return "turn", at_turns, "the last token of their turn"
    if last >= 0.5 and closed >= 0.9:
        return "last", last, "the last token of their sequence"
    return "", float((~ends)[filled].mean()), "inside their sequence"


def _opens(tokens: Tokens, some: Array) -> bool:
    """Whether most runs of such tokens begin their sequence, and others follow."""
    begins = np.r_[True, tokens.row[1:] != tokens.row[:-1]]
    starts = some & (begins | ~np.r_[False, some[:-1]])
    return float(begins[starts].mean()) > 0.5 and not some.all()


def unsampled(tokens: Tokens) -> tuple[Finding | None, Tokens]:
    """Runs of text that neither policy would have written, scored alike by both."""
    if tokens.gap is None or len(tokens) < 8:
        return None, tokens
    gap = np.where(np.isfinite(tokens.gap), tokens.gap, 0.0)  # an unknown entropy is no surprise
    both = gap + np.minimum(tokens.d, 0)  # surprisal of the less surprised side
    spread = 1.4826 * float(np.median(np.abs(both - np.median(both)))) / math.sqrt(8)
    limit = max(2.0, 8 * spread)
    # Real text has single tokens of great surprise; here at least half of a run must have some.
    means = np.convolve(np.minimum(both, 2 * limit), np.full(8, 1 / 8), "valid")
    whole = tokens.row[7:] == tokens.row[:-7]
    starts = np.flatnonzero(whole & (means > limit))
    foreign = np.zeros(len(tokens), dtype=bool)
    for offset in range(8):
        foreign[starts + offset] = True
    foreign = _in_long_runs(foreign, tokens.row, 12)  # a window of 8 that is beyond is chance
    _, one_of_each = np.unique(distinct(tokens), return_index=True)
    if int(foreign[np.isin(tokens.row, one_of_each)].sum()) < 24:
        return None, tokens
    share = float(foreign.mean())
    likeliest = causes.ENVIRONMENT, causes.PREFILLED
    if _opens(tokens, foreign):
        likeliest = causes.PREFILLED, causes.ENVIRONMENT
    return Finding(
        "runs that surprise both sides",
        f"{int(foreign.sum())} tokens ({share:.2%}) lie in runs whose surprisal exceeds the"
        f" entropy by {float(both[foreign].mean()):.1f} nats per token on both sides:"
        " nobody sampled them",
        likeliest, share,
    ), tokens.where(~foreign)


def _in_long_runs(chosen: Array, row: Array, least: int) -> Array:
    """Those of the chosen tokens "n" that lie in runs of so many in one sequence."""
    joined = np.zeros(len(chosen), dtype=bool)
    joined[1:] = chosen[1:] & chosen[:-1] & (row[1:] == row[:-1])
    run = np.cumsum(chosen & ~joined)
    long: Array = chosen & (np.bincount(run, weights=chosen)[run] >= least)
    return long


def diverging(tokens: Tokens) -> tuple[Finding | None, Tokens]:
    """Sequences that agree up to a token and never again after it."""
    limit = max(0.3, 8 * tokens.typical())
    bad = (np.abs(tokens.d) > limit).astype(float)
    before, after, length = _cumulative(bad, tokens)
    left = length - tokens.position
    turning = (
        (tokens.position >= 4) & (left >= 8)
        & (before <= 0.05 * tokens.position) & (after >= 0.5 * left) & (bad > 0)
    )
    rows = np.unique(tokens.row[turning])
    if len(rows) < max(2, 0.005 * tokens.sequences):
        return None, tokens
    first = np.full(tokens.count, np.iinfo(np.int64).max)
    np.minimum.at(first, tokens.row[turning], tokens.position[turning])
    belongs = tokens.position < first[tokens.row]
    at = first[rows]
    # Texts part anywhere, and some of them; definitions of a model part all at one position.
    together = float((np.abs(at - np.median(at)) <= 8).mean())
    likeliest = (causes.DIVERGED, causes.VERSIONS_INSIDE, causes.PREEMPTED)
    if len(rows) >= max(8, 0.3 * tokens.sequences) and together > 0.7:
        likeliest = (causes.POSITIONS, causes.VERSIONS_INSIDE, causes.DIVERGED)
    return Finding(
        "sequences that part at a token",
        f"{len(rows)} of {tokens.sequences} sequences agree up to a token and then differ by more"
        f" than {limit:.2g} nats on {float(bad[~belongs].mean()):.0%} of those that follow; first"
        f" in sequence {tokens.sequence(rows[0])} at token {int(at[0])}, {together:.0%} within"
        f" eight tokens of position {int(np.median(at))}",
        likeliest,
        len(rows) / tokens.sequences,
    ), tokens.where(belongs)


def replaced(tokens: Tokens) -> tuple[Finding | None, Tokens]:
    """Single tokens that the trainer finds impossible."""
    d = tokens.d
    impossible = (d < -3) & (d < -10 * tokens.typical())
    n = int(impossible.sum())
    if n < max(5, 1e-3 * len(tokens)) or tokens.typical() > 0.3:
        return None, tokens
    near = int(((d < -1) & (d >= -3)).sum())
    size = np.minimum(np.abs(d), 2)
    steps = range(1, 5)
    behind = _beside(size, impossible, tokens.row, [-k for k in steps])
    ahead = _beside(size, impossible, tokens.row, list(steps))
    if n <= near:  # a tail, not single tokens apart from the rest
        return None, tokens
    # What follows is conditioned on them.
    first = np.full(tokens.count, np.iinfo(np.int64).max)
    np.minimum.at(first, tokens.row[impossible], tokens.position[impossible])
    likeliest = (causes.WRONG_TOKENS, causes.CANDIDATE, causes.SPECULATIVE)
    if ahead < 2 * behind and ahead < 5 * tokens.typical():  # nothing was conditioned on them
        likeliest = (causes.CANDIDATE, causes.SPECULATIVE, causes.WRONG_TOKENS)
    return Finding(
        "single tokens that the trainer finds impossible",
        f"{n} tokens ({n / len(tokens):.2%}) have a ratio below 1/20 amid noise of"
        f" {tokens.typical():.2g} nats; the four tokens after them differ by {ahead:.2g} nats, the"
        f" four before by {behind:.2g}",
        likeliest, n / len(tokens),
    ), tokens.where(tokens.position < first[tokens.row])


def _cumulative(x: Array, tokens: Tokens) -> tuple[Array, Array, Array]:
    """Sum of x before each token of its sequence, from it on, and the sequence's length."""
    running = np.cumsum(x) - x
    starts = np.flatnonzero(np.r_[True, tokens.row[1:] != tokens.row[:-1]])
    lengths = np.diff(np.r_[starts, len(x)])
    before = running - np.repeat(running[starts], lengths)
    total = np.repeat(np.add.reduceat(x, starts), lengths)
    return before, total - before, np.repeat(tokens.position[starts] + lengths, lengths)


def run_lengths(x: Array, row: Array) -> Array:
    """Length of the run of equal values that each entry stands in, within its sequence."""
    starts = np.flatnonzero(np.r_[True, (x[1:] != x[:-1]) | (row[1:] != row[:-1])])
    lengths = np.diff(np.r_[starts, len(x)])
    return np.repeat(lengths, lengths)


def _beside(x: Array, which: Array, row: Array, offsets: list[int]) -> float:
    """Mean of x at some distances from the chosen tokens, in their sequences."""
    at = np.flatnonzero(which)
    values = []
    for offset in offsets:
        there = at + offset
        inside = (there >= 0) & (there < len(x))
        inside[inside] &= row[there[inside]] == row[at[inside]]
        values.append(x[there[inside]])
    found = np.concatenate(values)
    return float(found.mean()) if len(found) else 0.0
