"""What moves all tokens in a pattern because of how they were sampled."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from iscorrect.diagnose import causes
from iscorrect.diagnose.findings import Finding
from iscorrect.diagnose.noise import SCALES
from iscorrect.diagnose.scale import doubtless
from iscorrect.dumps import Tokens
from iscorrect.dumps.names import Array

BEGINNING = 32  # tokens of an answer, within which text lies that the request prescribes


def temperature(tokens: Tokens) -> Finding | None:
    """Whether log ρ follows log π + H, as log π^(1/τ) − log π = (1/τ − 1)(log π + H) + … does."""
    known = tokens.with_entropy()
    tokens = known if 2 * len(known) >= len(tokens) else replace(tokens, gap=None)
    excess = -tokens.gap if tokens.gap is not None else tokens.old - tokens.old.mean()
    (slope,), explained = tokens.regress(tokens.d, excess)
    if not doubtless(slope, tokens) or abs(slope.value) < 0.01 or explained < 0.2:
        return None
    rest = math.sqrt(max(1 - explained, 0)) * float(tokens.d.std())
    if (explained < 0.5 and rest > 0.3) or _missing_mass(tokens):  # 16 bits leave less
        return None
    if tokens.seen is not None and _share_explained_by_repeats(tokens) > explained:
        return None
    if not _the_same_throughout(tokens, excess):
        return None
    if slope.value > 0.9:
        return Finding(
            "rollout_log_probs that do not follow the sampled token",
            f"log ρ moves by {slope} per nat of the trainer's log p, so the engine's does not move"
            " with it",
            (causes.CANDIDATE, causes.WRONG_TOKENS, causes.GREEDY), slope.value, slope.error,
        )
    tau = 1 / (1 - slope.value) if slope.value < 0 else 1 - slope.value
    raw = False
    if tokens.gap is not None:
        drift = tokens.mean(tokens.gap)
        expected = slope.value * float(np.square(tokens.gap).mean())
        raw = abs(drift.value) < abs(expected) / 2
    else:
        excess_ratio = tokens.mean(np.expm1(np.clip(tokens.d, -3, 3)))
        raw = doubtless(excess_ratio, tokens) and excess_ratio.value > 0
    numbers = (
        f"log ρ moves by {slope} per nat of log p, which explains {explained:.0%} of its variance"
        f" and is a temperature of about {tau:.3g}"
    )
    sides = (causes.ENGINE_TEMPERED, causes.TRAINER_TEMPERED)
    likeliest, other = sides if slope.value < 0 else sides[::-1]
    found = (likeliest, causes.RAW_TEMPERED, causes.SCALING)
    if raw:
        numbers += "; the tokens are distributed as the trainer says"
        found = (causes.RAW_TEMPERED, likeliest, causes.SCALING)
    elif tokens.gap is not None:
        found = (likeliest, causes.SCALING, other)
    return Finding(
        "log ρ in proportion to log p", numbers, found, slope.value, slope.error,
    )


def _the_same_throughout(tokens: Tokens, excess: Array) -> bool:
    """Whether the slopes in the first and the last quarter of positions agree to a factor."""
    first, last = np.quantile(tokens.position, (0.25, 0.75))
    quarters = tokens.position < first, tokens.position >= last
    if min(int(q.sum()) for q in quarters) < 64:
        return True
    slopes = [tokens.where(q).regress(tokens.d[q], excess[q])[0][0].value for q in quarters]
    return slopes[0] * slopes[1] > 0.4 * max(slope**2 for slope in slopes)


def _share_explained_by_repeats(tokens: Tokens) -> float:
    assert tokens.seen is not None
    return tokens.regress(tokens.d, tokens.seen.astype(float))[1]


def truncation(tokens: Tokens) -> Finding | None:
    """E ρ = 1 for an engine that reports what it samples from, but Z for a support of mass Z."""
    d = tokens.d
    if float(d.std()) > 0.5 and not _missing_mass(tokens):
        return None
    excess = tokens.mean(np.expm1(d))
    if not doubtless(excess, tokens) or excess.value > -2e-3:
        return None
    atoms = float(((tokens.rollout == 0) & (tokens.old < -1e-4)).mean())
    certain = f"; on {atoms:.1%} of tokens it reports certainty" if atoms > 1e-3 else ""
    return Finding(
        "mean ratio below 1",
        f"the mean ratio is 1 {excess}: the engine's probabilities are those of a distribution cut"
        f" to {1 + excess.value:.1%} of the trainer's mass{certain}",
        (causes.TRUNCATION, causes.GRAMMAR, causes.CANDIDATE), excess.value, excess.error,
    )


def _missing_mass(tokens: Tokens) -> bool:
    """Whether ρ falls short of 1 by far more than it exceeds it: E (ρ − 1) < −E |ρ − 1| / 2.

    Where both sides can sample the same tokens the two balance, E ρ = 1. A few large ratios may
    be missing from a small sample, so they count as e³ at most.
    """
    beyond = np.expm1(np.minimum(tokens.d, 3))
    return float(beyond.mean()) < -0.5 * float(np.abs(beyond).mean())


def penalty(tokens: Tokens) -> Finding | None:
    """Whether tokens that came before are less likely to the engine."""
    if tokens.seen is None or not 0.01 < tokens.seen.mean() < 0.99:
        return None
    (effect,), explained = tokens.regress(tokens.d, tokens.seen.astype(float))
    if not doubtless(effect, tokens) or effect.value < 0.01 or explained < 0.05:
        return None
    return Finding(
        "tokens that came before are less likely to the engine",
        f"the trainer finds tokens that came before more likely than the engine by {effect} nats,"
        f" which explains {explained:.0%} of the variance of log ρ",
        (causes.PENALTY,), effect.value, effect.error,
    )


def hidden_sampler(tokens: Tokens) -> list[Finding]:
    """Whether the tokens come from the distribution that both sides report."""
    tokens = tokens.with_entropy()
    if tokens.gap is None:
        return []
    gap = tokens.mean(tokens.gap)
    if not doubtless(gap, tokens) or abs(gap.value) < 0.01:
        return []
    if tokens.logit_noise() >= SCALES["bfloat16"][1]:  # one side may well report what was sampled
        return []
    varentropy = float(np.square(tokens.gap).mean())
    tau = 1 / (1 - gap.value / varentropy)
    colder = "sharper" if gap.value < 0 else "flatter"
    evidence = (
        f"the two sides agree to {tokens.typical():.2g} nats, but surprisal exceeds entropy by"
        f" {gap} nats: the tokens come from a {colder} distribution than either side reports, as"
        f" at a temperature of {tau:.3g}"
    )
    likeliest = causes.HIDDEN_SAMPLER, causes.ENTROPY_OTHER, causes.PREFILLED
    later = tokens.where(tokens.position >= BEGINNING)
    if gap.value > 0 and len(later) and later.gap is not None:
        rest = later.mean(later.gap)
        if abs(rest.value) < 0.1 * gap.value:
            evidence += f"; only at the beginning of answers, after {BEGINNING} tokens by {rest}"
            likeliest = causes.PREFILLED, causes.ENVIRONMENT, causes.HIDDEN_SAMPLER
    return [Finding(
        "tokens from a distribution that neither side reports", evidence, likeliest, gap.value,
        gap.error,
    )]
