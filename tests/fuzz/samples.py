"""Random dumps of every shape that a trainer may write, and worse ones."""

import numpy as np
import torch
from hypothesis import strategies as st

from iscorrect.dumps import LogProbDump

SEEDS = st.fixed_dictionaries({"seed": st.integers(0, 2**64 - 1)})
"""A case of these areas is what numpy's generator makes of a number."""

SUFFIXES = (".npz", ".safetensors", ".pt", ".jsonl", ".parquet")
FLOATS = ("log_probs", "advantages", "entropy", "varentropy")
NUMBERS = ("step", "policy_version", "group")
UNITS = ("version", "turn", "engine", "pack")
TEXTS = ("", "default", "7", "prompt-3", "høst", "a\nb", "\x1b[31m", "x" * 50, "<b>", "a|b", "\0")


def random_dump(rng, *, counted=False, extreme=True):
    """A small dump; with ``counted``, at least one token counts."""
    b, t, k = rng.integers(1, 7), rng.integers(0 if not counted else 1, 12), rng.integers(1, 5)
    mask = rng.random((b, t)) < rng.choice([0.1, 0.5, 0.9, 1.0])
    if rng.random() < 0.4:
        mask[rng.integers(b)] = False
    if rng.random() < 0.3:
        mask &= np.arange(t) >= rng.integers(0, 3)
    if counted and not mask.any():
        mask[0, 0] = True
    scale = rng.choice([1e-6, 1e-3, 0.1, 3.0, 1000.0] if extreme else [1e-3, 0.1])
    rollout = -rng.exponential(rng.choice([0.0, 0.1, 2.0]), (b, t))
    old = np.minimum(rollout + rng.normal(0, scale, (b, t)), 0)
    old = np.maximum(old, -9999)
    fields = {"rollout_log_probs": rollout, "old_log_probs": old}
    for name in FLOATS:
        if rng.random() < 0.5:
            fields[name] = -rng.exponential(1.0, (b, t))
    if "advantages" in fields and rng.random() < 0.5:
        fields["advantages"] = rng.normal(size=(b, t)) * rng.choice([0, 1, 1e30])
    for name in ("rollout_log_probs", "old_log_probs", *FLOATS):
        if name in fields and rng.random() < 0.2:  # outside the mask, anything
            odd = rng.choice([np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0])
            fields[name] = np.where(mask, fields[name], odd)
    tensors = {name: torch.tensor(x, dtype=torch.float32) for name, x in fields.items()}
    if rng.random() < 0.5:
        tensors["token_ids"] = torch.from_numpy(rng.integers(0, 2**rng.choice([3, 40, 62]), (b, t)))
    for name in NUMBERS:
        if rng.random() < 0.5:
            low, high = [(0, 2), (-5, 5), (-(2**62), 2**62)][rng.integers(3)]
            tensors[name] = torch.from_numpy(rng.integers(low, high, b))
    for name in UNITS:
        if rng.random() < 0.5:
            low, high = [(0, 2), (-5, 5), (-(2**62), 2**62)][rng.integers(3)]
            tensors[name] = torch.from_numpy(rng.integers(low, high, (b, t)))
    names = {}
    for name in ("policy_version", "group", "version", "engine"):
        if rng.random() < 0.3:
            names[name] = tuple(rng.permutation(TEXTS)[: rng.integers(1, 5)].tolist())
            sides = (b, t) if name in UNITS else (b,)
            tensors[name] = torch.from_numpy(rng.integers(0, len(names[name]), sides))
    if rng.random() < 0.2:
        for name in ("rollout_log_probs", "old_log_probs", "log_probs"):
            bad = torch.from_numpy(rng.random((b, t)) < 0.2)
            if name in tensors and not (counted and bad[torch.from_numpy(mask)].all()):
                tensors[name][bad] = float(rng.choice([np.nan, np.inf, -np.inf]))
    if rng.random() < 0.4:
        top = -np.sort(rng.exponential(1.0, (b, t, k)))
        top[rng.random((b, t, k)) < 0.2] = rng.choice([-np.inf, np.inf, np.nan])
        tensors["top_k_log_probs"] = torch.tensor(top, dtype=torch.float32)
        tensors["top_k_ids"] = torch.from_numpy(rng.integers(0, 99, (b, t, k)))
    return LogProbDump(mask=torch.from_numpy(mask), **tensors, names=names)


def difference(a, b):
    """The first thing in which two dumps differ up to their last counted tokens; or None."""
    if a.given().keys() != b.given().keys():
        return f"fields {sorted(a.given())} and {sorted(b.given())}"
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} sequences"
    for i in range(len(a)):
        counted = a.mask[i].nonzero()
        length = int(counted[-1]) + 1 if len(counted) else 0
        if b.mask[i, length:].any():
            return f"the mask of sequence {i}"
        for name, x in a.given().items():
            y = getattr(b, name)
            if name in a.names:
                p, q = (
                    [d.names[name][j] for j in v[i, :length].tolist()] if name in UNITS
                    else d.names[name][v[i]]
                    for d, v in ((a, x), (b, y))
                )
                same = p == q
            elif name in NUMBERS:
                same = bool(x[i] == y[i])
            elif not length:
                continue
            else:
                p, q = x[i, :length], y[i, :length]
                same = p.dtype == q.dtype and p.shape == q.shape and bool(
                    ((p == q) | (p.isnan() & q.isnan())).all()
                )
                if same and p.is_floating_point():
                    same = bool((p.signbit() == q.signbit())[~p.isnan()].all())
            if not same:
                return f"{name} of sequence {i}"
    return None
