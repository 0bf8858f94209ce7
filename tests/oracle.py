"""Every part of a loss in NumPy float64, one sequence at a time, written to be read.

A batch is a list of sequences; a sequence is what the mask leaves of a row. Nothing here is shared
with the library.
"""

from typing import NamedTuple

import numpy as np

SATURATION = (np.log(np.finfo(np.float64).max) - 40 * np.log(2)) / 2


class Sequence(NamedTuple):
    old: np.ndarray
    rollout: np.ndarray
    advantages: np.ndarray
    log_probs: np.ndarray | None = None
    age: np.ndarray | None = None


def exp(x):
    return np.exp(np.minimum(x, SATURATION))


def log_ratio(s):
    return s.old - s.rollout


def product(s):
    return exp(log_ratio(s).sum()) * np.ones_like(s.old)


def geometric(s):
    return exp(log_ratio(s).mean()) * np.ones_like(s.old) if len(s.old) else s.old


def k2(d):
    return d**2 / 2


def k3(d):
    return np.expm1(d) - d


def kl_bin(p, q):
    p, q = np.exp(p), np.exp(q)
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def held_kl_bin(p, q):
    """The same of probabilities held off 0 and 1."""
    held = np.log(np.clip(np.exp([p, q]), 1e-6, 1 - 1e-6))
    return kl_bin(*held)


def uncorrected(s):
    return np.ones_like(s.old)


def token_is(s):
    return exp(log_ratio(s))


def token_tis(s, cap=2.0):
    return np.minimum(token_is(s), cap)


def token_mis(s, high=3.0):
    return np.where(token_is(s) <= high, token_is(s), 0)


def icepop(s):
    r = token_is(s)
    return np.where((r >= 0.5) & (r <= 5.0), r, 0)


def confidence_is(s):
    p = np.exp(s.old)
    return np.minimum(token_is(s), 1 + 2.3 * np.maximum(1 - p, 5e-3))


def kpop(s):
    p, q = s.old, s.rollout
    return np.where((kl_bin(p, q) <= 0.1) & (kl_bin(q, p) <= 0.1), token_is(s), 0)


def dppo(s):
    p, q = np.exp(s.old), np.exp(s.rollout)
    too_high = (s.advantages > 0) & (p - q > 0.15)
    too_low = (s.advantages < 0) & (p - q < -0.15)
    return np.where(too_high | too_low, 0, np.minimum(token_is(s), 10))


def ipo(s):
    return np.where(abs(np.exp(s.old) - np.exp(s.rollout)) <= 0.3, np.minimum(token_is(s), 1e4), 0)


def flash_reinforce(s):
    if not len(s.old):
        return s.old
    return token_is(s) * (held_kl_bin(s.rollout, s.old).mean() <= 5e-3)


def sequence_is(s):
    return product(s)


def sequence_tis(s):
    return np.minimum(product(s), 2.0)


def sequence_mis(s):
    return np.where(product(s) <= 3.0, product(s), 0)


def geometric_rs(s):
    g = geometric(s)
    return np.where((g >= 0.999) & (g <= 1.001), 1.0, 0.0)


def trust_region_mask(s):
    if not len(s.old):
        return s.old
    d = log_ratio(s)
    inside = k2(d).max() <= 0.05 and k3(d).mean() <= 1e-3
    return np.full_like(d, float(inside))


def off_policy_negative(s):
    if not len(s.old):
        return s.old
    strayed = -log_ratio(s).mean() > 0.5
    return np.where((s.advantages < 0) & strayed, 0.0, 1.0)


def topr(s):
    return np.where(s.advantages > 0, 1.0, np.minimum(product(s), 1.0))


ORACLES = (
    uncorrected, token_is, token_tis, token_mis, icepop, confidence_is, kpop, dppo, ipo,
    flash_reinforce, sequence_is, sequence_tis, sequence_mis, geometric_rs, trust_region_mask,
    off_policy_negative, topr,
)
PRESETS = {f.__name__.replace("_", "-"): f for f in ORACLES}
"""All presets that look at one sequence at a time."""


def second_moment_above(sequences, limit, over):
    """Without the largest (log ρ)² of all that are looked at, until their mean is small."""
    ratios = [log_ratio(s) for s in sequences]
    looked_at = [
        (s.advantages * d > 0) | (over == "all") for s, d in zip(sequences, ratios, strict=True)
    ]
    left = np.concatenate([d[m] ** 2 for d, m in zip(ratios, looked_at, strict=True)])
    while len(left) and left.mean() > limit:
        left = left[left < left.max()]
    largest = left.max(initial=-1.0)
    return [~m | (d**2 <= largest) for d, m in zip(ratios, looked_at, strict=True)]


def m2po(sequences):
    keep = second_moment_above(sequences, limit=0.04, over="pushed")
    return [token_is(s) * kept for s, kept in zip(sequences, keep, strict=True)]


OF_A_BATCH = {"m2po": m2po}
"""Presets that look at all sequences, but pareto-is, whose oracle is a public implementation."""


def at_level(d, level):
    """A log-ratio per token, of its own, of the whole sequence, or of all tokens up to it."""
    if level == "prefix":
        return np.cumsum(d)
    whole = {"token": d, "sequence": d.sum(), "geometric": d.mean() if len(d) else 0 * d.sum()}
    return whole[level] + 0 * d


def ignore(r, s):
    return np.ones_like(r)


def truncate(r, s, cap):
    return np.minimum(r, cap)


def clip(r, s, low, high):
    return np.clip(r, low, high)


def mask(r, s, low, high):
    return np.where((r >= low) & (r <= (np.inf if high is None else high)), r, 0)


def confidence_cap(r, s, slope, floor):
    return np.minimum(r, 1 + slope * np.maximum(1 - np.exp(s.old), floor))


def signed_truncate(r, s, cap):
    return np.where(s.advantages > 0, 1.0, np.minimum(r, cap))


def by_age(r, s, limit, fresh, stale):
    of = [BOUNDS[type(part).__name__](r, s, **vars(part)) for part in (fresh, stale)]
    return np.where(s.age <= limit, *of)


BOUNDS = {
    "Ignore": ignore, "Truncate": truncate, "Clip": clip, "Mask": mask,
    "ConfidenceCap": confidence_cap, "SignedTruncate": signed_truncate, "ByAge": by_age,
}
"""All bounds but ParetoSmooth, whose oracle is a public implementation of PSIS."""


def ratio_outside(s, level, low, high):
    r = exp(at_level(log_ratio(s), level))
    return (r >= low) & (r <= (np.inf if high is None else high))


def divergence_above(s, limit, estimator, over):
    d = log_ratio(s)
    values = {
        "k1": -d, "k2": k2(d), "k3": k3(d), "binary-kl": held_kl_bin(s.rollout, s.old),
        "tv": abs(np.exp(s.old) - np.exp(s.rollout)),
    }[estimator]
    if over == "token":
        return values <= limit
    return {"mean": np.mean, "sum": np.sum, "max": np.max}[over](values) <= limit + 0 * d


def veto(s, low, high):
    r = exp(log_ratio(s))
    return np.full_like(r, r.min() >= low and r.max() <= (np.inf if high is None else high))


def both_binary_kl(s, limit):
    return (kl_bin(s.old, s.rollout) <= limit) & (kl_bin(s.rollout, s.old) <= limit)


def probability_shift(s, limit, divergence):
    p, q = np.exp(s.old), np.exp(s.rollout)
    shift = {"tv": abs(p - q), "kl": kl_bin(s.rollout, s.old)}[divergence]
    return ~(((s.advantages * (p - q)) > 0) & (shift > limit))


def off_policy_negative_rule(s, limit):
    return ~((s.advantages < 0) & (-log_ratio(s).mean() > limit))


def age_above(s, limit):
    return s.age <= limit


RULES = {
    "RatioOutside": ratio_outside, "DivergenceAbove": divergence_above, "Veto": veto,
    "BinaryKL": both_binary_kl, "ProbabilityShift": probability_shift,
    "OffPolicyNegative": off_policy_negative_rule, "AgeAbove": age_above,
}
RULES_OF_A_BATCH = {"SecondMomentAbove": second_moment_above}


def larger(a, b):
    """The maximum by the real part: log π may be complex, for a derivative by a complex step."""
    return np.where(np.real(a) >= np.real(b), a, b)


def clamp(x, low, high):
    x = x if low is None else larger(x, low)
    return x if high is None else -larger(-x, -high)


def reinforce(x, s):
    return -s.advantages * x


def ppo_clip(x, s, low=0.8, high=1.2, level="token", dual=None, cap=None):
    d = at_level(x - s.old, level)
    r = np.exp(d)
    if cap is not None:  # held in value; its gradient stays that of cap · log r
        r = np.where(np.real(r) > cap, cap * np.exp(d - np.real(d)), r)
    loss = larger(-s.advantages * r, -s.advantages * clamp(r, low, high))
    if dual is None:
        return loss
    return np.where(s.advantages < 0, -larger(-loss, dual * s.advantages), loss)


def cispo(x, s, low=None, high=5.0):
    return -clamp(np.exp(np.real(x) - s.old), low, high) * s.advantages * x


def sapo(x, s, tau_positive, tau_negative):
    tau = np.where(s.advantages > 0, tau_positive, tau_negative)
    return -s.advantages * 4 / tau / (1 + np.exp(-tau * (np.exp(x - s.old) - 1)))


def gmpo(x, s, low, high):
    d = x - s.old
    held = np.where(
        s.advantages >= 0, clamp(d, None, np.log(high)), clamp(d, np.log(low), None)
    )
    return -s.advantages * np.exp(at_level(held, "geometric"))


def vespo(x, s, k_positive, lambda_positive, k_negative, lambda_negative):
    w = product(s._replace(old=np.real(x), rollout=s.old))
    kernels = [w**k * np.exp(rate * (1 - w)) for k, rate in (
        (k_positive, lambda_positive), (k_negative, lambda_negative)
    )]
    return -np.where(s.advantages >= 0, *kernels) * s.advantages * x


def aspo(x, s, low, high, cap):
    r = np.exp(x - s.old)
    turned = np.minimum(1 / np.real(r), cap) * np.exp(x - np.real(x))
    positive = np.where(np.real(r) > high, high, turned)
    return -s.advantages * np.where(s.advantages > 0, positive, clamp(r, low, None))


OBJECTIVES = {
    "reinforce": reinforce, "ppo-clip": ppo_clip, "cispo": cispo, "sapo": sapo, "gmpo": gmpo,
    "vespo": vespo, "aspo": aspo,
}
"""Losses of the tokens of a sequence from x, its log π; what is frozen takes the real part."""


def token_mean(rows):
    return np.concatenate(rows).sum() / max(1, sum(map(len, rows)))


def seq_mean_token_sum(rows):
    return sum(row.sum() for row in rows) / max(1, len(rows))


def seq_mean_token_mean(rows):
    return sum(row.mean() for row in rows) / max(1, len(rows))


def seq_mean_token_sum_norm(rows, horizon):
    return seq_mean_token_sum(rows) / horizon


def total(rows):
    return sum(row.sum() for row in rows)


AGGREGATIONS = {
    "token-mean": token_mean, "seq-mean-token-sum": seq_mean_token_sum,
    "seq-mean-token-mean": seq_mean_token_mean,
    "seq-mean-token-sum-norm": seq_mean_token_sum_norm, "sum": total,
}
"""From the losses of each sequence that has a token, to a scalar."""


def reference_kl(x, reference, kind):
    d = reference - x
    return {"k1": -d, "k2": d**2 / 2, "k3": np.expm1(d) - d}[kind]


def ess(weights):
    weights = np.asarray(weights)
    squares = (weights**2).sum()
    return weights.sum() ** 2 / (len(weights) * squares) if squares > 0 else 0.0
