"""The mechanism in a real engine: a trajectory whose weights are sent to vLLM in several ways.

The policy learns from its own float32 answers, as in :mod:`benchmarks.lab.real.mechanism`, so the
engine's answers act on nothing; they are sampled at some steps, and scored by the policy. Engine
and policy draw from one generator, so a seed fixes the prompts of a trajectory and not its samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks.lab.real.learner import Learner, Schedule, conditions, mismatch
from benchmarks.lab.real.mechanism import LOOKED_AT, score
from benchmarks.lab.real.packed import sample
from benchmarks.lab.real.records import keep
from benchmarks.lab.real.reinforce import Arm, open_engine
from benchmarks.lab.real.sums import LONGEST

WAYS = {"bf16": ("nearest", "stochastic", "feedback"), "fp16": ("nearest", "stochastic")}
"""How weights are sent to an engine of each format."""


def main(folder: Path, records: Path, engine: str, schedule: Schedule, seed: int) -> None:
    """One trajectory and an engine; a row for each way to send at each step that is looked at."""
    record = records / f"{engine}-{schedule.grid}-{schedule.learning_rate:g}-{seed}.csv"
    keep(
        record, follow(folder, Arm(engine), schedule, seed),
        lambda: conditions(schedule, seed, arm=asdict(Arm(engine))),
    )


def follow(
    folder: Path, arm: Arm, schedule: Schedule, seed: int
) -> Iterator[dict[str, float | str]]:
    """Rows: step, rounding, and what :func:`mismatch` says of the engine's answers."""
    learner = Learner(folder, schedule, seed)
    prompts = learner.task.prompts
    engine = open_engine(folder, arm, schedule, prompts.shape[1] + LONGEST)
    senders = {way: Arm(arm.engine, rounding=way).send(seed) for way in WAYS[arm.engine]}
    try:
        while True:
            which = learner.draw()
            answers = sample(learner.model, prompts[which], schedule.answers, LONGEST,
                             learner.task.end)
            for way, send in senders.items():
                looked_at = learner.steps in (0, *LOOKED_AT)
                if not (looked_at or way == "feedback"):  # which remembers every send
                    continue
                sent = {name: send(name, x) for name, x in learner.weights.items()}
                if looked_at:
                    engine.load(sent)
                    served = engine.generate(prompts[which], schedule.answers, learner.task.end)
                    own = score(learner.model, served)
                    yield {
                        "step": learner.steps, "engine": engine.name, "rounding": way,
                        **mismatch(own, served.log_probs, served.mask),
                        "reward": learner.task.rewards(which, served).mean().item(),
                        "own_reward": learner.task.rewards(which, answers).mean().item(),
                    }
            if learner.steps == max(LOOKED_AT):
                return
            learner.update(which, answers, "uncorrected")
    finally:
        engine.close()
