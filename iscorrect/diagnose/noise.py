"""What numerical noise has to pass before it is called that, and its scale."""

from __future__ import annotations

import math

import numpy as np
import torch

from iscorrect.diagnose import causes
from iscorrect.diagnose.fields import stored_in_16_bits
from iscorrect.diagnose.findings import Cause, Finding
from iscorrect.diagnose.scale import doubtless, levels, of_token
from iscorrect.dumps import Estimate, Tokens
from iscorrect.dumps.names import Array
from iscorrect.loss.pareto import pareto_tail

NOISE = "nothing beyond numerical noise"
IDENTICAL = "log-probs of both sides are the same numbers"
UNEXPLAINED = "larger than 16-bit rounding, without a pattern"

SCALES = {"float32": (0.0, 3e-4), "float16": (3e-4, 1e-2), "bfloat16": (1e-2, 3e-1)}
"""Typical differences of log-odds between kernels that round to each format."""

NEAR = 3e-6  # nats

PARTS = 16  # of the sequences, each left out once for the error of the scale


def heavy_tail(tokens: Tokens) -> Finding | None:
    """Rare large differences amid small ones, not all of them upwards."""
    out, limit = _far(tokens)
    n = int(out.sum())
    if n < max(5, 1e-3 * len(tokens)) or _upwards(tokens.d[out]) or _partly_equal(tokens):
        return None
    d = tokens.d
    k = float(pareto_tail(torch.from_numpy(d)[None], torch.ones(1, len(d)) > 0).k)
    index = f"; Pareto index {k:.2f}" if math.isfinite(k) else ""
    place, likeliest = _where_most_are(tokens, out)
    return Finding(
        HEAVY_TAIL,
        f"{n} tokens ({n / len(d):.2%}) differ by more than {limit:.2g} nats,"
        f" {int((d[out] > 0).sum())} of them upwards{place}, amid noise of"
        f" {tokens.typical():.2g}{index}",
        (*likeliest, *(c for c in _of_the_tail(tokens) if c not in likeliest)),
        n / len(d), correctable=_rounding(tokens),
    )


def _where_most_are(tokens: Tokens, out: Array) -> tuple[str, tuple[Cause, ...]]:
    """An engine or version that has far more than its share of some tokens, in words."""
    for name, likeliest in (("engine", causes.ONE_ENGINE), ("version", causes.STALE_WEIGHTS)):
        label = of_token(tokens, name)
        if label is None:
            continue
        units, member = np.unique(label, return_inverse=True)
        count = np.bincount(member, weights=out, minlength=len(units))
        most = int(count.argmax())
        n, k, share = int(out.sum()), count[most], float((member == most).mean())
        if share < 0.5 and k > 0.5 * n and _distance(n, k / n, math.log(share)) > math.log(1e6):
            called = tokens.label(name, int(units[most]))
            return f", {int(k)} of them of {name} {called}", (likeliest,)
    return "", ()


def _distance(n: int, share: float, log_expected: float) -> float:
    """−log of Chernoff's bound on the chance of such a share of n, where less is expected."""
    distance = share * (math.log(share) - log_expected)
    if share < 1:
        distance += (1 - share) * math.log((1 - share) / (1 - math.exp(log_expected)))
    return n * distance


def _rounding(tokens: Tokens) -> bool:
    """Whether the bulk of the tokens differ by no more than 16-bit kernels make them."""
    return tokens.logit_noise() < SCALES["bfloat16"][1] / 2


def _of_the_tail(tokens: Tokens) -> tuple[Cause, ...]:
    """What makes rare large differences: amid those of rounding, or amid larger ones."""
    if _rounding(tokens):
        return (causes.ROUTING, causes.QUANTISED, causes.STALE_WEIGHTS, causes.WRONG_TOKENS,
                causes.CORRUPTED)
    seen, x = levels(tokens)
    (first,), _ = seen.regress(x, (seen.position < 4).astype(float))
    rest = causes.DEFINITION, causes.STALE_WEIGHTS, causes.ROUTING
    if doubtless(first, seen) and first.value > math.log(1.5):
        return causes.WRONG_PROMPT, causes.QUANTISED, causes.POSITIONS, *rest
    if first.value < 0:
        return causes.POSITIONS, causes.QUANTISED, causes.WRONG_PROMPT, *rest
    return causes.QUANTISED, causes.WRONG_PROMPT, causes.POSITIONS, *rest


def _far(tokens: Tokens) -> tuple[Array, float]:
    limit = max(0.5, 8 * tokens.typical())
    return np.abs(tokens.d) > limit, limit


def _upwards(d: Array) -> bool:
    """Whether more are upwards than chance makes of even odds, at 1e-4.

    Tokens come from the engine, so that of two policies that differ the log-ratio is below 0 more
    often than above; nothing honest makes it rise alone.
    """
    share = float((d > 0).mean())
    if share <= 0.5:
        return False
    return _distance(len(d), share, math.log(0.5)) > math.log(1e4)


HEAVY_TAIL = "rare large differences"


def unearned(tokens: Tokens) -> Finding | None:
    """The first test of noise that fails, whether or not its failure has a name."""
    for test in (_one_sided, _partly_equal, _mean_ratio):
        finding = test(tokens)
        if finding:
            return finding
    return None


def beyond_bound(tokens: Tokens) -> Finding | None:
    """P(ρ ≥ c) ≤ 1/c at every token, given what came before, if E ρ = 1.

    So the number of them is at most binomial, whatever sequences share; Chernoff's bound of its
    tail must not be below 1e-9.
    """
    d, n = tokens.d, len(tokens)
    for c in (1, 2, 3, 5, 8, 12, 20, 30, 50, 100, 1000):
        k = int((d >= c).sum())
        share, allowed = k / n, math.exp(-c)
        if k == 0 or share <= allowed:
            continue
        if _distance(n, share, -c) > math.log(1e9):
            worst = int(d.argmax())
            whole = bool((tokens.rollout[d >= c] == np.round(tokens.rollout[d >= c])).all())
            sides = (causes.CORRUPTED, causes.SENTINEL)
            return Finding(
                "more high ratios than a probability allows",
                f"{k} of {n} tokens have ρ ≥ e^{c}, where E ρ = 1 allows {n * allowed:.2g}; the"
                f" highest is e^{d[worst]:.3g} in sequence {tokens.sequence(tokens.row[worst])} at"
                f" token {tokens.position[worst]}, to which the engine gives"
                f" {tokens.rollout[worst]:.6g}",
                (*(sides[::-1] if whole else sides), causes.CANDIDATE, causes.PREFILLED), share,
            )
    return None


def _one_sided(tokens: Tokens) -> Finding | None:
    """Rare large differences, nearly all upwards."""
    d = tokens.d
    out, limit = _far(tokens)
    n = int(out.sum())
    if n < max(5, 1e-3 * len(d)) or not _upwards(d[out]):
        return None
    worst = int(np.abs(d).argmax())
    return Finding(
        "rare large differences of one sign",
        f"on {n} tokens ({n / len(d):.2%}) in {len(np.unique(tokens.row[out]))} sequences the"
        f" engine is lower by more than {limit:.2g} nats, amid noise of {tokens.typical():.2g};"
        f" farthest in sequence {tokens.sequence(tokens.row[worst])} at token"
        f" {tokens.position[worst]}, by {abs(d[worst]):.3g}",
        (causes.CORRUPTED, causes.SPECULATIVE, causes.CANDIDATE, causes.SENTINEL, causes.ROUTING),
        n / len(d),
    )


def _mean_ratio(tokens: Tokens) -> Finding | None:
    """E ρ = 1 for tokens from an engine that reports what it samples from."""
    excess = tokens.mean(np.expm1(np.minimum(tokens.d, 30)))
    if not doubtless(excess, tokens) or abs(excess.value) < 0.1 * tokens.typical():
        return None
    return Finding(
        "mean ratio other than 1",
        f"the mean ratio is 1 {excess}, where it is 1 for every engine that reports what it samples"
        " from",
        (causes.HIDDEN_SAMPLER, causes.TRUNCATION, causes.CORRUPTED) if excess.value > 0
        else (causes.TRUNCATION, causes.GRAMMAR, causes.CANDIDATE),
        excess.value, excess.error,
    )


def _partly_equal(tokens: Tokens) -> Finding | None:
    """Tokens that agree to the bit amid tokens that do not, where p is far from 1."""
    open_ = np.maximum(tokens.rollout, tokens.old) < math.log(0.9)
    d = tokens.d[open_]
    equal = d == 0
    if len(d) < 64 or float(equal.mean()) < 0.05 or equal.all():
        return None
    apart = np.abs(d[~equal])
    usual = float(np.median(apart))
    # Kernels that round alike agree to a few units of float32 too; copies have no such neighbours.
    near = int((apart <= NEAR).sum())
    if usual < 1e-3 or near > 0.1 * int(equal.sum()) or len(stored_in_16_bits(tokens)) == 2:
        return None
    return Finding(
        "a part of the log-probs is equal to the bit",
        f"{float(equal.mean()):.1%} of tokens with p < 0.9 are equal on both sides, the others"
        f" differ by {usual:.2g}",
        (causes.COPIED, causes.BAD_BATCH), float(equal.mean()),
    )


def noise(tokens: Tokens, floor: float | None) -> Finding:
    """The scale of what is left, with its interval; what a null leaves is called noise."""
    if not tokens.d.any():
        return Finding(
            IDENTICAL,
            f"all {len(tokens)} pairs of log-probs are equal, so nothing is measured",
            (causes.COPIED, causes.BITWISE), 0.0,
        )
    apart = tokens if tokens.logit_noise() > 0 else tokens.where(tokens.d != 0)
    scale = Estimate(apart.logit_noise(), _error_of_scale(apart))
    low, high = max(scale.value - 2 * scale.error, 0.0), scale.value + 2 * scale.error
    evidence = (
        f"log-odds typically differ by {scale.value:.2g} ({low:.2g} to {high:.2g}), log-probs by"
        f" {apart.typical():.2g}"
    )
    if len(apart) < len(tokens):
        evidence += f" on the {len(apart) / len(tokens):.1%} of tokens that differ at all"
    if floor is not None:
        evidence += f", those of the null by {floor:.2g}"
        if apart.typical() <= 1.5 * floor:
            return Finding(
                NOISE, evidence, (causes.ROUNDING,), scale.value, scale.error, correctable=True,
            )
    least, most = SCALES["bfloat16"]
    if scale.value >= most:
        return Finding(
            UNEXPLAINED,
            f"{evidence}, where bfloat16 kernels make the former {least:g} to {most:g}",
            (causes.LARGER, causes.QUANTISED, causes.DEFINITION, causes.STALE_WEIGHTS),
            scale.value, scale.error,
        )
    kernels = " or ".join(
        name for name, (least, most) in SCALES.items() if low < most and high >= least
    )
    return Finding(
        NOISE, f"{evidence}, as between kernels that round to {kernels}", (causes.ROUNDING,),
        scale.value, scale.error, correctable=True,
    )


def _error_of_scale(tokens: Tokens) -> float:
    """Jackknife over parts of the sequences."""
    parts = [tokens.where(tokens.row % PARTS != k) for k in range(PARTS)]
    left = np.array([p.logit_noise() for p in parts if 0 < len(p) < len(tokens)])
    if len(left) < 2:
        return math.inf
    return math.sqrt((len(left) - 1) * float(left.var()))
