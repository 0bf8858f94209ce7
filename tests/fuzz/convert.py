"""Dumps from one format into another and back: every value is the same."""

import tempfile
import time
from pathlib import Path

import numpy as np

from iscorrect.dumps import read_dump, stream_dump, write_dump
from tests.fuzz.samples import SUFFIXES, Failures, difference, random_dump


def run(seed: int, seconds: float) -> dict[str, int]:
    """Write, convert and read for a while; each pair of formats in turn."""
    rng = np.random.default_rng(seed)
    found = Failures("convert", seed)
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as directory:
        while time.monotonic() < end:
            case = found.counts["cases"]
            found.count("cases")
            first, second = (SUFFIXES[i] for i in divmod(case % 25, 5))
            a, b = Path(directory) / f"a{first}", Path(directory) / f"b{second}"
            dump = random_dump(rng)
            try:
                write_dump(dump, a)
                write_dump(stream_dump(a, tokens=int(rng.integers(1, 60))), b)
                wrong = difference(dump, read_dump(b))
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                found.fail(case, f"{first} -> {second}: {wrong}")
    return found.counts
