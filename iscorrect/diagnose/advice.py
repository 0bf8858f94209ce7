"""What to do: from the kind of the mismatch, its size, and the sample that weights would leave."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from iscorrect.diagnose.diagnosis import diagnose
from iscorrect.diagnose.fields import HEAD
from iscorrect.diagnose.findings import Finding
from iscorrect.diagnose.noise import HEAVY_TAIL, IDENTICAL, NOISE, SCALES, UNEXPLAINED
from iscorrect.diagnose.scale import few
from iscorrect.diagnose.shared import shared_error
from iscorrect.diagnose.weights import OTHER_WEIGHTS, PLATEAU
from iscorrect.dumps import LogProbDump, Tokens
from iscorrect.dumps.tokens import as_tokens
from iscorrect.errors import check_number
from iscorrect.loss.caps import mse_optimal_cap
from iscorrect.loss.pareto import pareto_tail

STARVED = math.exp(-1)
"""ESS of sequences at half a nat: below it weights of whole sequences leave little of a sample."""

BATCH = 0.2
"""Nats of a whole batch below which engine and trainer can hardly be told apart by its samples."""


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

    The kind of the mismatch comes before its size: rounding has a new sign at every token and
    needs nothing, weights that differ push every update the same way. Sizes are the effective
    sample (∑ w)² / (n ∑ w²) that weights of tokens and of sequences leave; of sequences of another
    length than the dump's it is exp(−V), V the variance of a sequence's log-ratio × length / its
    length.

    Args:
        dump: what was measured, or its tokens.
        samples: sequences whose gradients are averaged in one update.
        length: tokens that a sequence will have.
        findings: of :func:`diagnose`, where they are at hand.

    Returns:
        At least one piece of advice.

    Raises:
        InputError: no samples or no length.

    References:
        The thresholds and where each was measured: docs/diagnosis.md.

    >>> rollout = -torch.rand(64, 32) * 4
    >>> same = LogProbDump(
    ...     rollout_log_probs=rollout, old_log_probs=rollout, mask=rollout < 0
    ... )
    >>> advise(same, samples=64, length=1000)[0].action
    'Nothing can be said: the mismatch was not measured'
    """
    check_number("advise", "samples", samples, "the sequences of one update", least=1)
    check_number("advise", "length", length, "the tokens of a sequence", least=1)
    tokens = as_tokens(dump, "advise")
    findings = diagnose(tokens) if findings is None else findings
    size = Size.of(tokens, length)

    unmeasured = [f for f in findings if f.pattern == IDENTICAL]
    if unmeasured:
        return [Advice(
            "Nothing can be said: the mismatch was not measured",
            f"{unmeasured[0].evidence}; {unmeasured[0].causes[0].control}",
        )]
    too_few = few(tokens)
    wrong = [f for f in findings if not f.correctable]
    if wrong and not (too_few and wrong[0].pattern == UNEXPLAINED):
        first = wrong[0].causes[0]
        others = " or ".join(cause.name for cause in wrong[0].causes[1:3])
        return [Advice(
            f"Fix the cause first: {first.name}",
            f"{wrong[0].pattern}: {wrong[0].evidence}. {_sentence(first.control)}"
            + (f" If that is clean: {others}." if others else "")
            + f" A correction would hide it, and pay for it in variance or bias: {size}",
        )]
    if too_few:
        return [Advice(
            "The dump is too small to say anything",
            f"{too_few}; a dump of 8,192 tokens is enough for most causes",
        )]
    advice = [_by_kind(tokens, findings[0], size, samples)]
    if findings[0].pattern not in (NOISE, HEAD) and size.sequence >= STARVED:
        excess = torch.tensor(math.expm1(size.variance))
        cap = max(1.0, float(mse_optimal_cap(torch.tensor(float(samples)), excess)))
        advice.append(Advice(
            f"Or sequence-level TIS with cap {cap:.3g}",
            f"{size}; it is unbiased up to its cap, which is the MSE-optimal one for {samples}"
            " sequences",
            f"sequence-tis:cap={cap:.4g}",
        ))
    if findings[0].pattern in (NOISE, HEAD) and size.nats >= 0.1:
        low, high = _geometric_band(size.kappa, length)
        advice.append(Advice(
            f"To drop strayed sequences, keep geometric means in [{low:.5g}, {high:.5g}]",
            f"{size}: this is exp(−KL ± 3 √(2 KL / length)), beyond which noise alone hardly takes"
            " them; a constant band would mean another thing for every stack",
            f"geometric-rs:low={low:.6g},high={high:.6g}",
        ))
    advice += _tail(tokens, advice[0])
    advice += _precision(tokens, findings, size)
    return advice


@dataclass(frozen=True)
class Size:
    """How large the mismatch is, by what weights leave of the sample.

    Attributes:
        kappa: k3, nats per token.
        length: tokens of a sequence.
        token: ESS of token weights.
        variance: of the log-ratio of a sequence of that length.
    """

    kappa: float
    length: int
    token: float
    variance: float

    @classmethod
    def of(cls, tokens: Tokens, length: int) -> Size:
        """Measured on a dump, for sequences of some length."""
        d = np.minimum(tokens.d, 30)
        ratio = np.exp(d - d.max())  # up to a factor, so that not all of them vanish
        rows, member = np.unique(tokens.row, return_inverse=True)
        lengths = np.bincount(member)
        total = np.bincount(member, weights=tokens.d)
        rate = total.sum() / len(tokens)
        # sums of tokens: their variance grows with the length, so each is taken per token
        per_token = float((np.square(total - rate * lengths) / lengths).sum()) / max(
            len(rows) - 1, 1
        )
        return cls(
            kappa=float(tokens.k3.mean()), length=length,
            token=float(ratio.mean() ** 2 / np.square(ratio).mean()),
            variance=per_token * length,
        )

    @property
    def nats(self) -> float:
        """KL of a sequence."""
        return self.kappa * self.length

    @property
    def sequence(self) -> float:
        """ESS of sequence weights, taken as log-normal."""
        return math.exp(-min(self.variance, 700.0))

    def __str__(self) -> str:
        return (
            f"KL {self.kappa:.2g} nats per token, {self.nats:.2g} per sequence of"
            f" {self.length:,}; token weights keep {self.token:.1%} of the sample, sequence weights"
            f" {self.sequence:.0%}"
        )


def _by_kind(tokens: Tokens, finding: Finding, size: Size, samples: int) -> Advice:
    batch = samples * size.nats
    told = f"{size}; {batch:.2g} nats in a batch of {samples:,}{_common(tokens)}"
    if finding.pattern in (NOISE, HEAD):
        if batch < BATCH:
            return Advice(
                "No correction is needed",
                f"{told}. By so few its samples hardly tell engine and trainer apart",
            )
        if size.sequence >= STARVED:
            return Advice(
                "No correction is needed for a stable run",
                f"{told}. Rounding has a new sign at nearly every token; where expectations are"
                " exact that of 16-bit formats ends no run, and with Adam it costs steps, the more"
                " the longer the answers are, which token-level TIS with cap 2 saves at no cost",
            )
        return Advice(
            "Token-level TIS with cap 2",
            f"{told}. Where expectations are exact, noise of more than half a nat per answer slows"
            " learning with Adam, and token weights take that away; weights of whole sequences"
            " would starve",
            "token-tis:cap=2",
        )
    if finding.pattern == OTHER_WEIGHTS:
        return Advice(
            "Token-level TIS with cap 2",
            f"{told}. Other weights push every update the same way, which shows above some"
            " batch size: in a small exact world some 300 answers for 3-bit weights, 1,400 for"
            " 4 bits, half a million for 8 bits",
            "token-tis:cap=2",
        )
    if finding.pattern == PLATEAU:
        return Advice(
            "Round stochastically where weights are sent, if the trainer computes in float32",
            f"{told}. Of such a trainer the engine lags by what its number format swallows:"
            " iscorrect.stochastic_round lets updates arrive, float16 loses less of them, and a"
            " correction leaves the engine where it is. Where a trainer in 16 bits rounds its own"
            " weights, iscorrect.round_after_step gives it and the engine the same",
        )
    if finding.pattern == HEAVY_TAIL:
        return Advice(
            "Token-level TIS with cap 2: bound the token ratios",
            f"{told}. {finding.evidence}; replaying the routing removes what a bound leaves",
            "token-tis:cap=2",
        )
    return Advice(
        "Token-level TIS with cap 2, or IcePop, and less lag or a lower learning rate",
        f"{told}. In a small world 8 updates behind every uncorrected run fell; with these none at"
        " the lower of two learning rates, and many at the higher one",
        "token-tis:cap=2",
    )


def _common(tokens: Tokens) -> str:
    """What the errors share, in words."""
    told = [
        f"{kind} {found.share:.2%} (by chance up to {found.null:.2%})"
        for kind, found in shared_error(tokens).items()
    ]
    return f"; common shares of the variance of the errors: {', '.join(told)}" if told else ""


def _tail(tokens: Tokens, first: Advice) -> list[Advice]:
    d = torch.from_numpy(tokens.d)
    outside = float(tokens.outside.mean())
    tail = float(pareto_tail(d[None], torch.ones(1, len(d)) > 0).k)
    heavy = math.isfinite(tail) and tail > 0.7
    if first.correction or not (outside > 1e-3 or (heavy and outside > 0)):
        return []
    settled = "above" if heavy else "below"
    return [Advice(
        "Bound the token ratios",
        f"{outside:.2%} of tokens have a ratio outside [0.5, 2]; the Pareto index of the tail is"
        f" {tail:.2f}, {settled} the 0.7 up to which averages of weights settle",
        "token-tis:cap=2",
    )]


def _precision(tokens: Tokens, findings: list[Finding], size: Size) -> list[Advice]:
    scale = tokens.logit_noise()
    low, high = SCALES["bfloat16"]
    advice = []
    if low <= scale < high and findings[0].pattern in (NOISE, HEAD):
        advice.append(Advice(
            "Or switch both sides to float16",
            f"log-odds differ by {scale:.2g}, as bfloat16's do; eight times finer rounding divides"
            f" the KL by about 64, from {size.nats:.2g} to {size.nats / 64:.2g} nats per sequence"
            f" of {size.length:,} tokens, where rounding is all there is. Audit the checkpoint's"
            " range first",
        ))
    heads = [f for f in findings if f.pattern == HEAD]
    if heads:
        share = min(1.0, sum(head.statistic for head in heads))
        advice.append(Advice(
            "Or compute the logits of both sides in float32",
            f"the rounding of the head is about {share:.0%} of the variance of the mismatch",
        ))
    return advice


def _sentence(control: str) -> str:
    return f"{control[0].upper()}{control[1:]}."


def _geometric_band(kappa: float, length: int) -> tuple[float, float]:
    half = 3 * math.sqrt(2 * kappa / length)
    return math.exp(-kappa - half), math.exp(-kappa + half)
