"""Reinforcement learning with an engine that samples and a trainer that learns."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import nan
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lab.engines import Engine, Transformers
from benchmarks.lab.models import ask, right
from benchmarks.lab.policy import Precision, State, log_probs, open_policy
from benchmarks.lab.rounding import ROUNDINGS
from benchmarks.lab.tasks import Task
from benchmarks.lab.trainer import Trainer
from iscorrect import PolicyLoss, effective_sample_size, group_advantages, k3

FIXED, EVERY = 64, 5
"""Prompts on which π itself is tried, and how often."""
NOISE = {"fp32": 2e-3, "fp16": 2e-2, "bf16": 1e-1}
"""Mean |Δ log p| in nats between two implementations of the same weights that is still rounding."""


@dataclass(frozen=True)
class Arm:
    """What a run differs by from the others.

    Attributes:
        name: of the arm.
        precision: of engine and trainer alike.
        loss: what is minimised.
        rounding: of the engine's weights, a name in ``ROUNDINGS``.
    """

    name: str
    precision: Precision
    loss: PolicyLoss
    rounding: str = "none"


@dataclass(frozen=True)
class Schedule:
    """What all runs share.

    Attributes:
        steps: rollouts, each followed by a synchronisation.
        prompts: of a step.
        answers: to each prompt.
        updates: optimiser steps on one set of rollouts.
        learning_rate: of AdamW, reached after ``warmup`` steps.
        warmup: steps.
    """

    steps: int = 150
    prompts: int = 32
    answers: int = 8
    updates: int = 2
    learning_rate: float = 5e-4
    warmup: int = 5


class NotSynchronisedError(RuntimeError):
    """Engine and trainer do not hold the same weights."""


def train(
    arm: Arm, task: Task, pool: Tensor, engine: Engine, path: Path, schedule: Schedule, seed: int
) -> Iterator[dict[str, float]]:
    """Train and yield, for each step, what the curves show.

        reward         share of the engine's answers that are right
        policy_reward  share of π's own answers to fixed prompts, every ``EVERY`` steps, else NaN
        kl             k3 of KL(μ‖π), nats per token
        log_prob_diff  mean |log π − log μ|, nats
        max_shift      max |π − μ|
        ess            of the sequence weights π/μ, as a share
        gradient_norm  before clipping, mean over the updates
        entropy        −mean log μ, nats per token
        length         tokens of an answer
        rollout_s, train_s, sync_s  CPU seconds

    Args:
        arm: what to do.
        task: what is rewarded.
        pool: prompts "n p".
        engine: serves ``path`` or an earlier run's weights; they are replaced.
        path: the policy to start from.
        schedule: what all arms share.
        seed: of prompts and samples.

    Raises:
        NotSynchronisedError: the engine does not have the weights that it was sent.
    """
    torch.manual_seed(seed)
    generator = random.Random(seed)
    trainer = Trainer(path, arm.precision, learning_rate=schedule.learning_rate)
    synchronise = Synchronisation(engine, path, arm, pool)
    synchronise(trainer.state())
    fixed = pool[:FIXED]
    group = torch.arange(schedule.prompts).repeat_interleave(schedule.answers)
    for step in range(schedule.steps):
        began = time.process_time()
        rows = generator.choices(range(len(pool)), k=schedule.prompts)
        prompts = pool[rows].repeat_interleave(schedule.answers, 0)
        rollouts = ask(engine, task, prompts)
        rollout_s = time.process_time() - began

        began = time.process_time()
        rewards = right(task, prompts, rollouts).float()
        advantages = group_advantages(rewards, group, estimator="dr-grpo")
        longest = int(rollouts.mask.sum(1).max())
        token_ids, sampled, mask = (x[:, :longest] for x in rollouts)
        ids = torch.cat([prompts, token_ids], 1)
        with torch.no_grad():
            old = trainer.log_probs(ids, longest)
        for settings in trainer.optimizer.param_groups:
            settings["lr"] = schedule.learning_rate * min(1, (step + 1) / schedule.warmup)
        norms = []
        for part in torch.arange(len(ids)).chunk(schedule.updates):
            loss, _ = arm.loss(
                trainer.log_probs(ids[part], longest), old_log_probs=old[part],
                rollout_log_probs=sampled[part], advantages=advantages[part], mask=mask[part],
            )
            norms.append(trainer.step(loss))
        train_s = time.process_time() - began

        began = time.process_time()
        synchronise(trainer.state())
        sync_s = time.process_time() - began
        yield {
            "step": step, "reward": rewards.mean().item(),
            "policy_reward": own_reward(trainer, task, fixed) if step % EVERY == 0 else nan,
            **mismatch(old, sampled, mask),
            "gradient_norm": torch.stack(norms).mean().item(),
            "entropy": -sampled[mask].mean().item(),
            "length": mask.sum(1).float().mean().item(),
            "rollout_s": rollout_s, "train_s": train_s, "sync_s": sync_s,
        }


def own_reward(trainer: Trainer, task: Task, prompts: Tensor) -> float:
    """Share of right answers of the trainer's weights in the trainer, from the same draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        answers = ask(Transformers.of(trainer.model), task, prompts)
    return right(task, prompts, answers).float().mean().item()


def mismatch(old: Tensor, sampled: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the trainer is from the engine on the engine's samples "b t"."""
    d = (old - sampled).where(mask, 0)
    sequence = d.double().sum(1, keepdim=True)
    weights = (sequence - sequence.max()).exp()
    shift = (old.exp() - sampled.exp()).where(mask, 0).abs()
    return {
        "kl": k3(d)[mask].mean().item(), "log_prob_diff": d[mask].abs().mean().item(),
        "max_shift": shift.max().item(),
        "ess": effective_sample_size(weights, torch.ones_like(weights, dtype=torch.bool)).item(),
    }


class Synchronisation:
    """Sends weights to the engine and looks whether they arrived.

    The sums of magnitudes of what was sent and of what the engine holds must be equal, and on
    fixed prompts its log-probs must be those of the same weights in another implementation, up to
    the precision's rounding.
    """

    def __init__(self, engine: Engine, path: Path, arm: Arm, pool: Tensor):
        self._engine, self._arm = engine, arm
        self._probes = pool[:8]
        self._witness = open_policy(path, arm.precision)

    def __call__(self, state: State) -> None:
        sent = ROUNDINGS[self._arm.rounding](state)
        self._engine.load(sent)
        expected, held = magnitude(sent.values()), magnitude(self._engine.parameters())
        if not abs(held - expected) <= 1e-9 * expected:
            raise NotSynchronisedError(
                f"after a synchronisation {self._engine.name} holds weights whose magnitudes sum "
                f"to {held}, not {expected}: its load did not take them all; restart the engine"
            )
        self._witness.load_state_dict(sent)
        probe = self._engine.generate(self._probes, 8, stop=None)
        ids = torch.cat([self._probes, probe.token_ids], 1)
        with torch.no_grad():
            own = log_probs(self._witness, self._arm.precision, ids, 8)
        apart = (own - probe.log_probs).abs().mean().item()
        limit = NOISE[self._arm.precision.dtype]
        if not apart <= limit:
            raise NotSynchronisedError(
                f"after a synchronisation the log-probs of {self._engine.name} are {apart:.2g} "
                f"nats from those of the same weights in transformers, more than rounding to "
                f"{self._arm.precision.name} explains ({limit:g}): look at how it loads weights"
            )


def magnitude(parameters) -> float:
    """Σ |w| in float64: the same whether an engine keeps matrices apart or merged."""
    return sum(x.double().abs().sum().item() for x in parameters)
