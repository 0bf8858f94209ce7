"""From log-probs to causes: each cause a test of its own, applied in a fixed order.

The order follows what spoils what. Tokens that do not belong together (shifted, replaced, filled
with zeros) make every other number meaningless, so they are looked for first and set aside. Then
comes what moves all tokens in a pattern, and noise last. A test must pass twice: beyond doubt, by
errors clustered by sequence, and in size, since a large dump makes trifles significant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from iscorrect.dumps import Estimate, LogProbDump, Tokens
from iscorrect.dumps.names import Array
from iscorrect.dumps.tokens import as_tokens
from iscorrect.errors import input_error
from iscorrect.loss.pareto import pareto_tail


@dataclass(frozen=True)
class Finding:
    """A likely cause.

    Attributes:
        cause: a plain phrase, the same for every dump.
        evidence: one sentence with the numbers that speak for it.
        confirm: the cheapest control that would settle it.
        statistic: what was tested.
        error: its standard error, clustered by sequence; 0 where the evidence is a count.
    """

    cause: str
    evidence: str
    confirm: str
    statistic: float
    error: float = 0.0


NOISE = "nothing beyond numerical noise"
IDENTICAL = f"{NOISE}: identical log-probs"
SCALES = {
    3e-4: f"{NOISE}: float32 scale",
    1e-2: f"{NOISE}: float16 scale",
    3e-1: f"{NOISE}: bfloat16 scale",
}
"""Upper ends of the typical difference of log-odds, and what it is the mark of."""

ENVIRONMENT = "environment tokens in the mask"
WRONG_TOKENS = "wrong tokens"
STALE_WEIGHTS = "stale weights"
QUANTISED = "quantised rollout"
HEAVY_TAIL = "heavy tail"
HEAD = "16-bit LM head"
UNEXPLAINED = "larger than 16-bit"

LOOK_AT_TURNS = (
    "print the masked tokens around a turn's boundary; tool and user text must have mask 0"
)
COMPARE_IDS = "compare the token ids that the engine returned with those that the trainer scored"

# Where the other side is below this, a log-prob of exactly 0 is no rounded certainty.
UNLIKELY = math.log(0.5)


def diagnose(
    dump: LogProbDump | Tokens, *, null: LogProbDump | Tokens | None = None
) -> list[Finding]:
    """What made trainer and engine disagree, most likely cause first.

    Args:
        dump: or its tokens; optional fields sharpen it: `entropy` shows a sampler that is not what
            either side reports, `token_ids` repetition penalties and differing weights, `group`
            stale prefix caches, `step` and `policy_version` staleness, `top_k_log_probs` a 16-bit
            head.
        null: the same policy scored twice, one pass as rollout and the other as old, such as the
            trainer under two batch shapes. What is no larger than it is called noise.

    Returns:
        At least one finding; one whose cause begins with "nothing beyond numerical noise" when
        that is so.

    Raises:
        InputError: no token counts.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> rollout = -torch.rand(64, 32) * 4
    >>> noise = 0.02 * torch.randn(64, 32)
    >>> diagnose(LogProbDump(
    ...     rollout_log_probs=rollout, old_log_probs=rollout + noise * (1 - rollout.exp()),
    ...     mask=torch.ones(64, 32, dtype=torch.bool),
    ... ))[0].cause
    'nothing beyond numerical noise: bfloat16 scale'
    """
    everything = tokens = as_tokens(dump)
    if len(tokens) == 0:
        raise input_error(
            "diagnose", "dump", expected="with counted tokens",
            got=f"{tokens.count} sequences without any",
            fix="dump the tokens that enter the loss, with their mask",
        )
    misaligned = _misaligned(tokens)
    if misaligned:
        return [misaligned]

    findings = []
    for separate in (_placeholders, _unsampled, _diverging, _replaced):
        finding, belongs = separate(tokens)
        if finding:
            findings.append(finding)
            tokens = tokens.where(belongs)
        if len(tokens) == 0:
            return findings
    for explain in (
        _never_synchronised, _stale_over_time, _temperature, _truncation, _penalty, _stale_prefix,
        _wrong_prompt, _stale, _other_weights, _heavy_tail,
    ):
        finding = explain(tokens)
        if finding:
            findings.append(finding)
            break
    else:
        findings += _hidden_sampler(tokens)
    findings += _stored_in_16_bits(tokens)
    if findings:
        return findings + _sixteen_bit_head(everything, tokens)
    # A rounded head is part of what is called noise; it comes first where it is much of it.
    heads = _sixteen_bit_head(everything, tokens)
    much = [head for head in heads if head.statistic > 0.05]
    return much + [_noise(tokens, null)] + [head for head in heads if head not in much]


def _doubtless(estimate: Estimate, tokens: Tokens) -> bool:
    """Beyond 4.5 standard errors, and more where few sequences say how large those are."""
    s = tokens.sequences
    return s >= 8 and abs(estimate.z) > 4.5 * (1 + 8 / s)


def _misaligned(tokens: Tokens) -> Finding | None:
    def distance(lag: int) -> float:
        if lag == 0:
            return float(np.median(np.abs(tokens.d)))
        ahead, behind = slice(abs(lag), None), slice(None, -abs(lag))
        same = tokens.row[ahead] == tokens.row[behind]
        a, b = (behind, ahead) if lag > 0 else (ahead, behind)
        pairs = np.abs(tokens.old[a] - tokens.rollout[b])[same]
        return float(np.median(pairs)) if len(pairs) >= 50 else math.inf

    here = distance(0)
    lag = min((-2, -1, 1, 2), key=distance)
    if here < 0.1 or distance(lag) > 0.25 * here:
        return None
    return Finding(
        "log-probs shifted against each other",
        f"rollout_log_probs of the token {abs(lag)} {'later' if lag > 0 else 'earlier'} match"
        f" old_log_probs to a median of {distance(lag):.2g} nats, those of the same token to"
        f" {here:.2g}",
        "compare token ids on both sides; log-probs of the next token belong to positions 1.. of"
        " the input",
        here / max(distance(lag), 1e-12),
    )


def _placeholders(tokens: Tokens) -> tuple[Finding | None, Array]:
    filled = ((tokens.rollout == 0) & (tokens.old < UNLIKELY)) | (
        (tokens.old == 0) & (tokens.rollout < UNLIKELY)
    )
    n = int(filled.sum())
    if n < 3:
        return None, ~filled
    in_runs = float((_run_lengths(filled, tokens.row)[filled] >= 4).mean())
    share = n / len(tokens)
    if in_runs > 0.7:
        return Finding(
            ENVIRONMENT,
            f"{n} tokens ({share:.2%}) have log-prob exactly 0 on one side only, {in_runs:.0%} of"
            " them in runs of four or more: the engine did not sample them",
            LOOK_AT_TURNS,
            share,
        ), ~filled
    return Finding(
        "missing values filled with zeros",
        f"{n} tokens ({share:.2%}) have log-prob exactly 0 on one side and a probability below"
        " one half on the other",
        "count the null log-probs that the engine returns before they are put into tensors",
        share,
    ), ~filled


def _unsampled(tokens: Tokens) -> tuple[Finding | None, Array]:
    """Runs of text that neither policy would have written, scored alike by both."""
    everything = np.ones(len(tokens), dtype=bool)
    if tokens.gap is None or len(tokens) < 8:
        return None, everything
    both = tokens.gap + np.minimum(tokens.d, 0)  # surprisal of the less surprised side
    means = np.convolve(both, np.full(8, 1 / 8), "valid")
    spread = 1.4826 * float(np.median(np.abs(both - np.median(both)))) / math.sqrt(8)
    whole = tokens.row[7:] == tokens.row[:-7]
    starts = np.flatnonzero(whole & (means > max(2.0, 8 * spread)))
    foreign = np.zeros(len(tokens), dtype=bool)
    for offset in range(8):
        foreign[starts + offset] = True
    if int(foreign.sum()) < 24:
        return None, everything
    share = float(foreign.mean())
    return Finding(
        ENVIRONMENT,
        f"{int(foreign.sum())} tokens ({share:.2%}) lie in runs whose surprisal exceeds the"
        f" entropy by {float(both[foreign].mean()):.1f} nats per token on both sides:"
        " nobody sampled them",
        LOOK_AT_TURNS,
        share,
    ), ~foreign


def _diverging(tokens: Tokens) -> tuple[Finding | None, Array]:
    """Sequences that agree up to a token and never again after it."""
    everything = np.ones(len(tokens), dtype=bool)
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
        return None, everything
    first = np.full(tokens.count, np.iinfo(np.int64).max)
    np.minimum.at(first, tokens.row[turning], tokens.position[turning])
    belongs = tokens.position < first[tokens.row]
    return Finding(
        "different tokens from a position on",
        f"{len(rows)} of {tokens.sequences} sequences agree up to a token and then differ by more"
        f" than {limit:.2g} nats on {float(bad[~belongs].mean()):.0%} of those that follow",
        f"{COMPARE_IDS}; do not decode and tokenise again",
        len(rows) / tokens.sequences,
    ), belongs


def _replaced(tokens: Tokens) -> tuple[Finding | None, Array]:
    """Single tokens that the trainer finds impossible."""
    d = tokens.d
    everything = np.ones(len(tokens), dtype=bool)
    impossible = (d < -3) & (d < -10 * tokens.typical())
    n = int(impossible.sum())
    if n < max(5, 1e-3 * len(tokens)) or tokens.typical() > 0.3:
        return None, everything
    near = int(((d < -1) & (d >= -3)).sum())
    size = np.minimum(np.abs(d), 2)
    steps = range(1, 5)
    behind = _beside(size, impossible, tokens.row, [-k for k in steps])
    ahead = _beside(size, impossible, tokens.row, list(steps))
    if n <= near:  # a tail, not single tokens apart from the rest
        return None, everything
    # What follows is conditioned on them.
    first = np.full(tokens.count, np.iinfo(np.int64).max)
    np.minimum.at(first, tokens.row[impossible], tokens.position[impossible])
    return Finding(
        WRONG_TOKENS,
        f"{n} tokens ({n / len(tokens):.2%}) have a ratio below 1/20 amid noise of"
        f" {tokens.typical():.2g} nats; the four tokens after them differ by {ahead:.2g} nats, the"
        f" four before by {behind:.2g}",
        COMPARE_IDS,
        n / len(tokens),
    ), tokens.position < first[tokens.row]


def _wrong_prompt(tokens: Tokens) -> Finding | None:
    size = np.abs(tokens.d)
    early, late = tokens.position < 4, tokens.position >= 16
    if early.sum() < 32 or late.sum() < 32:
        return None
    first, rest = float(np.median(size[early])), float(np.median(size[late]))
    if first < 0.15 or first < 2.5 * rest:
        return None
    return Finding(
        "wrong prompt template",
        f"median |Δ log p| is {first:.2g} nats on the first four tokens of an answer and {rest:.2g}"
        " from the 17th on: the two sides condition on different prompts",
        "compare the prompt's token ids on both sides: system prompt, template, BOS, truncation",
        first / max(rest, 1e-12),
    )


def _temperature(tokens: Tokens) -> Finding | None:
    """Whether log ρ follows log π + H, as log π^(1/τ) − log π = (1/τ − 1)(log π + H) + … does."""
    excess = -tokens.gap if tokens.gap is not None else tokens.old - tokens.old.mean()
    (slope,), explained = tokens.regress(tokens.d, excess)
    if not _doubtless(slope, tokens) or abs(slope.value) < 0.01 or explained < 0.2:
        return None
    if tokens.seen is not None and _share_explained_by_repeats(tokens) > explained:
        return None
    tau = 1 / (1 - slope.value) if slope.value < 0 else 1 - slope.value
    raw = False
    if tokens.gap is not None:
        drift = tokens.mean(tokens.gap)
        expected = slope.value * float(np.square(tokens.gap).mean())
        raw = abs(drift.value) < abs(expected) / 2
    else:
        excess_ratio = tokens.mean(np.expm1(np.clip(tokens.d, -3, 3)))
        raw = _doubtless(excess_ratio, tokens) and excess_ratio.value > 0
    numbers = (
        f"log ρ moves by {slope} per nat of log p, which explains {explained:.0%} of its variance"
        f" and is a temperature of about {tau:.3g}"
    )
    if raw:
        return Finding(
            "temperature: raw log-probs reported, tempered sampler and trainer",
            f"{numbers}; the tokens are distributed as the trainer says",
            "set the engine's logprobs_mode to processed_logprobs (vLLM), or report after scaling",
            slope.value, slope.error,
        )
    side = "engine" if slope.value < 0 else "trainer"
    other = "trainer" if slope.value < 0 else "engine"
    return Finding(
        f"temperature: {side} divides its logits, {other} does not",
        numbers, f"divide the {other}'s logits by the sampling temperature before the softmax",
        slope.value, slope.error,
    )


def _share_explained_by_repeats(tokens: Tokens) -> float:
    assert tokens.seen is not None
    return tokens.regress(tokens.d, tokens.seen.astype(float))[1]


def _truncation(tokens: Tokens) -> Finding | None:
    d = tokens.d
    if float(d.std()) > 0.5:
        return None
    excess = tokens.mean(np.expm1(d))
    if not _doubtless(excess, tokens) or excess.value > -2e-3:
        return None
    atoms = float(((tokens.rollout == 0) & (tokens.old < -1e-4)).mean())
    certain = f"; on {atoms:.1%} of tokens it reports certainty" if atoms > 1e-3 else ""
    return Finding(
        "top-p/top-k truncation",
        f"the mean ratio is 1 {excess}: the engine's probabilities are those of a distribution cut"
        f" to {1 + excess.value:.1%} of the trainer's mass{certain}",
        "set top_p=1, top_k=-1, min_p=0, or renormalise the trainer over the kept set"
        " (iscorrect.Support)",
        excess.value, excess.error,
    )


def _penalty(tokens: Tokens) -> Finding | None:
    if tokens.seen is None or not 0.01 < tokens.seen.mean() < 0.99:
        return None
    (effect,), explained = tokens.regress(tokens.d, tokens.seen.astype(float))
    if not _doubtless(effect, tokens) or effect.value < 0.01 or explained < 0.05:
        return None
    return Finding(
        "repetition penalty",
        f"the trainer finds tokens that came before more likely than the engine by {effect} nats,"
        f" which explains {explained:.0%} of the variance of log ρ",
        "set repetition, presence and frequency penalty off; generation_config='vllm' keeps a"
        " model's own defaults out",
        effect.value, effect.error,
    )


def _stale_prefix(tokens: Tokens) -> Finding | None:
    group = tokens.group
    if group is None:
        return None
    early = tokens.where(tokens.position < 16)  # where the prompt matters most
    rows, level = _row_medians(_relative(early), early.row)
    groups, members = np.unique(group[rows], return_inverse=True)
    if len(groups) < 8 or len(rows) < 2 * len(groups) or not (level > 0).all():
        return None
    log_level = np.log(level)
    n = np.bincount(members)
    center = np.bincount(members, weights=log_level) / n
    within = float(np.square(log_level - center[members]).sum() / (len(rows) - len(groups)))
    between = float((n * np.square(center - log_level.mean())).sum() / (len(groups) - 1))
    ordered = np.sort(center)
    jump = float(np.diff(ordered).max())
    cut = int(np.diff(ordered).argmax()) + 1
    affected = 1 - cut / len(groups)
    if between < 8 * within or jump < math.log(1.3) or not 0.05 < affected < 0.95:
        return None
    if ordered[cut:].mean() - ordered[:cut].mean() < math.log(2):
        return None
    # Routing that flips on a prompt's token marks that prompt's answers too.
    affected_rows = rows[center[members] >= ordered[cut]]
    if _heavy_tail(tokens.where(~np.isin(tokens.row, affected_rows))):
        return None
    return Finding(
        "stale prefix cache",
        f"the mismatch depends on the prompt: {affected:.0%} of the groups differ"
        f" {math.exp(ordered[cut:].mean() - ordered[:cut].mean()):.1f} times as much as the others"
        f" (variance between groups {between / within:.0f} times that within)",
        "switch prefix caching off, or reset the cache after each weight update",
        between / within,
    )


def _never_synchronised(tokens: Tokens) -> Finding | None:
    steps, levels = _by_step(tokens)
    if len(steps) < 4:
        return None
    growth = np.polyfit(steps - steps[0], np.log(levels), 1)[0] * (steps[-1] - steps[0])
    rising = float((np.diff(levels) > 0).mean())
    if growth < math.log(3) or rising < 0.7:
        return None
    return Finding(
        "weights never synchronised",
        f"median |Δ log p| grows from {levels[0]:.2g} at step {steps[0]} to {levels[-1]:.2g} at"
        f" step {steps[-1]}, in {rising:.0%} of the steps between",
        "hash the engine's weights before and after an update; at learning rate 0 the mismatch"
        " must stay flat",
        math.exp(growth),
    )


def _stale_over_time(tokens: Tokens) -> Finding | None:
    age = tokens.age
    if age is not None and age.min() < age.max():
        size = np.minimum(np.abs(tokens.d), 2)
        (slope,), _ = tokens.regress(size, age)
        if _doubtless(slope, tokens) and slope.value * np.ptp(age) > size.mean() / 2:
            return _stale_finding(f"|Δ log p| grows by {slope} nats with each step of age", slope)
    steps, levels = _by_step(tokens)
    if len(steps) >= 3 and levels.max() > 4 * np.median(levels):
        worst = int(levels.argmax())
        return _stale_finding(
            f"median |Δ log p| is {levels[worst]:.2g} at step {steps[worst]} and"
            f" {np.median(levels):.2g} at a usual one", Estimate(float(levels[worst]), 0.0),
        )
    return None


def _stale(tokens: Tokens) -> Finding | None:
    repeats = _repeats_with_token(tokens)
    if repeats is None or not _doubtless(repeats, tokens) or repeats.value < 0.35:
        return None
    if tokens.gap is not None:
        (flatter,), _ = tokens.regress(tokens.d, -tokens.gap)
        if _doubtless(flatter, tokens) and flatter.value > 0.03:
            return None  # coarse weights blur what the engine says; a training step does not
    return _stale_finding(
        f"log ρ repeats with the token across sequences ({repeats} of its variance): the engine"
        f" holds other weights, at a median |Δ log p| of {tokens.typical() / 1.4826:.2g}", repeats
    )


def _stale_finding(evidence: str, estimate: Estimate) -> Finding:
    return Finding(
        STALE_WEIGHTS, evidence,
        "score the same tokens with the trainer's weights at the rollout's version; compare a hash"
        " of the weights on both sides",
        estimate.value, estimate.error,
    )


def _other_weights(tokens: Tokens) -> Finding | None:
    repeats = _repeats_with_token(tokens)
    if repeats is None or not _doubtless(repeats, tokens) or repeats.value < 0.05:
        return None
    return Finding(
        QUANTISED,
        f"log ρ repeats with the token across sequences ({repeats} of its variance) at a typical"
        f" difference of log-odds of {tokens.logit_noise():.2g}: the engine computes with other"
        " weights, less different than a training step would make them",
        "serve the rollout in bfloat16, without FP8 or INT8 weights or KV cache",
        repeats.value, repeats.error,
    )


def _heavy_tail(tokens: Tokens) -> Finding | None:
    d = tokens.d
    limit = max(0.5, 8 * tokens.typical())
    out = np.abs(d) > limit
    n = int(out.sum())
    if n >= max(5, 1e-3 * len(d)) and min((d[out] > 0).mean(), (d[out] < 0).mean()) > 0.1:
        k = float(pareto_tail(torch.from_numpy(d)[None], torch.ones(1, len(d)) > 0).k)
        return Finding(
            f"{HEAVY_TAIL}, as from MoE routing",
            f"{n} tokens ({n / len(d):.2%}) differ by more than {limit:.2g} nats, in both"
            f" directions, amid noise of {tokens.typical():.2g}; Pareto index {k:.2f}",
            "replay the engine's routing in the trainer, or compare both under one expert-parallel"
            " layout",
            n / len(d),
        )
    return None


def _hidden_sampler(tokens: Tokens) -> list[Finding]:
    if tokens.gap is None:
        return []
    gap = tokens.mean(tokens.gap)
    if not _doubtless(gap, tokens) or abs(gap.value) < 0.01:
        return []
    varentropy = float(np.square(tokens.gap).mean())
    tau = 1 / (1 - gap.value / varentropy)
    colder = "sharper" if gap.value < 0 else "flatter"
    return [Finding(
        "raw log-probs reported by a tempered or truncated sampler",
        f"the two sides agree to {tokens.typical():.2g} nats, but surprisal exceeds entropy by"
        f" {gap} nats: the tokens come from a {colder} distribution than either side reports, as"
        f" at a temperature of {tau:.3g}",
        "look at the sampling parameters and the model's generation_config; set logprobs_mode to"
        " processed_logprobs (vLLM)",
        gap.value, gap.error,
    )]


def _stored_in_16_bits(tokens: Tokens) -> list[Finding]:
    findings = []
    for name, x in (("rollout_log_probs", tokens.rollout), ("old_log_probs", tokens.old)):
        values = torch.from_numpy(x[x != 0]).float()
        for dtype in (torch.bfloat16, torch.float16):
            same = values.to(dtype).float() == values
            if len(values) >= 20 and float(same.float().mean()) > 0.99:
                findings.append(Finding(
                    "log-probs stored in 16 bits",
                    f"{float(same.float().mean()):.1%} of {name} are {str(dtype)[6:]} numbers; by"
                    f" chance {2.0 ** (-16 if dtype == torch.bfloat16 else -13):.0e} would be",
                    f"keep {name} in float32 from the log-softmax on",
                    float(same.float().mean()),
                ))
                break
    return findings


def _sixteen_bit_head(everything: Tokens, tokens: Tokens) -> list[Finding]:
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
            f"{HEAD} in the {side}",
            f"{_multiples(difference, 2.0**-spacing):.0%} of {len(difference)} differences between"
            f" two tokens of one position are multiples of 1/{2**spacing} in the {side}; by chance"
            f" {2**spacing * 2 * LATTICE_TOLERANCE:.1%} would be. Its rounding is about"
            f" {min(part, 1):.0%} of the variance of the mismatch",
            "compute the logits in float32 on both sides; on one side alone it hardly helps",
            part,
        )
    return list(findings.values())


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


def _noise(tokens: Tokens, null: LogProbDump | Tokens | None) -> Finding:
    if not tokens.d.any():
        return Finding(
            IDENTICAL, f"all {len(tokens)} pairs of log-probs are equal",
            "make sure that one was not copied from the other", 0.0,
        )
    noise = tokens.logit_noise()
    evidence = f"log-odds typically differ by {noise:.2g}, log-probs by {tokens.typical():.2g}"
    if null is not None:
        floor = as_tokens(null).typical()
        evidence += f", those of the null by {floor:.2g}"
        if tokens.typical() <= 1.5 * floor:
            return Finding(NOISE, evidence, "none needed", noise)
    if noise >= max(SCALES):
        return Finding(
            f"{UNEXPLAINED} rounding, without a pattern",
            f"{evidence}, where bfloat16 kernels make the former 0.01 to 0.2",
            "score the same tokens twice with each side alone; the side that disagrees with itself"
            " is at fault",
            noise,
        )
    return Finding(
        next(cause for limit, cause in SCALES.items() if noise < limit), evidence,
        "score the same tokens twice with the trainer under another batch shape; float32 on both"
        " sides must make it vanish",
        noise,
    )


def _relative(tokens: Tokens) -> Array:
    """|log ρ| relative to what noise on the logits makes of it at this confidence."""
    p = np.minimum(np.exp(tokens.old), 1.0)
    relative: Array = np.abs(tokens.d) / (1.02 - p)
    return relative


def _row_medians(x: Array, row: Array) -> tuple[Array, Array]:
    """The rows there are, and the median of x in each."""
    order = np.lexsort((x, row))
    rows, start, count = np.unique(row[order], return_index=True, return_counts=True)
    return rows, x[order][start + count // 2]


def _repeats_with_token(tokens: Tokens) -> Estimate | None:
    """How much of log ρ returns with the same token in other sequences.

    Rounding depends on everything before a token; other weights move the same token alike.
    Products of noise are averaged over pairs of equal tokens in different sequences.
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
    rows = _distinct(tokens)[tokens.row]
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


def _distinct(tokens: Tokens) -> Array:
    """The same number for sequences with the same log-probs; int "s"."""
    key = np.bincount(tokens.row, weights=tokens.rollout * (1 + tokens.position),
                      minlength=tokens.count)
    distinct: Array = np.unique(key, return_inverse=True)[1]
    return distinct


def _by_step(tokens: Tokens) -> tuple[Array, Array]:
    if tokens.step is None:
        return np.array([]), np.array([])
    step = tokens.step[tokens.row]
    steps = np.unique(step)
    size = np.abs(tokens.d)
    return steps, np.array([max(float(np.median(size[step == s])), 1e-12) for s in steps])


def _cumulative(x: Array, tokens: Tokens) -> tuple[Array, Array, Array]:
    """Sum of x before each token of its sequence, from it on, and the sequence's length."""
    running = np.cumsum(x) - x
    starts = np.flatnonzero(np.r_[True, tokens.row[1:] != tokens.row[:-1]])
    lengths = np.diff(np.r_[starts, len(x)])
    before = running - np.repeat(running[starts], lengths)
    total = np.repeat(np.add.reduceat(x, starts), lengths)
    return before, total - before, np.repeat(tokens.position[starts] + lengths, lengths)


def _run_lengths(x: Array, row: Array) -> Array:
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
