"""How often the monitor raises an alarm on noise, and how soon on a change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.harness import Setting, Workload
from iscorrect import Alarm, Monitor

Series = np.ndarray[Any, np.dtype[np.float64]]
Draw = Callable[[int], Series]

BEFORE = 100
"""Steps before a change."""


def run(setting: Setting) -> Iterator[Workload]:
    runs = 4 if setting.small else 100
    yield false_alarms(runs)
    yield delays(runs)


def noises(rng: np.random.Generator) -> dict[str, Draw]:
    """Logarithms of metrics that only fluctuate, of so many steps."""
    normal: Draw = rng.standard_normal

    def heavy(n: int) -> Series:
        return rng.standard_t(3, n) / math.sqrt(3)

    return {
        "normal, 5 %": lambda n: 0.05 * normal(n),
        "normal, 30 %": lambda n: 0.3 * normal(n),
        "t of 3 degrees, 50 %": lambda n: 0.5 * heavy(n),
        "exponential, 50 %": lambda n: 0.5 * rng.exponential(size=n),
        "correlation 0.5, 30 %": lambda n: 0.3 * remembering(n, 0.5, normal),
        "correlation 0.5, t of 3 degrees, 30 %": lambda n: 0.3 * remembering(n, 0.5, heavy),
        "correlation 0.8, 30 %": lambda n: 0.3 * remembering(n, 0.8, normal),
        "correlation 0.9, 10 %": lambda n: 0.1 * remembering(n, 0.9, normal),
        "correlation 0.9, 30 %": lambda n: 0.3 * remembering(n, 0.9, normal),
    }


def remembering(n: int, correlation: float, draw: Draw) -> Series:
    """Noise of first order with variance 1."""
    x, last = [], 0.0
    for e in draw(n + 100):
        last = correlation * last + math.sqrt(1 - correlation**2) * e
        x.append(last)
    return np.array(x[-n:])


def alarms(logarithms: Series) -> list[Alarm]:
    monitor = Monitor({"y": "rise"})
    return [
        alarm for step, y in enumerate(np.exp(logarithms))
        for alarm in monitor.update(step, {"y": float(y)})
    ]


def false_alarms(runs: int, steps: int = 500) -> Workload:
    workload = Workload(
        "false-alarms",
        f"{runs} runs of {steps} steps without any change, for each kind of noise of the metric's"
        " logarithm; correlation: with the step before.",
    )
    rng = np.random.default_rng(0)
    for name, draw in noises(rng).items():
        count = sum(len(alarms(draw(steps))) for _ in range(runs))
        workload.add(name, steps=runs * steps, alarms=count,
                     **{"per 10,000 steps": 1e4 * count / (runs * steps)})
    return workload


def delays(runs: int) -> Workload:
    workload = Workload(
        "delay",
        f"{runs} runs for each; a jump comes after {BEFORE} steps and lasts for 100, a growth"
        " begins with the run and lasts for 300 steps. Noise: normal, of the metric's logarithm.",
    )
    rng = np.random.default_rng(0)
    changes: dict[str, Series] = {
        f"jump to {size}-fold": np.where(np.arange(200) < BEFORE, 0.0, math.log(size))
        for size in (1.5, 2, 3, 10)
    } | {f"growth by {rate:.0%} a step": math.log1p(rate) * np.arange(300) for rate in (0.01, 0.02)}
    for name, change in changes.items():
        start = BEFORE if name.startswith("jump") else 0
        for noise in (0.1, 0.3):
            seen = []
            for _ in range(runs):
                found = alarms(change + noise * rng.standard_normal(len(change)))
                seen += [alarm.step for alarm in found if alarm.step >= start][:1]
            after = np.array(seen) - start + 1
            workload.add(
                f"{name}, noise of {noise:.0%}", **{
                    "seen": len(seen) / runs, "steps until then, median": float(np.median(after)),
                    "steps, 95 % of the runs": float(np.quantile(after, 0.95)),
                    "factor by then": math.exp(change[int(np.median(seen))]),
                },
            )
    return workload
