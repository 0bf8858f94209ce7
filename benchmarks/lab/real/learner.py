"""The policy that learns: float32 weights, computed in their format or in 16 bits."""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.harness import commit, processor
from benchmarks.lab.policy import Precision
from benchmarks.lab.products import computed_in
from benchmarks.lab.real.model import open_model, open_tokenizer, weights
from benchmarks.lab.real.packed import Answers, log_probs, sample
from benchmarks.lab.real.sums import LONGEST, PAIRS, Sums
from iscorrect import (
    PolicyLoss,
    PPOClip,
    effective_sample_size,
    group_advantages,
    k3,
    parse,
    round_after_step,
    uncorrected,
)

FLOAT32 = Precision("fp32")
LOSS_SCALE = 2.0**10
"""Of a trainer that computes in FP16."""
PPO = "ppo"
"""The clip on π/μ, in the place of a correction."""


@dataclass(frozen=True)
class Schedule:
    """What all runs share.

    Attributes:
        steps: batches of answers, an update each.
        learning_rate: of AdamW, reached after ``warmup`` steps.
        warmup: steps.
        prompts: of a step.
        answers: to each prompt.
        every: steps from one sending of weights to the next.
        judged: steps from one evaluation of the policy to the next.
        grid: of the first weights.
        task: a name in ``PAIRS``.
    """

    steps: int = 24
    learning_rate: float = 2e-5
    warmup: int = 3
    prompts: int = 4
    answers: int = 8
    every: int = 1
    judged: int = 4
    grid: str = "bf16-grid"
    task: str = "one digit"


def conditions(schedule: Schedule, seed: int, **more: object) -> str:
    """Under which a run was made, as JSON."""
    note = {
        **more, "schedule": asdict(schedule), "seed": seed, "processor": processor("cpu"),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "commit": commit(), "date": time.strftime("%Y-%m-%d"),
    }
    return json.dumps(note, indent=1) + "\n"


class Learner:
    """Policy, task and optimiser.

    Args:
        folder: of the models.
        schedule: of the run.
        seed: fixes which prompts come.
        precision: that batches are computed in. In 16 bits all weights are rounded to nearest
            before each, as a trainer with master weights does; under autocast those of products.
        held: what ``round_after_step`` rounds the weights to; None for a trainer without it.
    """

    def __init__(
        self, folder: Path, schedule: Schedule, seed: int,
        precision: Precision = FLOAT32, held: torch.dtype | None = None,
    ):
        torch.manual_seed(seed)
        self.schedule = schedule
        self.task = Sums(open_tokenizer(folder), PAIRS[schedule.task])
        self.model = open_model(folder, schedule.grid)
        self.weights = weights(self.model)
        self.steps = 0
        self._dtype, self._autocast = precision.torch_dtype, precision.autocast
        self._head_dtype = torch.float32 if precision.fp32_head else self._dtype
        self._within = Within(self.model)
        self._random = random.Random(seed)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0
        )
        if held is not None:
            round_after_step(self._optimizer, held, seed=seed)

    @property
    def masters(self) -> dict[str, Tensor]:
        """What the optimiser steps on, by name: the weights, and what rounding took from them."""
        return {
            name: w.detach() + self._optimizer.state[w].get("rest", 0)
            for name, w in self.model.named_parameters()
        }

    def draw(self) -> list[int]:
        """The numbers of the next prompts."""
        return self._random.sample(range(len(self.task.prompts)), self.schedule.prompts)

    def update(self, which: list[int], answers: Answers, correction: str) -> dict[str, float]:
        """Learn from a batch; what it was like, before the update.

            reward         share of right answers, and what :func:`mismatch` says
            gradient_norm  before clipping; where it is not finite, nothing is learned
            entropy        −mean log μ, nats per token
            length         tokens of an answer
        """
        rewards = self.task.rewards(which, answers)
        group = torch.arange(len(which)).repeat_interleave(rewards.shape[1])
        advantages = group_advantages(rewards.flatten(), group, estimator="grpo")
        dtype = torch.float32 if self._autocast else self._dtype
        held = {name: w.to(dtype) for name, w in self._within.named_parameters()}
        autocast = torch.autocast("cpu", self._dtype, enabled=self._autocast)
        with autocast, computed_in(self.model, self._dtype):
            own = functional_call(
                self._within, held, (log_probs, *answers[:2], self._head_dtype)
            ).flatten(0, 1)
        mask, sampled = answers.mask.flatten(0, 1), answers.log_probs.flatten(0, 1)
        loss = loss_of(correction, own, sampled, mask, advantages)
        self._optimizer.zero_grad()
        scale = LOSS_SCALE if self._dtype == torch.float16 else 1.0
        (loss * scale).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), scale) / scale
        self.steps += 1
        for settings in self._optimizer.param_groups:
            share = min(1, self.steps / self.schedule.warmup)
            settings["lr"] = self.schedule.learning_rate * share
        for w in self.model.parameters():
            w.grad /= scale
        if norm.isfinite():
            self._optimizer.step()
        return {
            "reward": rewards.mean().item(), **mismatch(own.detach(), sampled, mask),
            "gradient_norm": norm.item(), "entropy": -sampled[mask].mean().item(),
            "length": mask.sum(1).float().mean().item(),
        }

    def right(self, rows: int = 27, *, rounded: bool = False) -> tuple[float, float]:
        """The share of all prompts that the policy answers right: greedily, and at temperature 1.

        Args:
            rows: prompts at a time.
            rounded: whether all its weights are rounded to what batches are computed in, or are
                its masters; the arithmetic is float32's.
        """
        dtype = self._dtype if rounded else torch.float32
        of = self.weights if rounded else self.masters
        held = {f"model.{name}": w.to(dtype).float() for name, w in of.items()}
        found = []
        for which in torch.arange(len(self.task.prompts)).split(rows):
            answers = functional_call(
                self._within, held,
                (sample, self.task.prompts[which], 2, LONGEST, self.task.end), {"greedy": 1},
            )
            found.append(self.task.rewards(which.tolist(), answers))
        greedy, sampled = torch.cat(found).mean(0).tolist()
        return greedy, sampled


class Within(nn.Module):
    """What is made of a model, as a module whose weights can be other ones for a call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, of: Callable, *args: object, **options: object):
        return of(self.model, *args, **options)


def loss_of(
    correction: str, own: Tensor, sampled: Tensor, mask: Tensor, advantages: Tensor
) -> Tensor:
    """The loss of answers "b t", whose weights are π/μ.

    Args:
        correction: as :func:`iscorrect.parse` reads it, or ``PPO``.
        own: the policy's log-probs.
        sampled: the engine's.
        mask: tokens that count.
        advantages: "b".
    """
    of_ppo = correction == PPO
    loss, _ = PolicyLoss(
        correction=uncorrected() if of_ppo else parse(correction), objective=PPOClip(),
        aggregation="token-mean",
    )(
        own, old_log_probs=sampled if of_ppo else own.detach(), rollout_log_probs=sampled,
        advantages=advantages, mask=mask,
    )
    return loss


def mismatch(own: Tensor, sampled: Tensor, mask: Tensor) -> dict[str, float]:
    """How far a policy is from what sampled, on its tokens "… t".

        kl, log_prob_diff, max   k3 of KL(μ‖π) and |log π − log μ|, nats per token
        ess_token, ess_sequence  of weights π/μ, as shares
        tokens                   how many
    """
    d = (own - sampled).where(mask, 0).double().flatten(0, -2)
    mask = mask.flatten(0, -2)
    sequence = d.sum(1, keepdim=True).exp()
    every = torch.ones_like(sequence, dtype=torch.bool)
    return {
        "kl": k3(d)[mask].mean().item(), "log_prob_diff": d[mask].abs().mean().item(),
        "max": d.abs().max().item(), "ess_token": effective_sample_size(d.exp(), mask).item(),
        "ess_sequence": effective_sample_size(sequence, every).item(), "tokens": int(mask.sum()),
    }


def apart(own: Tensor, other: Tensor, mask: Tensor) -> float:
    """k3 of KL(own‖other), nats per token, on tokens "g n t" that the first sampled."""
    d = (other - own).where(mask, 0).double()
    return k3(d)[mask].mean().item()
