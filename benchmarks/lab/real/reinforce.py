"""The sanity test on the real model: engine × correction × how and when weights are sent."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.lab import engines
from benchmarks.lab.policy import DTYPES, Precision
from benchmarks.lab.real import senders
from benchmarks.lab.real.learner import Learner, Schedule, conditions
from benchmarks.lab.real.model import open_model
from benchmarks.lab.real.packed import Answers, sample
from benchmarks.lab.real.records import keep
from benchmarks.lab.real.senders import Send, Weights, some
from benchmarks.lab.real.sums import LONGEST
from benchmarks.lab.reinforce import NotSynchronisedError, magnitude
from iscorrect.fp16.arrival import Arrived, arrived

ROUNDINGS = ("nearest", "stochastic", "feedback", "after-step")
""""after-step": stochastically, by the trainer, which computes with what it sends."""
TRAINERS = (*DTYPES, "amp-bf16", "amp-fp16")
"""Formats; "amp": autocast, in which products alone are in 16 bits."""


@dataclass(frozen=True)
class Arm:
    """What a run differs by from the others.

    Attributes:
        engine: "bf16", "fp16" or "fp32", what the engine holds and computes in.
        trainer: what the trainer computes in, one of ``TRAINERS``; its weights are float32.
        fp32_head: whether both compute their logits in float32.
        correction: as :func:`iscorrect.parse` reads it, or "ppo".
        rounding: of the weights that are sent, one of ``ROUNDINGS``.
        kind: "vllm"; or "simulated", which rounds the weights alone and computes in float32.
    """

    engine: str = "bf16"
    correction: str = "uncorrected"
    rounding: str = "nearest"
    kind: str = "vllm"
    trainer: str = "fp32"
    fp32_head: bool = False

    @property
    def name(self) -> str:
        parts = [self.kind, self.engine]
        parts += [] if self.trainer == "fp32" else [f"trained-in-{self.trainer}"]
        parts += ["fp32-head"] if self.fp32_head else []
        parts += [] if self.rounding == "nearest" else [self.rounding]
        return "-".join([*parts, self.correction.replace(":", "-")])

    @property
    def precision(self) -> Precision:
        """Of the trainer."""
        return Precision(
            self.trainer.removeprefix("amp-"), self.fp32_head,
            autocast=self.trainer.startswith("amp-"),
        )

    @property
    def held(self) -> torch.dtype | None:
        """What the trainer rounds its weights to after each step."""
        return DTYPES[self.engine] if self.rounding == "after-step" else None

    def send(self, seed: int) -> Send:
        """How a run of this seed sends."""
        dtype = DTYPES[self.engine]
        if dtype == torch.float32:
            return senders.exact
        if self.rounding == "stochastic":
            return senders.Stochastic(dtype, seed)
        if self.rounding == "feedback":
            return senders.Feedback(dtype)
        return partial(senders.nearest, dtype=dtype)


class Engine(Protocol):
    """What samples."""

    name: str

    def load(self, sent: Weights) -> None: ...

    def generate(self, prompts: Tensor, n: int, end: int) -> Answers: ...

    def close(self) -> None: ...


class Simulated:
    """float32 arithmetic on the weights that were sent."""

    name = "simulated"

    def __init__(self, folder: Path, schedule: Schedule):
        self._model = open_model(folder, schedule.grid)

    def load(self, sent: Weights) -> None:
        self._model.load_state_dict(dict(sent), strict=False)

    def generate(self, prompts: Tensor, n: int, end: int) -> Answers:
        return sample(self._model, prompts, n, LONGEST, end)

    def close(self) -> None:
        del self._model


class Vllm:
    """vLLM in this process, as the lab has it; what prompts share is computed once a send."""

    def __init__(self, folder: Path, schedule: Schedule, precision: Precision, longest: int):
        self._engine = engines.Vllm(
            folder / schedule.grid, precision, longest, enable_prefix_caching=True, block_size=32,
        )
        self.name = self._engine.name

    def load(self, sent: Weights) -> None:
        self._engine.load(sent)
        self._engine.forget()
        expected, held = magnitude(sent.values()), magnitude(self._engine.parameters())
        if not abs(held - expected) <= 1e-6 * expected:
            raise NotSynchronisedError(
                f"{self.name} holds weights whose magnitudes sum to {held}, not {expected}: its "
                "load did not take them all; restart the engine"
            )

    def generate(self, prompts: Tensor, n: int, end: int) -> Answers:
        found = self._engine.generate(prompts.repeat_interleave(n, 0), LONGEST, stop=end)
        longest = int(found.mask.sum(1).max())
        token_ids, log_probs, mask = (
            x[:, :longest].reshape(len(prompts), n, -1) for x in found
        )
        return Answers(prompts, token_ids, mask, log_probs)

    def close(self) -> None:
        self._engine.close()


def open_engine(folder: Path, arm: Arm, schedule: Schedule, longest: int) -> Engine:
    if arm.kind == "vllm":
        return Vllm(folder, schedule, Precision(arm.engine, arm.fp32_head), longest)
    return Simulated(folder, schedule)


def main(folder: Path, records: Path, arm: Arm, schedule: Schedule, seed: int) -> None:
    """One run; its record takes its name only when it is complete."""
    record = records / f"{arm.name}-every{schedule.every}-{schedule.learning_rate:g}-{seed}.csv"
    keep(
        record, train(folder, arm, schedule, seed),
        lambda: conditions(schedule, seed, arm=asdict(arm)),
    )


def train(
    folder: Path, arm: Arm, schedule: Schedule, seed: int
) -> Iterator[dict[str, float | str]]:
    """Steps of a run; beside what :meth:`Learner.update` says of a batch:

        arrival, unchanged   of the update since the last send (a sample of 2²² entries)
        arrival_all          of everything since the first weights
        greedy, sampled      the policy's own share of right answers over all prompts, each
                             ``judged`` steps: greedily, and at temperature 1
        rounded_greedy, rounded_sampled
                             the same of weights rounded to a 16-bit trainer's format
        wall_s, cpu_s        of the step without judging
    """
    learner = Learner(folder, schedule, seed, arm.precision, arm.held)
    longest = learner.task.prompts.shape[1] + LONGEST
    engine = open_engine(folder, arm, schedule, longest)
    how = arm.send(seed)
    start = some(learner.masters)
    sent = {name: how(name, x) for name, x in learner.weights.items()}
    engine.load(sent)
    first = last = start, some(sent)
    row: dict[str, float | str] = dict.fromkeys(("arrival", "unchanged", "arrival_all"), "")
    try:
        for step in range(schedule.steps + 1):
            judged = step % schedule.judged == 0 or step == schedule.steps
            greedy, sampled = learner.right() if judged else ("", "")
            twice = judged and arm.trainer != "fp32"
            of_rounded = learner.right(rounded=True) if twice else ("", "")
            wall, cpu = time.perf_counter(), time.process_time()
            if step and step % schedule.every == 0:
                sent = {name: how(name, x) for name, x in learner.weights.items()}
                engine.load(sent)
                now = some(learner.masters), some(sent)
                row |= {
                    "arrival": between(last, now).share, "unchanged": between(last, now).unchanged,
                    "arrival_all": between(first, now).share,
                }
                last = now
            which = learner.draw()
            answers = engine.generate(
                learner.task.prompts[which], schedule.answers, learner.task.end
            )
            batch = learner.update(which, answers, arm.correction)
            yield {
                "step": step, **batch, **row, "greedy": greedy, "sampled": sampled,
                "rounded_greedy": of_rounded[0], "rounded_sampled": of_rounded[1],
                "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
            }
    finally:
        engine.close()


Sends = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""A sample of the trainer's weights, and of what was sent of them."""


def between(before: Sends, after: Sends) -> Arrived:
    (w, q), (w2, q2) = before, after
    rows = (arrived("", w[x], w2[x], sent_before=q[x], sent_after=q2[x]) for x in w)
    return sum(rows, Arrived(""))


def read(record: Path) -> list[dict[str, str]]:
    """The steps of a run."""
    with record.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
