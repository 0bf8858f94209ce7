"""Many runs of reinforcement learning, each with a record; what is on record is not run again."""

from __future__ import annotations

import csv
import json
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.harness import commit, processor
from benchmarks.lab.engines import Engine, open_engine
from benchmarks.lab.models import within_reach
from benchmarks.lab.policy import DEVICE, Precision
from benchmarks.lab.reinforce import Arm, Schedule, train
from benchmarks.lab.tasks import parse

LONGEST = 256
"""Tokens of prompt and answer that an engine has room for."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: what is done.
        task: a name as :func:`benchmarks.lab.tasks.parse` reads it.
        model: where the policy to start from lies.
        schedule: what all runs of a table share.
        seed: of prompts and samples.
        engine: a kind of engine.
        folder: of the records.
    """

    arm: Arm
    task: str
    model: Path
    schedule: Schedule
    seed: int
    engine: str
    folder: Path

    @property
    def record(self) -> Path:
        return self.folder / f"{self.task}-{self.arm.name}-{self.seed}.csv"

    @property
    def note(self) -> Path:
        """Under which conditions the runs of a folder on a task were made."""
        return self.folder / f"{self.task}.json"

    @property
    def unfinished(self) -> Path:
        return self.record.with_suffix(".part")


_held: dict[tuple[Path, Precision, str], Engine] = {}
"""The one engine that this process has open."""


def engine_of(model: Path, precision: Precision, kind: str) -> Engine:
    """The engine, opened once for runs that follow each other and need the same one."""
    key = model, precision, kind
    if key not in _held:
        # an engine that goes after its successor has come takes the successor's groups with it
        for other in [*_held]:
            _held.pop(other).close()
        _held[key] = open_engine(model, precision, LONGEST, kind)
    return _held[key]


def pool_of(model: Path, task_name: str, kind: str, *, size: int) -> torch.Tensor:
    """Prompts within the model's reach, found once and kept beside the model."""
    file = model / f"within-reach-{size}.json"
    if not file.exists():
        task = parse(task_name)
        engine = engine_of(model, Precision("bf16"), kind)
        found = within_reach(engine, task, seed=0, pool=size).tolist()
        if not found:
            raise SystemExit(
                f"{model} solves no prompt of {task_name} in 20 to 80 % of its answers: train it "
                "until it solves about half"
            )
        file.write_text(json.dumps(found), encoding="utf-8")
    return torch.tensor(json.loads(file.read_text(encoding="utf-8")))


def carry_out(runs: Sequence[Run], *, jobs: int, pool: int) -> None:
    """Do the runs that have no record yet, some at a time, and show how far they are.

    Raises:
        SystemExit: runs of the same names are on record on another schedule.
    """
    refuse_another_schedule(runs)
    due = [run for run in runs if not run.record.exists()]
    print(f"{len(runs) - len(due)} of {len(runs)} runs are on record")
    if not due:
        return
    for folder in {run.folder for run in due}:
        folder.mkdir(parents=True, exist_ok=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as workers,
        Progress(*columns) as progress,
    ):
        waiting = {workers.submit(do, run, pool): run for run in due}
        bar = progress.add_task("", total=sum(run.schedule.steps for run in due))
        done = 0
        while waiting:
            try:
                finished = next(as_completed(waiting, timeout=2))
            except TimeoutError:
                finished = None
            if finished is not None:
                run = waiting.pop(finished)
                finished.result()
                done += run.schedule.steps
            under_way = {run.record.stem: steps_of(run.unfinished) for run in waiting.values()}
            now = [f"{name} {steps}" for name, steps in under_way.items() if steps]
            progress.update(
                bar, completed=done + sum(under_way.values()),
                description=f"{len(due) - len(waiting)}/{len(due)} runs; {', '.join(now[:jobs])}",
            )


def refuse_another_schedule(runs: Sequence[Run]) -> None:
    for run in runs:
        if not (run.record.exists() and run.note.exists()):
            continue
        held = json.loads(run.note.read_text(encoding="utf-8"))["schedule"]
        if held != asdict(run.schedule):
            raise SystemExit(
                f"{run.record} was run on the schedule {held}, not {asdict(run.schedule)}: give "
                "--records another folder"
            )


def steps_of(unfinished: Path) -> int:
    if not unfinished.exists():
        return 0
    return max(0, len(unfinished.read_text(encoding="utf-8").splitlines()) - 1)


def do(run: Run, pool: int) -> None:
    """One run; its record takes its name only when it is complete."""
    torch.set_num_threads(1)
    prompts = pool_of(run.model, run.task, run.engine, size=pool)
    engine = engine_of(run.model, run.arm.precision, run.engine)
    steps = train(
        run.arm, parse(run.task), prompts, engine, run.model, run.schedule, run.seed
    )
    with run.unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for step in steps:
            if writer is None:
                writer = csv.DictWriter(file, list(step), lineterminator="\n")
                writer.writeheader()
            writer.writerow({name: f"{value:.4g}" for name, value in step.items()})
            file.flush()
    _note(run, engine, len(prompts))
    run.unfinished.replace(run.record)


def _note(run: Run, engine: Engine, prompts: int) -> None:
    """The conditions of the last run."""
    made = json.loads((run.model / "made.json").read_text(encoding="utf-8"))
    note = {
        "engine": engine.name, "schedule": asdict(run.schedule), "model": made,
        "prompts within reach": prompts, "processor": processor(DEVICE.type), "threads": 1,
        "python": platform.python_version(), "torch": torch.__version__, "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    run.note.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
