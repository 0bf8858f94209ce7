"""How a rollout engine comes to sample from another policy than the trainer's, one way each.

A maker takes the trainer's policy and returns the engine's: what it samples from, and what it
reports. Reports are "processed" (the distribution sampled from) or "raw" (the model's own, before
temperature and truncation), as engines let their users choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from iscorrect.errors import check_choice, check_number, input_error
from iscorrect.testing.tabular import TabularPolicy

__all__ = [
    "DTYPES",
    "MAKERS",
    "Mismatch",
    "Reported",
    "fault",
    "min_p",
    "noise",
    "parse_mismatch",
    "repetition_penalty",
    "round_logits",
    "round_reports",
    "stale",
    "temperature",
    "token_sigma",
    "top_k",
    "top_p",
]

Mismatch = Callable[[TabularPolicy], TabularPolicy]
Reported = Literal["processed", "raw"]


def round_logits(policy: TabularPolicy, dtype: torch.dtype = torch.bfloat16) -> TabularPolicy:
    """Logits on the grid of a narrow dtype: an output head in low precision.

    >>> policy = TabularPolicy.random(2, 2)
    >>> round_logits(policy, torch.float8_e4m3fn).logits[0]
    tensor([ 1.5000, -0.2812], dtype=torch.float64)
    """
    return replace(policy, logits=policy.logits.to(dtype).double(), reported=None)


def round_reports(policy: TabularPolicy, dtype: torch.dtype = torch.bfloat16) -> TabularPolicy:
    """Exact sampling, but log-probs stored on the grid of a narrow dtype."""
    return replace(policy, reported=policy.table.to(dtype).double())


def noise(
    policy: TabularPolicy, sigma: float = 0.1, *, freedom: float = math.inf, seed: int = 0
) -> TabularPolicy:
    """Independent noise on every logit, of the least size that makes log-ratios as large as asked.

        √(E_μ[Σ_t (log ρ_t)²] / E_μ[number of tokens]) = σ

    Args:
        policy: the trainer's.
        sigma: σ ≥ 0, nats per token. Not all are within reach: the tokens that μ samples are those
            whose noise is positive.
        freedom: of Student's t; small for heavy tails. inf: normal noise.
        seed: of the draw.

    Raises:
        InputError: a negative sigma, or one out of reach.

    >>> policy = TabularPolicy.random(3, 4)
    >>> round(token_sigma(policy, noise(policy, 0.25)), 6)
    0.25
    """
    check_number("noise", "sigma", sigma, "a standard deviation in nats per token", least=0)
    if freedom == math.inf:
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(policy.logits.shape, generator=generator, dtype=torch.float64)
    else:
        rng = np.random.default_rng(seed)
        draw = torch.from_numpy(rng.standard_t(freedom, tuple(policy.logits.shape)))

    def scaled(scale: float) -> TabularPolicy:
        return replace(policy, logits=policy.logits + scale * draw, reported=None)

    low, high = 0.0, sigma
    while token_sigma(policy, scaled(high)) < sigma:
        low, high = high, 1.25 * high
        if high > 50:
            raise input_error(
                "noise", "sigma", expected="a log-ratio that noise on this policy can reach",
                got=repr(sigma), fix="pass a smaller sigma",
            )
    for _ in range(60):
        middle = (low + high) / 2
        if token_sigma(policy, scaled(middle)) < sigma:
            low = middle
        else:
            high = middle
    return scaled(low)


def token_sigma(policy: TabularPolicy, rollout_policy: TabularPolicy) -> float:
    """Root mean square of log ρ over the tokens that the engine samples, nats.

    >>> policy = TabularPolicy.random(3, 4)
    >>> token_sigma(policy, policy)
    0.0
    """
    chance = rearrange(rollout_policy.probabilities, "n -> n 1")
    d = policy.log_probs - rollout_policy.reported_log_probs
    squares = torch.where(chance > 0, chance * d.square(), 0).sum()
    return float((squares / (chance * policy.sequences.mask).sum()).sqrt())


def temperature(
    policy: TabularPolicy, value: float, *, report: Reported = "processed"
) -> TabularPolicy:
    """Sampling from softmax(logits/τ)."""
    check_number("temperature", "value", value, "the τ that logits are divided by", above=0)
    return _sampled_from(policy, policy.logits / value, report)


def top_p(policy: TabularPolicy, mass: float, *, report: Reported = "processed") -> TabularPolicy:
    """Sampling from the fewest likeliest tokens that hold a probability of at least ``mass``."""
    check_number("top_p", "mass", mass, "a probability", above=0, most=1)
    ordered, order = policy.table.exp().sort(-1, descending=True)
    needed = ordered.cumsum(-1) - ordered < mass
    return _kept(policy, torch.zeros_like(needed).scatter(-1, order, needed), report)


def top_k(policy: TabularPolicy, count: int, *, report: Reported = "processed") -> TabularPolicy:
    """Sampling from the ``count`` likeliest tokens."""
    check_number("top_k", "count", count, "a whole number of tokens", least=1, whole=True)
    order = policy.logits.argsort(-1, descending=True)
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order[:, :count], True)
    return _kept(policy, kept, report)


def min_p(policy: TabularPolicy, share: float, *, report: Reported = "processed") -> TabularPolicy:
    """Sampling from tokens with at least this share of the likeliest token's probability."""
    check_number("min_p", "share", share, "a share of the largest probability", least=0, most=1)
    probabilities = policy.table.exp()
    return _kept(policy, probabilities >= share * probabilities.amax(-1, keepdim=True), report)


def repetition_penalty(
    policy: TabularPolicy, penalty: float, *, report: Reported = "processed"
) -> TabularPolicy:
    """Logits of tokens that occurred before divided by the penalty, or multiplied if negative.

    References:
        CTRL (arXiv 1909.05858), in the form that engines use.
    """
    check_number("repetition_penalty", "penalty", penalty, "a factor on logits", above=0)
    z = policy.logits
    penalised = torch.where(z > 0, z / penalty, z * penalty)
    return _sampled_from(policy, torch.where(policy.sequences.seen, penalised, z), report)


def stale(policy: TabularPolicy, reward: Tensor, step: float = 1.0) -> TabularPolicy:
    """The weights before a gradient step on a reward "n", to first order in its size."""
    logits = policy.logits - step * policy.policy_gradient(reward)
    return replace(policy, logits=logits, reported=None)


def fault(
    policy: TabularPolicy, size: float, *, context: int = 0, token: int = 0
) -> TabularPolicy:
    """One logit of one context wrong by ``size`` nats."""
    logits = policy.logits.clone()
    logits[context, token] += size
    return replace(policy, logits=logits, reported=None)


def _sampled_from(policy: TabularPolicy, logits: Tensor, report: Reported) -> TabularPolicy:
    check_choice("mismatch", "report", report, get_args(Reported))
    return replace(policy, logits=logits, reported=None if report == "processed" else policy.table)


def _kept(policy: TabularPolicy, kept: Tensor, report: Reported) -> TabularPolicy:
    return _sampled_from(policy, torch.where(kept, policy.logits, -torch.inf), report)


def _top_k(policy: TabularPolicy, count: float) -> TabularPolicy:
    number: Any = int(count) if count.is_integer() else count
    return top_k(policy, number)


DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
MAKERS: dict[str, Callable[[TabularPolicy, float], TabularPolicy]] = {
    "noise": noise,
    "heavy-noise": partial(noise, freedom=3.0),
    "temperature": temperature,
    "top-p": top_p,
    "top-k": _top_k,
    "min-p": min_p,
    "repetition-penalty": repetition_penalty,
    "fault": fault,
}
"""Makers with one number, by the names that the command line uses."""


def parse_mismatch(text: str) -> Mismatch:
    """A maker from ``bf16``, ``fp16``, ``fp8``, or ``name=value`` such as ``top-p=0.9``.

    Raises:
        InputError: an unknown name, or a value that is not a finite number.

    >>> policy = TabularPolicy.random(3, 2)
    >>> parse_mismatch("top-k=1")(policy).probabilities.max()
    tensor(1., dtype=torch.float64)
    """
    name, _, value = text.partition("=")
    if name in DTYPES and not value:
        return partial(round_logits, dtype=DTYPES[name])
    try:
        maker, number = MAKERS[name], float(value)
        if not math.isfinite(number):
            raise ValueError(value)
    except (KeyError, ValueError):
        raise input_error(
            "parse_mismatch", "mismatch",
            expected="one of " + ", ".join([*DTYPES, *(f"{name}=NUMBER" for name in MAKERS)]),
            got=repr(text), fix="pass noise=0.1",
        ) from None
    return lambda policy: maker(policy, number)
