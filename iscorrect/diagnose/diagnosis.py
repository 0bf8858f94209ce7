"""From log-probs to causes: each pattern a test of its own, applied in a fixed order.

The order follows what spoils what. Values that do not belong to their tokens (shifted, filled with
a constant) make every other number meaningless, so they come first and are set aside; fields that
contradict each other come next, and nothing rests on them; then tokens that are not the same on
both sides, what moves all tokens in a pattern, and parts that differ from the rest. Noise is last,
and has tests of its own to pass. A test must be passed twice: beyond doubt, by errors clustered by
sequence, and in size, since a large dump makes trifles significant.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from iscorrect.diagnose.belonging import (
    above_zero,
    constants,
    diverging,
    misaligned,
    replaced,
    unsampled,
)
from iscorrect.diagnose.fields import (
    candidates,
    entropy,
    sixteen_bit_head,
    stored_in_16_bits,
    two_passes,
    varentropy,
)
from iscorrect.diagnose.findings import Cause, Finding
from iscorrect.diagnose.noise import beyond_bound, heavy_tail, noise, unearned
from iscorrect.diagnose.sampling import hidden_sampler, penalty, temperature, truncation
from iscorrect.diagnose.scale import few
from iscorrect.diagnose.units import by_position, prompt_dependent, some_places, some_sequences
from iscorrect.diagnose.weights import fading, growing, other_weights, over_time
from iscorrect.dumps import LogProbDump, Tokens
from iscorrect.dumps.tokens import as_tokens
from iscorrect.errors import input_error

SEPARATE = (constants, above_zero, candidates, entropy, unsampled, diverging, replaced, varentropy)

EXPLAIN = (
    growing, over_time, some_places, temperature, truncation, penalty, prompt_dependent,
    by_position, some_sequences, other_weights, beyond_bound, fading, heavy_tail,
    unearned,
)

FIELDS = {
    "log_probs": "current", "token_ids": "ids", "entropy": "gap",
    "top_k_ids": "candidate", "top_k_log_probs": "best",
}
"""Fields of a dump whose tokens have another name."""


def diagnose(
    dump: LogProbDump | Tokens, *, null: LogProbDump | Tokens | None = None
) -> list[Finding]:
    """What made trainer and engine disagree, most telling pattern first.

    Args:
        dump: or its tokens; optional fields sharpen it: `entropy` shows a sampler that is not what
            either side reports, `token_ids` repetition penalties and differing weights, `group`
            stale prefix caches, `step` and `version` staleness, `top_k_log_probs` a 16-bit
            head, `log_probs` a trainer that disagrees with itself.
        null: the same policy scored twice, one pass as rollout and the other as old, such as the
            trainer under two batch shapes. What is no larger than it is called noise.

    Returns:
        At least one finding; its pattern is "nothing beyond numerical noise" where every test of
        noise is passed and nothing else was seen.

    Raises:
        InputError: no token counts, none has a finite log-prob on both sides, or the null is too
            small.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> rollout = -torch.rand(64, 32) * 4
    >>> noise = 0.02 * torch.randn(64, 32)
    >>> diagnose(LogProbDump(
    ...     rollout_log_probs=rollout, old_log_probs=rollout + noise * (1 - rollout.exp()),
    ...     mask=torch.ones(64, 32, dtype=torch.bool),
    ... ))[0].pattern
    'nothing beyond numerical noise'
    """
    tokens = as_tokens(dump, "diagnose")
    if len(tokens) == 0 and tokens.lost:
        raise input_error(
            "diagnose", "dump", expected="with counted tokens that both sides have a log-prob for",
            got=f"{tokens.lost} counted tokens, none with a finite log-prob on both sides",
            fix="look for the pass that left its log-probs at NaN or −inf",
        )
    if len(tokens) == 0:
        raise input_error(
            "diagnose", "dump", expected="with counted tokens",
            got=f"{tokens.count} sequences without any",
            fix="dump the tokens that enter the loss, with their mask",
        )
    floor = None if null is None else _floor(as_tokens(null, "diagnose", "null"))
    return [_missing_only(finding, tokens) for finding in _findings(tokens, floor)]


def _floor(null: Tokens) -> float:
    """The scale of the log-ratios of a null, nats."""
    too_few = few(null)
    if too_few:
        raise input_error(
            "diagnose", "null", expected="large enough to be measured", got=too_few,
            fix="score more sequences twice",
        )
    return null.typical()


def _findings(tokens: Tokens, floor: float | None) -> list[Finding]:
    shifted = misaligned(tokens)
    if shifted:
        return [shifted]
    everything = tokens
    findings = []
    for separate in SEPARATE:
        finding, tokens = separate(tokens)
        if finding:
            findings.append(finding)
        if len(tokens) == 0:
            return findings
    if not tokens.d.any():
        findings.append(noise(tokens, None))
        if tokens.current is not None:  # a bypass; the trainer's is current
            unlike = np.isfinite(tokens.current) & (tokens.current != tokens.old)
            if unlike.mean() > 0.5:
                return findings + _findings(_bypassed(tokens), floor)
    # what fades may be no larger than the null, which is noise whatever its pattern
    small = floor is not None and tokens.typical() <= 1.5 * floor
    tests = (explain for explain in EXPLAIN if not (small and explain is fading))
    explained = next(filter(None, (explain(tokens) for explain in tests)), None)
    findings += [explained] if explained else hidden_sampler(tokens)
    findings += two_passes(tokens) + stored_in_16_bits(tokens)
    heads = sixteen_bit_head(everything, tokens)
    if findings:
        return findings + heads
    # A rounded head is part of what is called noise; it comes first where it is much of it.
    much = [head for head in heads if head.statistic > 0.05]
    return much + [noise(tokens, floor)] + [head for head in heads if head not in much]


def _bypassed(tokens: Tokens) -> Tokens:
    """The tokens with the policy being trained in the place of the copy of the engine's."""
    assert tokens.current is not None
    known = tokens.where(np.isfinite(tokens.current))
    assert known.current is not None
    gap = None if known.gap is None else known.gap + known.old - known.current
    return replace(known, old=known.current, current=None, gap=gap)


def _missing_only(finding: Finding, tokens: Tokens) -> Finding:
    """The finding, with the fields that its causes need and the dump does not have."""
    def missing(cause: Cause) -> Cause:
        fields = (f for f in cause.needs if getattr(tokens, FIELDS.get(f, f), None) is None)
        return replace(cause, needs=tuple(fields))

    return replace(finding, causes=tuple(missing(cause) for cause in finding.causes))
