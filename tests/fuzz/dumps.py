"""Damaged dumps: read as what they are, or refused with a message; never a traceback."""

import json
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch

from iscorrect import InputError
from iscorrect.dumps import read_dump, write_dump
from tests.fuzz._search import search
from tests.fuzz.samples import SEEDS, SUFFIXES, random_dump

ODD = [
    None, True, False, "", "x", "1.5", [], {}, [[]], [None], -1, 0, 2, 1e400, -1e400, 0.5, 2**63,
    2**64, -(2**63) - 1, 10**400, 1e-400, float("nan"), [1, [2]], {"a": 1}, [[1], [1, 2]],
    ["a"], [True, None], -0.0, 1e39, -1e39, -1e30, [1e39], [[[1]]],
]


def damaged(rng, whole):
    """Bytes with one kind of damage."""
    raw = bytearray(whole)
    at = int(rng.integers(len(raw)))
    kind = rng.integers(6)
    if kind == 0:
        del raw[at:]
    elif kind == 1:
        for i in rng.integers(len(raw), size=rng.integers(1, 5)):
            raw[i] ^= 1 << rng.integers(8)
    elif kind == 2:
        raw[at:at] = rng.bytes(rng.integers(1, 20))
    elif kind == 3:
        del raw[at : at + int(rng.integers(1, 20))]
    elif kind == 4:
        raw[at : at + 8] = rng.bytes(8)
    else:
        raw[at : at + 16] = bytes(16)
    return bytes(raw)


def odd_row(rng):
    """A JSON line with something in it that is no value of its field."""
    row = {
        "rollout_log_probs": [-1.0, -2.0], "old_log_probs": [-1.0, -2.0], "mask": [1, 1],
        "token_ids": [1, 2], "advantages": [0.5, 1], "entropy": [1, 1], "step": 1, "group": 2,
        "top_k_log_probs": [[-1, -2], [-1, -2]], "version": [1, "a"], "engine": "host", "turn": 0,
        "pack": [0, 0], "policy_version": [1, 2],
    }
    names = list(row)
    if rng.random() < 0.4:
        other = [
            {"inference_logprobs": "rollout_log_probs", "trainer_logprobs": "old_log_probs",
             "loss_mask": "mask"},
            {"generation_logprobs": "rollout_log_probs", "prev_logprobs": "old_log_probs",
             "token_loss_mask": "mask", "sample_loss_mask": "group"},
            {"rollout_log_probs": "rollout_log_probs", "log_probs": "old_log_probs",
             "tokens": "token_ids", "loss_mask": "mask", "group_index": "group"},
        ][rng.integers(3)]
        row = {name: row[source] for name, source in other.items()}
        names = list(row)
    for _ in range(rng.integers(1, 3)):
        name, value = names[rng.integers(len(names))], ODD[rng.integers(len(ODD))]
        if isinstance(row.get(name), list) and rng.random() < 0.6:
            row[name] = [value, *row[name][1:]]
        elif rng.random() < 0.2:
            row.pop(name, None)
        else:
            row[name] = value
    return row


def check(case):
    """Raise unless a damaged dump is refused with a message, or read as log-probs."""
    rng = np.random.default_rng(case["seed"])
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of damaged headers
        path = Path(directory) / f"dump{SUFFIXES[rng.integers(len(SUFFIXES))]}"
        kind = rng.random()
        if kind < 0.2:
            path = path.with_suffix(".jsonl")
            path.write_text(json.dumps(odd_row(rng)), encoding="utf-8")
        elif kind < 0.3:
            path = path.with_suffix(".pt")
            rows = [odd_row(rng) for _ in range(rng.integers(1, 3))]
            columns = {name: [row.get(name) for row in rows] for name in rows[0]}
            content = [{"samples": rows}, {"rollout_data": columns}, rows[0], columns]
            try:
                torch.save(content[rng.integers(4)], path)
            except OverflowError:  # pickle has no way to write them
                return
        else:
            write_dump(random_dump(rng), path)
            path.write_bytes(damaged(rng, path.read_bytes()))
        try:
            dump = read_dump(path)
        except InputError as error:
            assert "Fix:" in str(error)
            return
        for name in ("rollout_log_probs", "old_log_probs"):
            x = getattr(dump, name)[dump.mask]
            x = x[x.isfinite()]
            assert bool(((x <= 0.25) & (x >= -1e4)).all()), f"{name} {x}"


CASES = SEEDS
run = partial(search, "dumps", CASES, check)
