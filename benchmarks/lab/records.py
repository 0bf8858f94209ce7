"""What lies on record, and what became of a run."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.lab.rounding import ROUNDINGS

CORRECTIONS = ("uncorrected", "token-tis", "sequence-tis", "sequence-mis")
"""Of the map."""
LAST = 10
"""Steps that the reward at the end, and the best one before it, are means over."""
FALLEN = 0.75
"""A run has collapsed if its last reward is below this share of its best."""
Curves = dict[str, list[float]]
"""The columns of a run's record, one value a step."""


def offline_rows(records: Path) -> list[dict[str, str]]:
    path = records / "offline.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pair(row: dict[str, str]) -> str:
    return f"{row['rollout']} / {row['trainer']}"


def curves(records: Iterable[Path]) -> list[Curves]:
    """The columns of each record."""
    found = []
    for path in records:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        found.append({name: [float(row[name]) for row in rows] for name in rows[0]})
    return found


def runs(folder: Path) -> dict[tuple[str, str], list[Curves]]:
    """The curves of each task and arm, one for a seed."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.glob("*.csv")):
        kind, length, arm = path.stem.rsplit("-", 1)[0].split("-", 2)
        found.setdefault((f"{kind}-{length}", arm), []).append(path)
    return {key: curves(paths) for key, paths in found.items()}


def windows(values: Sequence[float]) -> list[float]:
    """Means of every ``LAST`` steps that follow each other."""
    width = min(LAST, len(values))
    return [statistics.fmean(values[i : i + width]) for i in range(len(values) - width + 1)]


def outcome(run: Curves) -> tuple[float, bool]:
    """The reward at the end, and whether the run has collapsed."""
    rewards = windows(run["reward"])
    return rewards[-1], rewards[-1] < FALLEN * max(rewards)


def reached(run: Curves, reward: float = 0.95) -> float | None:
    """The step after which the mean of ``LAST`` rewards is that high for the first time."""
    for step, mean in enumerate(windows(run["reward"])):
        if mean >= reward:
            return step + LAST
    return None


def axes(map_runs: Iterable[tuple[str, str]]) -> tuple[list[str], list[str], list[str]]:
    """Roundings from fine to coarse, corrections, and tasks from short to long, of (task, arm)."""
    keys = list(map_runs)
    split = [arm.split("-", 1) for _, arm in keys]
    return (
        sorted({rounding for rounding, _ in split}, key=[*ROUNDINGS].index),
        sorted({correction for _, correction in split}, key=CORRECTIONS.index),
        sorted({task for task, _ in keys}, key=lambda task: int(task.split("-")[1])),
    )
