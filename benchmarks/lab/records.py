"""What lies on record, and what became of a run."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from math import isnan
from pathlib import Path
from typing import NamedTuple

from benchmarks.lab.rounding import ROUNDINGS

CORRECTIONS = ("uncorrected", "token-tis", "sequence-tis", "sequence-mis")
"""Of the map."""
LAST = 10
"""Steps that the reward at the end, and the lowest one, are means over."""
FELL, ZERO = 0.3, 0.1
"""A run fell if its lowest reward is below the one, and is at zero if its end is below the other:
absolute floors, for the best of a run is a maximum over its noise."""
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


class Outcome(NamedTuple):
    """What became of a run.

    Attributes:
        end: the reward at the end.
        lowest: the lowest mean of ``LAST`` rewards that follow each other.
    """

    end: float
    lowest: float

    @property
    def fell(self) -> bool:
        return self.lowest < FELL

    @property
    def zero(self) -> bool:
        return self.end < ZERO


def outcome(run: Curves) -> Outcome:
    """The end and the lowest point of the engine's reward."""
    rewards = windows(run["reward"])
    return Outcome(rewards[-1], min(rewards))


def own_rewards(run: Curves) -> list[tuple[int, float]]:
    """π's reward on fixed prompts, by the step after which it was looked at."""
    return [(i, value) for i, value in enumerate(run["policy_reward"]) if not isnan(value)]


def own_reward(run: Curves) -> float | None:
    """π's reward on fixed prompts when it was last looked at; None in records without it."""
    return own_rewards(run)[-1][1] if "policy_reward" in run else None


def batch_kl(run: Curves, answers: int) -> float:
    """n κ T: the median KL of a whole batch of so many answers, nats."""
    each = [kl * length for kl, length in zip(run["kl"], run["length"], strict=True)]
    return answers * statistics.median(each)


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
