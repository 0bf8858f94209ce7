"""n* of a real engine: from which batch on the bias of an uncorrected gradient shows.

Nothing learns while it is measured: the policy is the first one, or the one after some updates on
its own answers. The engine samples, and :func:`iscorrect.coherence` is given sketches of the
gradients of the same answers with weights of 1 and with token weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.lab.real.learner import Learner, Schedule, conditions
from benchmarks.lab.real.packed import log_probs, sample
from benchmarks.lab.real.records import keep
from benchmarks.lab.real.reinforce import Arm, open_engine
from benchmarks.lab.real.senders import Send, Weights
from benchmarks.lab.real.sums import LONGEST
from benchmarks.lab.rounding import ROUNDINGS
from iscorrect import (
    GradientSketch,
    PolicyLoss,
    coherence,
    group_advantages,
    token_is,
    uncorrected,
)

BATCHES = 24
LOSSES = tuple(
    PolicyLoss(correction=correction, aggregation="seq-mean-token-sum")
    for correction in (uncorrected(), token_is())
)


@dataclass(frozen=True)
class Kind:
    """What an engine has of its trainer.

    Attributes:
        engine: what it holds and computes in.
        updates: of the policy, before anything is measured.
        sent: how the weights come to it.
        quantised: a name of ``ROUNDINGS``, done to the weights before they are sent.
        behind: updates that it has not got.
    """

    engine: str
    updates: int = 0
    sent: str = "nearest"
    quantised: str = "none"
    behind: int = 0


KINDS = {
    "bf16": Kind("bf16"),
    "bf16-after-8": Kind("bf16", updates=8),
    "bf16-after-8-stochastic": Kind("bf16", updates=8, sent="stochastic"),
    "fp16": Kind("fp16"),
    "int4": Kind("bf16", quantised="int4"),
    "behind-1": Kind("fp32", updates=8, behind=1),
    "behind-8": Kind("fp32", updates=8, behind=8),
    "fp8": Kind("bf16", quantised="fp8"),
    "fp16-after-8": Kind("fp16", updates=8),
}


def main(folder: Path, records: Path, kind: str, schedule: Schedule, seed: int) -> None:
    """A record of one row."""
    keep(
        records / f"{kind}-{seed}.csv", measure(folder, KINDS[kind], schedule, seed),
        lambda: conditions(schedule, seed, kind=kind),
    )


def measure(
    folder: Path, kind: Kind, schedule: Schedule, seed: int, batches: int = BATCHES
) -> Iterator[dict[str, float | str]]:
    """What :func:`iscorrect.coherence` says over batches; KL is k3 of KL(μ‖π) per answer, nats."""
    learner = Learner(folder, schedule, seed)
    weights = after(learner, kind.updates, kind.behind)
    arm = Arm(kind.engine, rounding=kind.sent)
    longest = learner.task.prompts.shape[1] + LONGEST
    engine = open_engine(folder, arm, schedule, longest)
    sketch, pairs, kls, tokens = GradientSketch(), [], [], 0
    group = torch.arange(schedule.prompts).repeat_interleave(schedule.answers)
    try:
        engine.load(sent(arm.send(seed), ROUNDINGS[kind.quantised](dict(weights))))
        for _ in range(batches):
            which = learner.draw()
            asked = learner.task.prompts[which]
            answers = engine.generate(asked, schedule.answers, learner.task.end)
            rewards = learner.task.rewards(which, answers).flatten()
            policy = log_probs(learner.model, asked, answers.token_ids).flatten(0, 1)
            mask = answers.mask.flatten(0, 1)
            advantages = group_advantages(rewards, group, estimator="rloo")
            found = [
                loss(policy, rollout_log_probs=answers.log_probs.flatten(0, 1),
                     advantages=advantages, mask=mask)
                for loss in LOSSES
            ]
            pairs.append([
                sketch(torch.autograd.grad(
                    loss, [*learner.model.parameters()], retain_graph=True
                )) for loss, _ in found
            ])
            kls.append(found[0].metrics["mismatch/kl/sequence"].item())
            tokens += int(mask.sum())
    finally:
        engine.close()
    plain, corrected = (torch.stack(x) for x in zip(*pairs, strict=True))
    sequences = schedule.prompts * schedule.answers
    yield {
        "engine": engine.name, "batches": batches, "sequences": sequences, "tokens": tokens,
        "kl": sum(kls) / batches,
        **coherence(plain, corrected, sequences=sequences)._asdict(),
    }


def after(learner: Learner, updates: int, behind: int) -> Weights:
    """Let a policy learn from its own answers; the weights it had some updates before the end."""
    held: Weights = {}
    for i in range(updates + 1):
        if i == updates - behind:
            held = {name: x.clone() for name, x in learner.weights.items()}
        if i == updates:
            break
        which = learner.draw()
        answers = sample(
            learner.model, learner.task.prompts[which], learner.schedule.answers, LONGEST,
            learner.task.end,
        )
        learner.update(which, answers, "uncorrected")
    return held


def sent(how: Send, weights: Weights) -> Weights:
    return {name: how(name, x) for name, x in weights.items()}

