"""The fields of a dump held against each other, before anything rests on them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from iscorrect.diagnose import causes
from iscorrect.diagnose.findings import Finding
from iscorrect.diagnose.scale import doubtless
from iscorrect.dumps import Tokens
from iscorrect.dumps.names import Array


def candidates(tokens: Tokens) -> tuple[Finding | None, Tokens]:
    """A sampled token among the candidates has their value; none is likelier than the first."""
    if tokens.best is None:
        return None, tokens
    # 16-bit values are off by 1/256 of themselves
    slack = 1e-3 + np.abs(tokens.rollout) / 128
    listed = np.zeros(len(tokens), dtype=bool)
    if tokens.candidate is not None:
        listed = np.isfinite(tokens.candidate)
    own = np.where(listed, tokens.rollout if tokens.candidate is None else tokens.candidate, 0.0)
    with np.errstate(invalid="ignore"):
        above = tokens.rollout > tokens.best + slack
        first = np.abs(tokens.rollout - tokens.best) <= slack
    apart = listed & (np.abs(own - tokens.rollout) > slack)
    wrong = above | apart
    n, named = int(wrong.sum()), int(listed.sum())
    if n < max(3, 1e-3 * len(tokens)):
        return None, tokens
    evidence = (
        f"the sampled token's log-prob exceeds the likeliest candidate's on {int(above.sum())} of"
        f" {len(tokens)} tokens, and differs from its own among the candidates on"
        f" {int(apart.sum())} of {named}"
    )
    follows = 0.0
    if named > 16 and float(own[listed].std()) > 0 and float(tokens.rollout[listed].std()) > 0:
        follows = float(np.corrcoef(own[listed], tokens.rollout[listed])[0, 1])
    if int((wrong & first).sum()) > 0.9 * n:
        evidence += "; it is the first candidate's instead"
        likeliest = [causes.CANDIDATE, causes.CANDIDATES_RAW]
    elif named and int(apart.sum()) < 0.3 * named:
        likeliest = [causes.CORRUPTED, causes.CANDIDATE, causes.CANDIDATES_RAW]
    elif follows > 0.8:
        likeliest = [causes.CANDIDATES_RAW, causes.CANDIDATE, causes.CANDIDATES_SHIFTED]
    else:
        likeliest = [causes.CANDIDATES_SHIFTED, causes.CANDIDATES_RAW, causes.CANDIDATE]
    return Finding(
        "candidates that contradict the sampled token", evidence, tuple(likeliest),
        n / len(tokens),
    ), _without(tokens, "best", "candidate", "lead")


def entropy(tokens: Tokens) -> tuple[Finding | None, Tokens]:
    """E[−log π] = H where the entropy is of the same logits, and H ≥ −log of the likeliest."""
    known = tokens.with_entropy()
    if known.gap is None:
        return None, tokens
    surprisal = -known.old
    h = surprisal - known.gap
    found = _constant(surprisal, h) or _of_a_neighbour(known, surprisal, h) or _of_other_logits(
        known, surprisal, h
    )
    return found, _without(tokens, "gap", "varentropy") if found else tokens


def _constant(surprisal: Array, h: Array) -> Finding | None:
    if len(h) < 64 or float(np.ptp(h)) >= 1e-6:
        return None
    return Finding(
        "entropy that contradicts the log-probs",
        f"it is {h[0]:.3g} on all {len(h)} tokens, whose surprisal is {surprisal.mean():.3g} on"
        f" average with a spread of {surprisal.std():.2g}",
        (causes.ENTROPY_OTHER,), float(surprisal.mean() - h[0]),
    )


def _of_a_neighbour(tokens: Tokens, surprisal: Array, h: Array) -> Finding | None:
    inner = np.flatnonzero(tokens.row[2:] == tokens.row[:-2]) + 1
    if len(inner) < 256 or float(h.std()) < 0.1:
        return None
    few = tokens.where(np.isin(np.arange(len(tokens)), inner))
    (own, before, after), _ = few.regress(
        surprisal[inner], h[inner], h[inner - 1], h[inner + 1]
    )
    other = max(before, after, key=lambda e: e.value)
    if doubtless(other, tokens) and other.value > 0.5 and own.value < 0.6:
        where = "before" if other is before else "after"
        return Finding(
            "entropy that contradicts the log-probs",
            f"surprisal follows the entropy of the token {where} ({other}) and not its own ({own})",
            (causes.ENTROPY_SHIFTED, causes.ENTROPY_OTHER), other.value, other.error,
        )
    return None


def _of_other_logits(tokens: Tokens, surprisal: Array, h: Array) -> Finding | None:
    negative = int((h < -1e-3).sum())
    below = 0
    if tokens.best is not None:  # of the engine, so that noise of its size is allowed
        least = -tokens.best
        with np.errstate(invalid="ignore"):
            below = int((h < least - 0.1 - 8 * tokens.typical() - 0.02 * least).sum())
    if negative + below > max(3, 1e-2 * len(tokens)):
        return Finding(
            "entropy that contradicts the log-probs",
            f"entropy is below 0 on {negative} tokens and below the surprisal of the likeliest"
            f" candidate, which it cannot be, on {below} of {len(tokens)}",
            (causes.ENTROPY_OTHER, causes.ENTROPY_SHIFTED), (negative + below) / len(tokens),
        )
    # Bits have the same shape as nats at every entropy, which no sampler's temperature has.
    if not doubtless(tokens.mean(surprisal - h), tokens):
        return None
    high = h > np.median(h)
    parts = [tokens.where(part).mean((surprisal - math.log(2) * h)[part]) for part in (high, ~high)]
    if all(abs(p.value) < 4 * p.error and p.error < 0.1 * float(h.mean()) for p in parts):
        return Finding(
            "entropy that contradicts the log-probs",
            f"surprisal is {float(surprisal.mean() / h.mean()):.3g} times the entropy at low and at"
            " high entropies, as log 2 = 0.693 is of bits",
            (causes.ENTROPY_OTHER, causes.HIDDEN_SAMPLER), float(surprisal.mean() / h.mean()),
        )
    return None


def varentropy(tokens: Tokens) -> tuple[Finding | None, Tokens]:
    """E[(−log π − H)²] is the varentropy of a policy that the tokens come from."""
    if tokens.varentropy is None:
        return None, tokens
    known = tokens.where(np.isfinite(tokens.varentropy)).with_entropy()
    if known.gap is None or known.varentropy is None:
        return None, tokens
    negative = int((known.varentropy < -1e-2).sum())
    held = known.mean(np.square(known.gap))
    said = float(known.varentropy.mean())
    # A sampler that is hotter or colder changes the spread as well, and is no fault of a column.
    same = not doubtless(known.mean(known.gap), known)
    wrong = same and abs(held.value - said) > max(8 * held.error, 0.5 * held.value)
    if negative <= max(3, 1e-2 * len(known)) and not wrong:
        return None, tokens
    return Finding(
        "varentropy that contradicts entropy and log-probs",
        f"(−log π − H)² is {held} on average, the varentropy {said:.3g}, below 0 on {negative}"
        " tokens",
        (causes.ENTROPY_OTHER,), held.value - said, held.error,
    ), _without(tokens, "varentropy")


def _without(tokens: Tokens, *fields: str) -> Tokens:
    """The tokens without some fields, on which nothing may rest."""
    none: dict[str, Any] = dict.fromkeys(fields)
    return replace(tokens, **none)


def two_passes(tokens: Tokens) -> list[Finding]:
    """Whether log π and log π_old are one policy's; later mini-batches may differ."""
    if tokens.current is None:
        return []
    change = (tokens.current - tokens.old)[np.isfinite(tokens.current)]
    if not len(change):
        return []
    usual = max(tokens.typical(), 1e-4)
    size = 1.4826 * float(np.median(np.abs(change)))
    if size < 2 * usual and size < 0.1:
        return []
    return [Finding(
        "log_probs and old_log_probs that differ",
        f"typically by {size:.2g} nats, where the engine differs from old_log_probs by"
        f" {usual:.2g}; at the first mini-batch both are the trainer's log-probs at the same"
        " weights, and must agree",
        (causes.TWO_PASSES, causes.LATER_UPDATES), size,
    )]


def stored_in_16_bits(tokens: Tokens) -> list[Finding]:
    """Values that are all bfloat16 or float16 numbers."""
    findings = []
    for name, x in (("rollout_log_probs", tokens.rollout), ("old_log_probs", tokens.old)):
        values = torch.from_numpy(x[x != 0]).float()
        for dtype in (torch.bfloat16, torch.float16):
            same = values.to(dtype).float() == values
            if len(values) >= 20 and float(same.float().mean()) > 0.99:
                findings.append(Finding(
                    "values on a 16-bit grid",
                    f"{float(same.float().mean()):.1%} of {name} are {str(dtype)[6:]} numbers; by"
                    f" chance {2.0 ** (-16 if dtype == torch.bfloat16 else -13):.0e} would be",
                    (causes.STORED,), float(same.float().mean()),
                ))
                break
    return findings


def sixteen_bit_head(everything: Tokens, tokens: Tokens) -> list[Finding]:
    """Logits of one position that a 16-bit head rounded differ by multiples of a power of two."""
    sides: list[tuple[str, Array]] = []
    if everything.lead is not None:
        lead = everything.lead[:20_000]
        sides.append(("engine", lead[np.isfinite(lead)]))
    if everything.group is not None and everything.ids is not None:
        sides += [
            ("engine", _first_token_differences(everything, everything.rollout)),
            ("trainer", _first_token_differences(everything, everything.old)),
        ]
    findings: dict[str, Finding] = {}
    for side, raw in sides:
        difference = np.abs(raw[raw != 0])
        # Larger logits have coarser steps: the spacing of half of the differences.
        spacing = next((k for k in range(2, 11) if _multiples(difference, 2.0**-k) > 0.5), None)
        if len(difference) < 16 or side in findings or spacing is None:
            continue
        # variance of a rounding error, and of the difference of log-odds
        part = 4.0**-spacing / 12 / max((1.4826 * tokens.logit_noise()) ** 2, 1e-30)
        findings[side] = Finding(
            HEAD,
            f"{_multiples(difference, 2.0**-spacing):.0%} of {len(difference)} differences between"
            f" two tokens of one position are multiples of 1/{2**spacing} in the {side}; by chance"
            f" {2**spacing * 2 * LATTICE_TOLERANCE:.1%} would be. Its rounding is about"
            f" {min(part, 1):.0%} of the variance of the mismatch",
            (causes.HEAD_ENGINE if side == "engine" else causes.HEAD_TRAINER,), part,
            correctable=True,
        )
    return list(findings.values())


HEAD = "logits on a 16-bit grid"
LATTICE_TOLERANCE = 4e-6


def _multiples(x: Array, spacing: float) -> float:
    if len(x) == 0:
        return 0.0
    return float((np.abs(x - np.round(x / spacing) * spacing) < LATTICE_TOLERANCE).mean())


def _first_token_differences(tokens: Tokens, x: Array) -> Array:
    """Log-probs x "n" of different first tokens of answers to one prompt, less one of them."""
    assert tokens.group is not None
    assert tokens.ids is not None
    first = np.flatnonzero(tokens.position == 0)
    groups, ids, values = tokens.group[tokens.row[first]], tokens.ids[first], x[first]
    order = np.lexsort((ids, groups))
    a, b = order[1:], order[:-1]
    pairs = (groups[a] == groups[b]) & (ids[a] != ids[b])
    difference: Array = values[a[pairs]] - values[b[pairs]]
    return difference
