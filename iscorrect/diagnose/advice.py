"""What to do: from KL per token times length, the tail, and the number of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from iscorrect.diagnose.causes import (
    HEAD,
    HEAVY_TAIL,
    NOISE,
    QUANTISED,
    SCALES,
    STALE_WEIGHTS,
    UNEXPLAINED,
    Finding,
    diagnose,
)
from iscorrect.dumps import LogProbDump, Tokens
from iscorrect.dumps.tokens import as_tokens
from iscorrect.errors import check_number
from iscorrect.loss.caps import mse_optimal_cap
from iscorrect.loss.pareto import pareto_tail

# What a correction is for: hardware, and weights that differ on purpose. The rest is repaired.
CORRECTABLE = (NOISE, STALE_WEIGHTS, QUANTISED, HEAVY_TAIL, HEAD, UNEXPLAINED)


@dataclass(frozen=True)
class Advice:
    """One recommendation.

    Attributes:
        action: what to do.
        because: the numbers behind it.
        correction: the correction meant, as :func:`iscorrect.parse` reads it; "" for none.
    """

    action: str
    because: str
    correction: str = ""


def advise(
    dump: LogProbDump | Tokens,
    *,
    samples: int,
    length: int,
    findings: list[Finding] | None = None,
) -> list[Advice]:
    """What to do about the mismatch, most important first.

    Sequence weights are taken as log-normal, log W ~ N(−K, 2K) with K = KL per token × length,
    whose effective sample is exp(−2K) and of whose weight a cap C keeps Φ((log C − K)/√(2K)).

    Args:
        dump: what was measured, or its tokens.
        samples: sequences whose gradients are averaged in one update.
        length: tokens that a sequence will have.
        findings: of :func:`diagnose`, where they are at hand.

    Returns:
        At least one piece of advice.

    Raises:
        InputError: no samples or no length.

    >>> rollout = -torch.rand(64, 32) * 4
    >>> same = LogProbDump(
    ...     rollout_log_probs=rollout, old_log_probs=rollout, mask=rollout < 0
    ... )
    >>> advise(same, samples=64, length=1000)[0].action
    'No correction is needed'
    """
    check_number("advise", "samples", samples, "the sequences of one update", least=1)
    check_number("advise", "length", length, "the tokens of a sequence", least=1)
    tokens = as_tokens(dump)
    findings = diagnose(tokens) if findings is None else findings
    d = torch.from_numpy(tokens.d)
    kappa = float(tokens.k3.mean())
    total = kappa * length
    outside = float(tokens.outside.mean())
    tail = float(pareto_tail(d[None], torch.ones(1, len(d)) > 0).k)
    size = f"KL {kappa:.2g} nats per token × {length:,} tokens = {total:.2g} nats per sequence"

    wrong = [f for f in findings if not f.cause.startswith(CORRECTABLE)]
    if wrong:
        return [Advice(
            f"Fix the cause first: {wrong[0].cause}",
            f"{wrong[0].evidence}. A correction would hide it, and pay for it in variance or bias:"
            f" {size}",
        )]
    advice = [_correction(total, samples, size, outside)]
    if total >= 0.1:
        low, high = _geometric_band(kappa, length)
        advice.append(Advice(
            f"To drop strayed sequences, keep geometric means in [{low:.5g}, {high:.5g}]",
            f"{size}: this is exp(−KL ± 3 √(2 KL / length)), beyond which noise alone hardly takes"
            " them; a constant band would mean another thing for every stack",
            f"geometric-rs:low={low:.6g},high={high:.6g}",
        ))
    heavy = math.isfinite(tail) and tail > 0.7
    if advice[0].correction != "token-tis:cap=2" and (outside > 1e-3 or (heavy and outside > 0)):
        settled = "above" if heavy else "below"
        advice.append(Advice(
            "Bound the token ratios",
            f"{outside:.2%} of tokens have a ratio outside [0.5, 2]; the Pareto index of the tail"
            f" is {tail:.2f}, {settled} the 0.7 up to which averages of weights settle",
            "token-tis:cap=2",
        ))
    advice += _precision(tokens, findings, total, length)
    return advice


def _correction(total: float, samples: int, size: str, outside: float) -> Advice:
    ess = math.exp(-2 * total)
    if total < 0.1:
        return Advice(
            "No correction is needed",
            f"{size}; even whole-sequence weights would keep {ess:.0%} of the sample effective",
        )
    if total < 1:
        cap = max(1.0, float(mse_optimal_cap(
            torch.tensor(float(samples)), torch.tensor(math.expm1(2 * total))
        )))
        kept = _kept_weight(cap, total)
        return Advice(
            f"Sequence-level TIS or MIS with cap {cap:.3g}",
            f"{size}: {ess:.0%} of the sample stays effective without a cap, the cap is the"
            f" MSE-optimal one for {samples} sequences, and masking at it keeps {kept:.0%} of the"
            " weight",
            f"sequence-tis:cap={cap:.4g}",
        )
    return Advice(
        "Token-level TIS with cap 2; not sequence-level weights",
        f"{size}: sequence weights would leave {ess * samples:.2g} of {samples} sequences"
        f" effective, and a mask at 3 would keep {_kept_weight(3.0, total):.0%} of the weight;"
        f" token weights are biased but bounded, and cap {outside:.2%} of the tokens at most",
        "token-tis:cap=2",
    )


def _precision(
    tokens: Tokens, findings: list[Finding], total: float, length: int
) -> list[Advice]:
    noise = tokens.logit_noise()
    float16, bfloat16 = sorted(SCALES)[1:]
    advice = []
    if float16 <= noise < bfloat16 and findings[0].cause.startswith((NOISE, HEAD)):
        advice.append(Advice(
            "Or switch both sides to float16",
            f"log-odds differ by {noise:.2g}, as bfloat16's do; eight times finer rounding divides"
            f" the KL by up to 64 (published runs: 14 to 24), from {total:.2g} to about"
            f" {total / 24:.2g}–{total / 14:.2g} nats per sequence of {length:,} tokens. Audit the"
            " checkpoint's range first",
        ))
    heads = [f for f in findings if f.cause.startswith(HEAD)]
    if heads:
        share = min(1.0, sum(head.statistic for head in heads))
        advice.append(Advice(
            "Or compute the logits of both sides in float32",
            f"the rounding of the head is about {share:.0%} of the variance of the mismatch",
        ))
    return advice


def _kept_weight(cap: float, total: float) -> float:
    return 0.5 * (1 + math.erf((math.log(cap) - total) / math.sqrt(2 * total) / math.sqrt(2)))


def _geometric_band(kappa: float, length: int, z: float = 3.0) -> tuple[float, float]:
    half = z * math.sqrt(2 * kappa / length)
    return math.exp(-kappa - half), math.exp(-kappa + half)
