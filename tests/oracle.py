"""Every preset in NumPy float64, one sequence at a time, written to be read.

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
    uncorrected, token_is, token_tis, token_mis, icepop, confidence_is, kpop, dppo, sequence_is,
    sequence_tis, sequence_mis, geometric_rs, trust_region_mask, off_policy_negative, topr,
)
PRESETS = {f.__name__.replace("_", "-"): f for f in ORACLES}
"""All presets but pareto-is, whose oracle is a public implementation of PSIS."""


def ess(weights):
    weights = np.asarray(weights)
    squares = (weights**2).sum()
    return weights.sum() ** 2 / (len(weights) * squares) if squares > 0 else 0.0
