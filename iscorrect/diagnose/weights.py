"""Weights that differ: over steps, with age, or in what repeats with a token."""

from __future__ import annotations

import math

import numpy as np

from iscorrect.diagnose import causes
from iscorrect.diagnose.findings import Cause, Finding
from iscorrect.diagnose.scale import distinct, doubtless, levels
from iscorrect.dumps import Estimate, Tokens
from iscorrect.dumps.names import Array

OTHER_WEIGHTS = "log ρ repeats with the token"
WITH_AGE = "mismatch grows with the age of the weights"
PLATEAU = "mismatch grows over the first steps and stays"
OF_A_STEP = 32  # tokens that are not certain
FADING = 0.09
"""Of |Δ|, in units of itself, per logarithm of the position."""


def growing(tokens: Tokens) -> Finding | None:
    """A mismatch that rises with the steps: to the end, or to a level that it keeps."""
    steps, level, medians = _by_step(tokens)
    if len(steps) < 4:
        return None
    rising = float((np.diff(level) > 0).mean())
    growth = np.polyfit(steps - steps[0], level, 1)[0] * (steps[-1] - steps[0])
    told = (
        f"|Δ log p| of tokens of one confidence grows {math.exp(level[-1] - level[0]):.2g} times"
        f" from step {steps[0]} to step {steps[-1]}, its median from {medians[0]:.2g} to"
        f" {medians[-1]:.2g}"
    )
    half = len(steps) // 2
    late = level[half:]
    early = float(np.median(late) - level[0])
    drift = abs(float(np.polyfit(np.arange(len(late)), late, 1)[0])) * (len(late) - 1)
    if len(steps) >= 8 and early > math.log(3) and drift < max(0.35, 0.2 * early):
        return Finding(
            PLATEAU,
            f"{told}, and has been within {math.exp(float(np.ptp(late))):.2g} times since step"
            f" {steps[half]}",
            (causes.SWALLOWED, causes.NEVER_SYNCHRONISED, causes.STALE_WEIGHTS),
            math.exp(early), correctable=True,
        )
    if growth < math.log(3) or rising < 0.7:
        return None
    return Finding(
        "mismatch grows with the steps", f"{told}, in {rising:.0%} of the steps between",
        (causes.NEVER_SYNCHRONISED, causes.SWALLOWED, causes.DEFINITION), math.exp(growth),
    )


def over_time(tokens: Tokens) -> Finding | None:
    """A mismatch that grows with age, or one step apart from the others."""
    everything = tokens
    if tokens.age is not None:
        tokens = tokens.where(np.isfinite(tokens.age))
    age = tokens.age
    if age is not None and len(age) and age.min() < age.max():
        size = np.minimum(np.abs(tokens.d), 2)
        (slope,), _ = tokens.regress(size, age)
        seen, level = levels(tokens)
        assert seen.age is not None
        (beyond,), _ = seen.regress(level, seen.age)  # what confidence explains
        grows = doubtless(slope, tokens) and doubtless(beyond, seen) and beyond.value > 0
        if grows and slope.value * np.ptp(age) > size.mean() / 2:
            ages, member = np.unique(age, return_inverse=True)
            k3 = np.bincount(member, weights=tokens.k3) / np.bincount(member)
            inside = bool(((age[1:] != age[:-1]) & (tokens.row[1:] == tokens.row[:-1])).any())
            shown = sorted({0, len(ages) // 2, len(ages) - 1})
            told = ", ".join(f"{ages[i]:g} steps old {k3[i]:.2g}" for i in shown)
            return Finding(
                WITH_AGE,
                f"|Δ log p| grows by {slope} nats with each step of age; k3 of tokens {told}"
                + ("; answers hold tokens of several versions" if inside else ""),
                (causes.STALE_WEIGHTS, *([causes.VERSIONS_INSIDE] if inside else []),
                 causes.ONE_ENGINE),
                slope.value, slope.error, correctable=True,
            )
    steps, level, medians = _by_step(everything)
    if len(steps) >= 3 and (apart := float(level.max() - np.median(level))) > math.log(4):
        worst = int(level.argmax())
        return Finding(
            "one step apart from the others",
            f"|Δ log p| of tokens of one confidence is {math.exp(apart):.2g} times as large at step"
            f" {steps[worst]} as at a usual one, its median {medians[worst]:.2g} for"
            f" {np.median(medians):.2g}",
            (causes.STALE_WEIGHTS, causes.BAD_BATCH, causes.ONE_ENGINE),
            math.exp(apart), correctable=True,
        )
    return None


def other_weights(tokens: Tokens) -> Finding | None:
    """Rounding depends on all that came before a token; other weights move it alike anywhere."""
    repeats = repeats_with_token(tokens)
    if repeats is None or not doubtless(repeats, tokens) or repeats.value < 0.05:
        return None
    stale = repeats.value >= 0.35
    known = tokens.with_entropy()
    if stale and known.gap is not None:
        (flatter,), _ = known.regress(known.d, -known.gap)
        # coarse weights blur what the engine says; a training step does not
        stale = not (doubtless(flatter, known) and flatter.value > 0.03)
    likeliest: tuple[Cause, ...] = (causes.STALE_WEIGHTS, causes.QUANTISED) if stale else \
        (causes.QUANTISED, causes.STALE_WEIGHTS)
    compared = "as much as a training step makes them" if stale else \
        "less than a training step makes them"
    evidence = (
        f"log ρ repeats with the token across sequences ({repeats} of its variance): the engine"
        f" holds other weights, {compared}, at a typical difference of log-odds of"
        f" {tokens.logit_noise():.2g}"
    )
    excess = tokens.mean(np.expm1(np.minimum(tokens.d, 30)))
    reported = not (doubtless(excess, tokens) and excess.value > 0.1 * tokens.typical())
    if not reported:
        evidence += f"; nor does it sample from them: the mean ratio is 1 {excess}, and not 1"
        likeliest = (causes.SPECULATIVE, *likeliest)
    return Finding(
        OTHER_WEIGHTS, evidence,
        (*likeliest, causes.ADAPTER, causes.DEFINITION, causes.SHARED_CACHE, causes.SWALLOWED),
        repeats.value, repeats.error, correctable=reported and _small(tokens),
    )


def fading(tokens: Tokens) -> Finding | None:
    """A mismatch that falls along answers; rounding's hardly does, for tokens of one confidence.

    What an answer begins with rests on the prompt alone, and later tokens ever more on each other.
    The first token is left out: it is computed with the prompt, by other kernels.
    """
    seen, x = levels(tokens)
    later = seen.position > 0
    seen, x = seen.where(later), x[later]
    along = -np.log1p(seen.position)
    if len(seen) < 256 or np.ptp(along) < math.log(8):
        return None
    # within sequences: short ones may differ from long ones for other reasons
    (slope,), _ = seen.regress(_within(x, seen.row), _within(along, seen.row))
    if not doubtless(slope, seen) or slope.value < FADING:
        return None
    contexts = causes.STALE_WEIGHTS, causes.SHARED_CACHE
    others = causes.QUANTISED, causes.HEAD_ENGINE
    return Finding(
        "mismatch fades along answers",
        f"|Δ log p| falls by {1 - 2**-slope.value:.0%} whenever the position doubles (its log by"
        f" {slope} per log of the position), beyond what the confidence of the tokens explains",
        (causes.WRONG_PROMPT, *contexts, *others) if slope.value > 0.2
        else (*contexts, causes.WRONG_PROMPT, *others),
        slope.value, slope.error, correctable=_small(tokens),
    )


def _within(x: Array, row: Array) -> Array:
    """What is left of x "n" when each sequence's mean is taken off."""
    count = np.maximum(np.bincount(row), 1)
    within: Array = x - (np.bincount(row, weights=x) / count)[row]
    return within


def _small(tokens: Tokens) -> bool:
    """Whether token weights keep nearly all of their sample: their ESS is above 0.9."""
    ratio = np.exp(np.minimum(tokens.d, 30))
    return float(ratio.mean() ** 2 / np.square(ratio).mean()) > 0.9


def repeats_with_token(tokens: Tokens) -> Estimate | None:
    """How much of the variance of log-odds errors returns with the same token in other sequences.

    Products of errors are averaged over pairs of equal tokens in different sequences, so that what
    is not shared has the expectation 0, and the error is clustered by sequence.
    """
    if tokens.ids is None:
        return None
    x = tokens.d / (1.02 - np.minimum(np.exp(tokens.old), 1.0))
    spread = 3 * max(1.4826 * float(np.median(np.abs(x))), 0.3 * float(x.std()))
    if spread == 0:
        return None
    x = np.clip(x, -spread, spread)
    x = x - x.mean()
    # Copies of a sequence, as in a bootstrap sample, share their noise.
    rows = distinct(tokens)[tokens.row]
    _, token = np.unique(tokens.ids, return_inverse=True)
    pair, inverse = np.unique(token * (rows.max() + 1) + rows, return_inverse=True)
    total = np.bincount(inverse, weights=x)
    count = np.bincount(inverse).astype(float)
    pair_token, pair_row = pair // (rows.max() + 1), pair % (rows.max() + 1)
    all_total = np.bincount(pair_token, weights=total)[pair_token]
    all_count = np.bincount(pair_token, weights=count)[pair_token]
    pairs = float((count * (all_count - count)).sum())
    if pairs < 1000:
        return None
    products = np.bincount(pair_row, weights=total * (all_total - total))
    products = products[np.unique(pair_row)]
    s = len(products)
    scale = pairs * float(x.var())
    error = float(products.std(ddof=1)) * math.sqrt(s) / scale if s > 1 else math.inf
    return Estimate(float(products.sum()) / scale, error)


def _by_step(tokens: Tokens) -> tuple[Array, Array, Array]:
    """The steps that have enough tokens to tell, the median level of each, and of |Δ log p|."""
    if tokens.step is None:
        return np.array([]), np.array([]), np.array([])
    seen, x = levels(tokens)
    _, member, count = np.unique(tokens.step[seen.row], return_inverse=True, return_counts=True)
    enough = count[member] >= OF_A_STEP
    seen, x = seen.where(enough), x[enough]
    step = tokens.step[seen.row]
    steps, level = _row_medians(x, step)
    return steps, level, _row_medians(np.abs(seen.d), step)[1]


def _row_medians(x: Array, row: Array) -> tuple[Array, Array]:
    """The rows there are, and the median of x in each."""
    order = np.lexsort((x, row))
    rows, start, count = np.unique(row[order], return_index=True, return_counts=True)
    return rows, x[order][start + count // 2]
