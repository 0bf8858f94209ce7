"""Follow the dumps of a running job, and say when its mismatch jumps or drifts."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from iscorrect.cli.arguments import seconds
from iscorrect.cli.terminal import say, tell
from iscorrect.dumps import LogProbDump, dump_files, stream_dump
from iscorrect.errors import InputError, input_error
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
    """1 where there was an alarm, else 2 where a file could not be read, else 0."""
    if not options.dumps.exists():
        raise input_error(
            "watch", "dumps", expected="a folder or a file that exists",
            got=visible(options.dumps), fix="pass the folder that the job's DumpWriter has",
        )
    run = _Run()
    try:
        for paths in _arriving(options.dumps, options.idle):
            run.come(paths)
    except KeyboardInterrupt:
        tell("interrupted")
    run.finish()
    if not run.steps:
        dump_files(options.dumps)  # says what is wrong with a folder without dumps
    unread = f", files that could not be read: {len(run.unread):,}" if run.unread else ""
    say(f"steps: {run.steps:,}, alarms: {run.alarms:,}{unread}")
    return 1 if run.alarms else 2 if run.unread else 0


def _arriving(folder: Path, idle: float) -> Iterator[list[Path]]:
    """The files of each look that have come or changed, and stopped growing."""
    taken: dict[Path, tuple[int, int]] = {}
    sizes: dict[Path, tuple[int, int]] = {}
    last = time.monotonic()
    while True:
        now = _files(folder)
        come = {
            path: size for path, size in now.items()
            if taken.get(path) != size and (idle == 0 or sizes.get(path) == size)
        }
        taken |= come
        yield [*come]
        if come or now != sizes:
            last = time.monotonic()
        sizes = now
        if time.monotonic() - last >= idle:
            return
        time.sleep(min(LOOK, idle))


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """The dumps that are there, with their sizes in bytes and the times they were written."""
    found = {}
    try:
        for path in dump_files(folder):
            with suppress(FileNotFoundError):  # it went away meanwhile
                status = path.stat()
                found[path] = status.st_size, status.st_mtime_ns
    except InputError:
        if folder.is_file():
            raise  # no later look makes a dump of it
    return found


class _Run:
    """The steps of a job so far; a step is over when a later one has begun."""

    def __init__(self) -> None:
        self.monitor = Monitor(notify=[lambda alarm: say(str(alarm))])
        self.steps = self.alarms = self.files = 0
        self.unread: set[Path] = set()
        self._read: set[Path] = set()
        self._grown: set[Path] = set()
        self._told: set[str] = set()
        self._open: dict[int, Metrics] = {}
        self._over = -math.inf

    def come(self, paths: Iterable[Path]) -> None:
        """Read files, unless they were read before; folders of ranks hold the same steps."""
        for path in paths:
            if path not in self._read:
                self.take(path)
            elif path not in self._grown:
                self._grown.add(path)
                tell(f"{visible(path)} changed after it was read: what came since is left out")
        self._close(max(self._open, default=0))

    def take(self, path: Path) -> None:
        """Read a file, all of it or nothing; one without steps is a step."""
        found: dict[int, Metrics] = {}
        try:
            for piece in stream_dump(path):
                for step, metrics in _by_step(piece, self.files):
                    found[step] = found[step] + metrics if step in found else metrics
        except (InputError, OSError) as error:
            tell(" ".join(str(error).splitlines()))
            self.unread.add(path)
            return
        self.unread.discard(path)
        self._read.add(path)
        for step, metrics in found.items():
            if step <= self._over:
                tell(f"{visible(path)} came after step {self._over} was over: step {step} is"
                     " left out")
                continue
            self._open[step] = self._open[step] + metrics if step in self._open else metrics
        self.files += 1

    def finish(self) -> None:
        """Nothing more comes."""
        self._close(max(self._open, default=0) + 1)

    def _close(self, end: int) -> None:
        """Show the monitor the steps before one."""
        for step in sorted(step for step in self._open if step < end):
            metrics = self._open.pop(step)
            self.alarms += len(self.monitor.update(step, self._measured(step, metrics)))
            self.steps += 1
            self._over = step

    def _measured(self, step: int, metrics: Metrics) -> dict[str, float]:
        """The metrics of a step without those that it has no values for."""
        floats = metrics.to_floats()
        for name, counted, lacking in (
            ("mismatch/", "finite", "no counted token with both log-probs"),
            ("mismatch/ess/sequence", "whole_sequences", "no sequence with all its log-probs"),
        ):
            if not metrics.sums[counted]:
                floats = {key: y for key, y in floats.items() if not key.startswith(name)}
                if lacking not in self._told:
                    tell(f"step {step} has {lacking}: {name} is not measured there, nor in later"
                         " steps like it")
                self._told.add(lacking)
                break
        if floats.get("mismatch/log_prob_diff/max") == 0 and "same" not in self._told:
            self._told.add("same")
            tell(f"step {step} has the same log-probs on both sides: unless they agree to the bit,"
                 " one is a copy of the other, and nothing is measured")
        return floats


def _by_step(dump: LogProbDump, number: int) -> Iterator[tuple[int, Metrics]]:
    steps = torch.full((len(dump),), number) if dump.step is None else dump.step
    for step in sorted(set(steps.tolist())):
        rows = steps == step
        yield step, uncorrected()(
            old_log_probs=dump.old_log_probs[rows],
            rollout_log_probs=dump.rollout_log_probs[rows], mask=dump.mask[rows],
        ).metrics
