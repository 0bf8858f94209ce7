"""How far two policies are apart at a sampled token.

With ``log_ratio = log π − log μ`` and tokens drawn from μ, the expectation of k1 and of k3 is
KL(μ‖π) exactly; that of k2 agrees to third order. Source: Schulman, "Approximating KL divergence"
(2020). Others compare the two probabilities of the token, of which a log-ratio knows the quotient
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from iscorrect.errors import check_floating, input_error
from iscorrect.layout import wide
from iscorrect.loss.ratios import saturated


def k1(log_ratio: Tensor) -> Tensor:
    """Unbiased, any sign.

        k1 = −log ρ

    Args:
        log_ratio: "...", nats, log π − log μ.

    Returns:
        "...", nats.

    >>> k1(torch.tensor([-1.0, 0.5]))
    tensor([ 1.0000, -0.5000])
    """
    check_floating("k1", log_ratio=log_ratio)
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Biased at third order, never negative.

        k2 = (log ρ)² / 2

    Args:
        log_ratio: "...", nats.

    Returns:
        "...", nats, ≥ 0.

    >>> k2(torch.tensor([-1.0, 0.5]))
    tensor([0.5000, 0.1250])
    """
    check_floating("k2", log_ratio=log_ratio)
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """Unbiased, never negative.

        k3 = ρ − 1 − log ρ

    Args:
        log_ratio: "...", nats; held at the log-ratio at which ratios saturate, 30.5 in float32.

    Returns:
        "...", nats, ≥ 0 and finite, in float32 or wider. Accurate where it matters:
        `exp(d) − 1 − d` in float32 loses every digit at |d| ≈ 1e-4 and turns negative;
        `expm1(d) − d` keeps three.

    >>> k3(torch.tensor([-1.0, 0.5]))
    tensor([0.3679, 0.1487])
    """
    check_floating("k3", log_ratio=log_ratio)
    log_ratio = saturated(wide(log_ratio))
    return k3_given(log_ratio, expm1(log_ratio))


def k3_given(log_ratio: Tensor, excess: Tensor) -> Tensor:
    """The same where ρ − 1 is there already."""
    if not torch.compiler.is_compiling():
        return excess - log_ratio
    near = log_ratio.clamp(-0.5, 0.5)
    series = near.square() * _exponential_series(near, 2)
    return torch.where(log_ratio.abs() < 0.5, series, excess - log_ratio)


def expm1(x: Tensor) -> Tensor:
    """exp(x) − 1 with all its digits near 0, in eager mode and in a compiled graph.

    A compiler may lower `torch.expm1` to exp(x) − 1, as inductor does on a CPU; so a graph gets

        x Σ_{k ≥ 0} x^k / (k + 1)!   for |x| < 1/2.

    >>> expm1(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 1.7183])
    """
    if not torch.compiler.is_compiling():
        return torch.expm1(x)
    near = x.clamp(-0.5, 0.5)
    return torch.where(x.abs() < 0.5, near * _exponential_series(near, 1), x.exp() - 1)


def _exponential_series(x: Tensor, first: int) -> Tensor:
    """Σ_{k ≥ 0} x^k / (k + first)! for |x| ≤ 1/2, to the digits of the dtype."""
    terms = 16 if x.dtype == torch.float64 else 9
    total = torch.full_like(x, 1 / math.factorial(terms + first))
    for k in reversed(range(terms)):
        total = total * x + 1 / math.factorial(k + first)
    return total


def binary_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL between the two-outcome distributions {token, any other token} of p and q.

        KL_bin(p‖q) = p log(p/q) + (1−p) log((1−p)/(1−q))

    A lower bound on the full KL(p‖q), by data processing; never a certificate for it.

    Args:
        log_p: "...", log-prob of the token under p, nats, ≤ 0.
        log_q: "...", the same under q.

    Returns:
        "...", nats, ≥ 0; inf where q excludes an outcome that p allows.

    >>> binary_kl(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())
    tensor([0.1438])
    """
    check_floating("binary_kl", log_p=log_p, log_q=log_q)
    p, rest_p, rest_q = log_p.exp(), -expm1(log_p), -expm1(log_q)
    token = torch.where(p > 0, p * (log_p - log_q), 0)
    others = torch.where(rest_p > 0, rest_p * (rest_p.log() - rest_q.log()), 0)
    return (token + others).clamp(min=0)


def probability_gap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Distance of two probabilities, to the last digit also where they hardly differ.

        |p − q| = max(p, q) (1 − e^{−|log p − log q|})

    It is the total variation of {token, any other}, and a lower bound on that of the policies.

    Args:
        log_p: "...", log-prob of the token under p, nats, ≤ 0.
        log_q: "...", the same under q.

    Returns:
        "...", in [0, 1].

    >>> probability_gap(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())
    tensor([0.2500])
    """
    check_floating("probability_gap", log_p=log_p, log_q=log_q)
    return torch.maximum(log_p, log_q).exp() * -expm1(-(log_p - log_q).abs())


def sampled_binary_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """:func:`binary_kl` of probabilities held in [10⁻⁶, 1 − 10⁻⁶].

    A log-prob that was rounded to 0 excludes no other token, so the divergence stays finite.

    >>> sampled_binary_kl(torch.tensor([-1e-6]), torch.tensor([0.0]))
    tensor([0.])
    """
    low, high = math.log(1e-6), math.log1p(-1e-6)
    return binary_kl(log_p.clamp(low, high), log_q.clamp(low, high))


Estimator = Callable[[Tensor], Tensor]
Pair = Callable[[Tensor, Tensor], Tensor]
PAIRS: dict[str, Pair] = {"binary-kl": sampled_binary_kl, "tv": probability_gap}
"""Divergences of the log-prob under μ and that under π_old."""
ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}


def estimator(caller: str, name: str | Estimator, others: Iterable[str] = ()) -> Estimator:
    """The estimator called ``name``; a callable on the log-ratio is its own.

    Args:
        caller: what the message begins with.
        name: as above.
        others: what else the caller knows by name.

    >>> estimator("DivergenceAbove", "k2") is k2
    True
    """
    if callable(name):
        return name
    if not isinstance(name, str) or name not in ESTIMATORS:
        raise input_error(
            caller, "estimator", expected=", ".join(map(repr, [*ESTIMATORS, *others]))
            + " or a callable on the log-ratio", got=repr(name), fix="pass estimator='k3'",
        )
    return ESTIMATORS[name]
