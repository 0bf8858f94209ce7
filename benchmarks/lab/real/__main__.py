"""``python -m benchmarks.lab.real``: the runs of PLAN.md, one command an arm."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

# before torch is imported: its thread pools are sized on loading
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.lab.real import mechanism, model
from benchmarks.lab.real.learner import Schedule

LAB = Path(__file__).parents[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab.real", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--models", type=Path, default=LAB / "models" / "smollm2")
    common.add_argument("--records", type=Path, default=LAB / "records" / "real")
    common.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    common.add_argument("--learning-rate", type=float, default=2e-5)
    common.add_argument("--grid", choices=list(model.GRIDS), default="bf16-grid")

    made = commands.add_parser("model", help="make the checkpoints from the package")
    made.add_argument("--models", type=Path, default=LAB / "models" / "smollm2")
    commands.add_parser(
        "mechanism", parents=[common], help="what arrives of an update, and the KL it makes")

    given = parser.parse_args(arguments)
    if given.command == "model":
        model.make(given.models)
        return
    schedule = replace(Schedule(), learning_rate=given.learning_rate, grid=given.grid)
    for seed in given.seeds:
        name = f"{given.grid}-{given.learning_rate:g}-{seed}.csv"
        record = given.records / "mechanism" / name
        if not record.exists():
            mechanism.main(given.models, record, schedule, seed)


if __name__ == "__main__":
    main()
