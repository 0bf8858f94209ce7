"""Dumps from one format into another and back: every value is the same."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from iscorrect.dumps import read_dump, stream_dump, write_dump
from tests.fuzz._search import search
from tests.fuzz.samples import SEEDS, SUFFIXES, difference, random_dump


def check(case):
    """Raise unless a dump that is written, converted and read is the same."""
    rng = np.random.default_rng(case["seed"])
    first, second = (SUFFIXES[i] for i in rng.integers(len(SUFFIXES), size=2))
    dump = random_dump(rng)
    with tempfile.TemporaryDirectory() as directory:
        a, b = Path(directory) / f"a{first}", Path(directory) / f"b{second}"
        write_dump(dump, a)
        write_dump(stream_dump(a, tokens=int(rng.integers(1, 60))), b)
        assert not (wrong := difference(dump, read_dump(b))), f"{first} -> {second}: {wrong}"


CASES = SEEDS
run = partial(search, "convert", CASES, check)
