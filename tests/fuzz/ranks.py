"""A head and its loss cut over ranks anyhow, against the whole on one process."""

import random
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import components
from test_ranks import (
    AGGREGATIONS,
    FACTS,
    HEADS,
    OBJECTIVES,
    ROUTES,
    SHARDS,
    Model,
    compare_head as compare,
    spawn,
)

from tests.fuzz._search import keep

TOGETHER = 16
"""Cases of one start of the processes, which takes seconds."""


def draw(chance):
    """A case but for its grid of ranks."""
    return {
        "seed": chance.randrange(2**32), "rows": chance.randint(4, 7),
        "vocabulary": chance.randint(4, 11), "head": chance.randrange(len(HEADS)),
        "correction": chance.choice(sorted(components.CORRECTIONS)),
        "objective": chance.randrange(len(OBJECTIVES)),
        "aggregation": chance.randrange(len(AGGREGATIONS)), "how": chance.randrange(len(SHARDS)),
        "options": {
            "route": chance.choice(ROUTES), "micro_batches": chance.choice([1, 2]),
            "zigzag": chance.random() < 0.5, "packed": chance.random() < 0.5,
            "old": chance.random() < 0.5, "sequence_parallel": chance.random() < 0.5,
            "chunk_size": chance.randint(2, 40),
        },
    }


def one(case, grid):
    compare(
        grid,
        Model.make(case["seed"], rows=case["rows"], vocabulary=case["vocabulary"],
                   **HEADS[case["head"]]),
        components.CORRECTIONS[case["correction"]], OBJECTIVES[case["objective"]],
        AGGREGATIONS[case["aggregation"]], how=SHARDS[case["how"]], **case["options"],
    )


def together(cases, ranks):
    with tempfile.TemporaryDirectory() as folder:
        spawn(Path(folder), [partial(one, case) for case in cases], *ranks)


def check(case):
    together([case], case["ranks"])


def run(seed, seconds):
    chance, end = random.Random(seed), time.monotonic() + seconds
    counts = {"cases": 0, "grids": 0, "failures": 0}
    while time.monotonic() < end and not counts["failures"]:
        ranks = chance.choice(sorted(FACTS))
        cases = [draw(chance) for _ in range(TOGETHER)]
        counts["cases"] += len(cases)
        counts["grids"] += 1
        try:
            together(cases, ranks)
        except Exception:
            for case in cases:
                try:
                    together([case], ranks)
                except Exception:
                    traceback.print_exc()
                    print(f"ranks: kept as {keep('ranks', case | {'ranks': ranks})}", flush=True)
                    counts["failures"] += 1
                    break
            else:
                raise
    return counts
