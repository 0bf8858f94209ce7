"""Records of the chain: one file an experiment, one line a run, written when it is complete."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import commit, processor
from benchmarks.lab.chain.learner import State


def known(path: Path, key: Sequence[str]) -> set[tuple[str, ...]]:
    """The keys that are on record."""
    return {tuple(row[name] for name in key) for row in rows(path)}


def due(runs: Sequence[Any], path: Path, device: str = "cpu") -> list[Any]:
    """Of runs, named tuples, those that are not on record; says how many are."""
    done = known(path, runs[0]._fields) if runs else set()
    left = [run for run in runs if tuple(map(str, run)) not in done]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are on record", flush=True)
    if left:
        note(path, device)
    return left


def refuse_other_steps(runs: Sequence[Any], path: Path, points: int) -> None:
    """A run is found by its key, which does not say how many steps it had: its curve does.

    Raises:
        SystemExit: a run that is asked for is on record with a curve of other length.
    """
    asked = {tuple(map(str, run)) for run in runs}
    for row in rows(path):
        found = len(curve(row, "j_policy"))
        if found != points and tuple(row[name] for name in runs[0]._fields) in asked:
            raise SystemExit(
                f"{path} has runs that are asked for with other --steps: curves of {found} points, "
                f"not {points}; give --records another folder"
            )


def rows(path: Path) -> list[dict[str, str]]:
    """A line each."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Mapping[str, object]) -> None:
    """One more line; the first makes the file."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def note(path: Path, device: str = "cpu") -> None:
    """Beside the records: on what they are made, from the first run on."""
    said = {"processor": processor(device), "torch": torch.__version__, "commit": commit(),
            "date": time.strftime("%Y-%m-%d")}
    beside = path.with_suffix(".json")
    if path.exists() and beside.exists():
        before = json.loads(beside.read_text(encoding="utf-8"))
        for name, now in said.items():
            first = before[name].split(" to ")[0]
            said[name] = first if now == first else f"{first} to {now}"
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def numbers(states: Sequence[State]) -> dict[str, str]:
    """J(π), J(μ) and KL of states, each in one cell."""
    return {
        name: " ".join(f"{getattr(state, name):.4g}" for state in states)
        for name in State._fields
    }


def curve(row: Mapping[str, str], name: str) -> list[float]:
    """Numbers of a cell."""
    return [float(x) for x in row[name].split()]
