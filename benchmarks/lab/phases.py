"""The map: how large a mismatch, over how long an answer, and what becomes of the run.

The engine serves rounded weights, as quantised rollouts do; the trainer keeps its own.
"""

from __future__ import annotations

from benchmarks.lab.policy import Precision
from benchmarks.lab.records import CORRECTIONS
from benchmarks.lab.reinforce import Arm
from benchmarks.lab.rounding import ROUNDINGS
from benchmarks.lab.sanity import HIGH, LOW
from iscorrect import PRESETS, PolicyLoss, PPOClip


def arms(longest: int) -> list[Arm]:
    """Every rounding with every correction."""
    return [
        Arm(
            f"{rounding}-{name}", Precision("bf16"),
            PolicyLoss(
                correction=PRESETS[name](), objective=PPOClip(low=LOW, high=HIGH),
                aggregation="seq-mean-token-sum-norm", horizon=longest,
            ),
            rounding,
        )
        for rounding in ROUNDINGS
        for name in CORRECTIONS
    ]
