"""Draw cases until the time is over; shrink and keep one that fails.

A case is a dictionary that JSON can hold. An area is a module with `CASES`, the strategy that draws
them, and `check(case)`, which raises where the library is wrong.
"""

import hashlib
import json
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed as seeded, settings

FOUND = Path(__file__).parents[1] / "cases"
ROUND = 100
"""Cases drawn from one seed."""


def keep(area, case):
    """Write a failing case where a test will replay it; the path."""
    text = json.dumps(case, indent=1, sort_keys=True)
    FOUND.mkdir(exist_ok=True)
    path = FOUND / f"{area}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def search(area, strategy, check, seed, seconds):
    """How many cases were tried and how many failed; the first that fails ends the search."""
    end = time.monotonic() + seconds
    counts = {"cases": 0, "failures": 0}
    last = None

    def one(case):
        nonlocal last
        if last is None and time.monotonic() > end:
            return
        counts["cases"] += 1
        try:
            check(case)
        except Exception:
            last = case
            raise

    while time.monotonic() < end:
        tries = settings(
            max_examples=ROUND, deadline=None, database=None, report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
            print_blob=False,
        )(seeded(seed)(given(strategy)(one)))
        try:
            tries()
        except Exception:
            traceback.print_exc()
            print(f"{area}: kept as {keep(area, last)}", flush=True)
            counts["failures"] += 1
            break
        seed += 1
    return counts
