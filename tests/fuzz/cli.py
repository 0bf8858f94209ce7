"""Commands in odd surroundings: the exit code is 0, 1 or 2, and 2 has a message."""

import contextlib
import errno
import io
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from iscorrect import PRESETS
from iscorrect.cli.main import main
from iscorrect.dumps import write_dump
from tests.fuzz._search import search
from tests.fuzz.dumps import damaged
from tests.fuzz.samples import SEEDS, SUFFIXES, random_dump

NUMBERS = ["2", "0", "-1", "nan", "inf", "-inf", "1e400", "abc", "", "none", "0.5", "1e-300", "٣"]
KEYS = ["cap", "low", "high", "limit", "slope", "mean_k3", "max_k2", "x", ""]
CONDITIONS = [
    "mismatch/kl_k3>0", "mismatch/kl_k3<-1", "batch/tokens>=1", "x>1", ">", "a>b",
    "tail/outside>nan", "mismatch/kl_k1 > 1e999", "mismatch/pearson<2", "", "mismatch/kl_k3>>1",
    "\x1b[31m>1", "finding", "finding:weights", "finding:", "mismatch/growth/low>1",
    "batch/nonfinite>0", "token-tis:cap=2/is/ess<0.5", "token-tis:cap=0/is/ess<0.5",
    "x:y/is/ess<0.5", "icepop/is/x<1", "mismatch/kl_k3/change/low>0",
]
NAMES = [
    "plain", "with space", "[bold]", "<b>", "a\nb", "\x1b[31mred", "ü€", "a'b\"c", "$HOME", "-dash",
    "a|b", "x" * 200, "\udcff",
]


class Broken(io.RawIOBase):
    """A stream that fails after some bytes, as a closed pipe or a full disk does."""

    def __init__(self, number, after):
        self.number, self.left = number, after

    def writable(self):
        return True

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return len(data)


def stream(rng):
    """Standard output: another encoding, closed, broken, full, or none."""
    kind = rng.integers(6)
    if kind == 0:
        return None, False
    raw = io.BytesIO()
    broken = False
    if kind in (1, 2):
        number = errno.EPIPE if kind == 1 else errno.ENOSPC
        raw, broken = io.BufferedWriter(Broken(number, int(rng.integers(0, 3000)))), kind == 2
    encoding = rng.choice(["utf-8", "ascii", "cp1252", "latin-1", "utf-16"])
    return io.TextIOWrapper(raw, encoding=encoding), broken


def correction(rng):
    name = list(PRESETS)[rng.integers(len(PRESETS))]
    if rng.random() < 0.4:
        return name
    arguments = [
        f"{KEYS[rng.integers(len(KEYS))]}={NUMBERS[rng.integers(len(NUMBERS))]}"
        for _ in range(rng.integers(1, 3))
    ]
    return f"{name}:{','.join(arguments)}" if rng.random() < 0.95 else ":".join(arguments)


def source(rng, directory):
    """A path of a dump, good or not."""
    name = NAMES[rng.integers(len(NAMES))]
    suffix = SUFFIXES[rng.integers(len(SUFFIXES))]
    path = directory / f"{name}{suffix}"
    kind = rng.integers(24)
    if path.exists() and not path.is_file():
        path.unlink()
    if kind == 0:
        return str(directory / "nowhere.npz")
    if kind == 1:
        return str(directory)
    if kind == 2:
        path.write_bytes(rng.bytes(100))
    elif kind == 3:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    elif kind == 4:
        path.write_bytes(b"")
    elif kind == 5:
        return "-"
    else:
        write_dump(random_dump(rng, counted=rng.random() < 0.9), path)
    return str(path)


def checkpoint(rng, directory):
    """A check of a directory with shards and an index, of which one may be damaged or missing."""
    place = directory / "checkpoint"
    place.mkdir(exist_ok=True)
    for file in place.iterdir():
        file.unlink()
    kind = str(rng.choice(["safetensors", "bin"]))
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for i in (1, 2):
        name = f"{stem}-0000{i}-of-00002.{kind}"
        weights = {f"w{i}": torch.randn(4, 3), f"b{i}": torch.ones(2).bfloat16()}
        (save_file if kind == "safetensors" else torch.save)(weights, place / name)
        weight_map |= dict.fromkeys(weights, name)
    if rng.random() < 0.7:
        (place / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files = sorted(place.iterdir())
    chosen = files[rng.integers(len(files))]
    if rng.random() < 0.2:
        chosen.unlink()
    elif rng.random() < 0.8:
        chosen.write_bytes(damaged(rng, chosen.read_bytes()))
    return ["fp16-check", str(place)]


def command(rng, directory):
    """Arguments of some command."""
    kind = rng.integers(10)
    paths = [source(rng, directory) for _ in range(rng.integers(1, 3))]
    if kind < 4:
        words = ["report", *paths]
        # figures take long, so most go without a directory
        words += ["--json"] if rng.random() < 0.9 else ["--out", str(directory / "out")]
        if rng.random() < 0.2:
            taken = directory / "taken"
            taken.touch()
            words += ["--out", str(rng.choice([taken, taken / "below", "/proc/nowhere"]))]
        if rng.random() < 0.3:
            words += ["--fail-if", CONDITIONS[rng.integers(len(CONDITIONS))]]
        if rng.random() < 0.3:
            words += ["--correction", correction(rng)]
        for name in ("--null", "--against"):
            if rng.random() < 0.1:
                words += [name, source(rng, directory)]
        for name in ("--samples", "--length"):
            if rng.random() < 0.1:
                words += [name, NUMBERS[rng.integers(len(NUMBERS))]]
        return words
    if kind < 7:
        words = ["compare", *paths]
        for _ in range(rng.integers(1, 3)):
            words += ["--correction", correction(rng)]
        return [*words, "--json"] if rng.random() < 0.5 else words
    if kind < 8:
        end = rng.choice([*SUFFIXES, ".csv", ""])
        where = rng.choice(["", "no/", "taken/"])
        return ["convert", paths[0], str(directory / f"{where}target{end}")]
    if kind < 9:
        if rng.random() < 0.6:
            return checkpoint(rng, directory)
        path = directory / f"{NAMES[rng.integers(len(NAMES))]}.pt"
        name, scale = str(rng.choice(["[/0]", *NAMES[:-1]])), float(rng.choice([1, 1e6, 1e-12]))
        state = {name: torch.randn(3) * scale}
        state |= [{}, {1: torch.ones(1)}, {"x": {"y": torch.ones(1)}}, {"x": "text"}][
            rng.integers(4)
        ]
        if path.exists() and not path.is_file():
            path.unlink()
        with path.open("wb") as file:
            torch.save(state, file)
        return ["fp16-check", str(path), *(["--json"] if rng.random() < 0.5 else [])]
    words = ["audit", correction(rng), "--vocab", "2", "--length", "2", "--average", "8"]
    if rng.random() < 0.3:
        words += [str(rng.choice(["--seed", "--vocab", "--length", "--average"])),
                  NUMBERS[rng.integers(len(NUMBERS))]]
    if rng.random() < 0.2:
        words += ["--plot", str(directory / rng.choice(["a.png", "a.xyz", "no/a.png"]))]
    if rng.random() < 0.2:
        words += ["--mismatch", str(rng.choice(["noise=abc", "noise=-1", "fp8", "x", "top-p=2"]))]
    return words


def once(rng, words):
    """Exit code, what standard error got, and whether standard output fails."""
    out, broken = stream(rng)
    err = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    text = rng.choice(["", "{}", '{"mask": [1], "rollout_log_probs": [-1], "old_log_probs": [-2]}'])
    stdin = None if rng.random() < 0.2 else io.StringIO(str(text))
    with (
        mock.patch.object(sys, "stdout", out), mock.patch.object(sys, "stderr", err),
        mock.patch.object(sys, "stdin", stdin),
    ):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
        with contextlib.suppress(Exception):
            err.flush()
    if out is not None:
        with contextlib.suppress(OSError):
            out.close()
    return code, err.buffer.getvalue().decode("ascii"), broken


def check(case):
    """Raise unless a command ends with a code that means what the help says."""
    rng = np.random.default_rng(case["seed"])
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        try:
            words = command(rng, Path(directory))
            code, message, broken = once(rng, words)
        finally:
            os.chdir(here)
    may_fail = "--fail-if" in words or words[0] == "fp16-check"
    assert code in ((0, 1, 2) if may_fail else (0, 2)), f"{words}: code {code}, {message}"
    assert code != 2 or message or broken, f"{words}: no message"
    assert "\x1b" not in message, f"{words}: printed {message!r}"


CASES = SEEDS
run = partial(search, "cli", CASES, check)
