"""Follow the dumps of a running job, and say when its mismatch jumps or drifts."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from iscorrect.cli.arguments import seconds
from iscorrect.cli.terminal import say, tell
from iscorrect.dumps import LogProbDump, dump_files, stream_dump
from iscorrect.errors import input_error
from iscorrect.loop.monitor import Monitor
from iscorrect.loss.metrics import Metrics
from iscorrect.loss.presets import uncorrected
from iscorrect.text import visible

HELP = "follow the dumps of a running job, and say when its mismatch jumps or drifts"

LOOK = 2.0
"""Seconds between two looks at the folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect watch``."""
    parser.add_argument("dumps", metavar="DUMPS", type=Path,
                        help="the folder that the job writes to, or one file")
    parser.add_argument("--idle", type=seconds, default=math.inf, metavar="SECONDS",
                        help="end when no file has come for so long; 0: read what is there"
                             " (default: when interrupted)")


def run(options: argparse.Namespace) -> int:
    """0, or 1 where there was an alarm."""
    if not options.dumps.exists():
        raise input_error(
            "watch", "dumps", expected="a folder or a file that exists",
            got=visible(options.dumps), fix="pass the folder that the job's DumpWriter has",
        )
    run = _Run()
    try:
        for path in _arriving(options.dumps, options.idle):
            run.take(path)
    except KeyboardInterrupt:
        tell("interrupted")
    run.finish()
    if not run.steps:
        dump_files(options.dumps)  # says what is wrong with a folder without dumps
    say(f"steps: {run.steps:,}, alarms: {run.alarms:,}")
    return 1 if run.alarms else 0


def _arriving(folder: Path, idle: float) -> Iterator[Path]:
    """Files one after the other, when they have come and stopped growing."""
    taken: set[Path] = set()
    sizes: dict[Path, tuple[int, int]] = {}
    last = time.monotonic()
    while True:
        found = _files(folder)
        now = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}
        for path in found:
            if path not in taken and (idle == 0 or sizes.get(path) == now[path]):
                taken.add(path)
                last = time.monotonic()
                yield path
        if now != sizes:
            last = time.monotonic()
        sizes = now
        if time.monotonic() - last >= idle:
            return
        time.sleep(min(LOOK, idle))


def _files(folder: Path) -> list[Path]:
    if folder.is_dir() and not any(folder.iterdir()):
        return []  # the job has not written yet
    return dump_files(folder)


class _Run:
    """The steps of a job so far; a step is over when a later one has begun."""

    def __init__(self) -> None:
        self.monitor = Monitor(notify=[lambda alarm: say(str(alarm))])
        self.steps = self.alarms = self.files = 0
        self._open: dict[int, Metrics] = {}
        self._over = -1

    def take(self, path: Path) -> None:
        """Read a file; one without steps is a step."""
        for piece in stream_dump(path):
            for step, metrics in _by_step(piece, self.files):
                if step <= self._over:
                    tell(f"{visible(path)} came after step {self._over} was over: step {step} is"
                         " left out")
                    continue
                self._open[step] = self._open[step] + metrics if step in self._open else metrics
        self.files += 1
        self._close(max(self._open, default=0))

    def finish(self) -> None:
        """Nothing more comes."""
        self._close(max(self._open, default=0) + 1)

    def _close(self, end: int) -> None:
        """Show the monitor the steps before one."""
        for step in sorted(step for step in self._open if step < end):
            self.alarms += len(self.monitor.update(step, self._open.pop(step).to_floats()))
            self.steps += 1
            self._over = step


def _by_step(dump: LogProbDump, number: int) -> Iterator[tuple[int, Metrics]]:
    steps = torch.full((len(dump),), number) if dump.step is None else dump.step
    for step in sorted(set(steps.tolist())):
        rows = steps == step
        yield step, uncorrected()(
            old_log_probs=dump.old_log_probs[rows],
            rollout_log_probs=dump.rollout_log_probs[rows], mask=dump.mask[rows],
        ).metrics
