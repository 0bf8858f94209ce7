"""How much of an update arrives in an engine's number format, and the KL that this makes.

Samples are the policy's own, so that nothing that is measured acts back on it. All is computed in
float32; only weights are rounded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.lab.real import senders
from benchmarks.lab.real.learner import Learner, Schedule, apart, conditions
from benchmarks.lab.real.model import open_model
from benchmarks.lab.real.packed import Answers, log_probs, sample
from benchmarks.lab.real.records import keep
from benchmarks.lab.real.senders import Send, Weights, send, some
from benchmarks.lab.real.sums import LONGEST
from iscorrect.fp16.arrival import Arrived, arrived

LOOKED_AT = (1, 2, 4, 8)
"""Updates after which everything is measured."""


def main(folder: Path, records: Path, schedule: Schedule, seed: int) -> None:
    """One trajectory; a row for each format and kind of tensor at each step that is looked at."""
    record = records / f"{schedule.grid}-{schedule.learning_rate:g}-{seed}.csv"
    keep(record, follow(folder, schedule, seed), lambda: conditions(schedule, seed))


def follow(folder: Path, schedule: Schedule, seed: int) -> Iterator[dict[str, object]]:
    """Rows of one trajectory.

        format      how weights are sent
        kind        of tensor, or "all"
        share       ⟨Q(w_k) − Q(w_0), w_k − w_0⟩ / ‖w_k − w_0‖², of a sample of 2²² entries
        unchanged   share of the moved entries whose sent value is that of w_0
        rest        ‖Q(w_k) − w_k‖ / ‖w_k − w_0‖
        kl          k3 of KL(π‖Q(π)), nats per token, on the policy's own tokens
        heard       arrival in log-probs: ⟨log Q(π) − log π_0, log π − log π_0⟩ / ‖log π − log π_0‖²
        moved       k3 of KL(π‖π_0), nats per token
        reward      of the policy's own answers, of which the tokens are
    """
    learner = Learner(folder, schedule, seed)
    start = {name: x.clone() for name, x in learner.weights.items()}
    ways = senders.senders(seed)
    memory = ways["bf16 feedback"]
    # the first of its sends has no rest to add
    of_start = ways | {"bf16 feedback": ways["bf16"]}
    engine = open_model(folder, schedule.grid)
    send(memory, start, engine)
    while True:
        which = learner.draw()
        answers = sample(learner.model, learner.task.prompts[which], schedule.answers, LONGEST,
                         learner.task.end)
        if learner.steps in LOOKED_AT:
            yield from look(learner, answers, start, ways, of_start, engine, which)
        elif learner.steps:
            send(memory, learner.weights, engine)
        if learner.steps == max(LOOKED_AT):
            return
        learner.update(which, answers, "uncorrected")


def look(
    learner: Learner, answers: Answers, start: Weights, ways: Mapping[str, Send],
    of_start: Mapping[str, Send], engine: PreTrainedModel, which: list[int],
) -> Iterator[dict[str, object]]:
    """Send the weights in every way; rows of a step, from the policy's own answers to prompts."""
    began = time.process_time()
    reward = learner.task.rewards(which, answers).mean().item()
    own = score(learner.model, answers)
    send(senders.exact, start, engine)
    before = score(engine, answers)
    movement = (own - before).where(answers.mask, 0).double()
    w0, w = some(start), some(learner.weights)
    for way, of_now in ways.items():
        q = some(send(of_now, learner.weights, engine))
        kinds = dict.fromkeys(KINDS.values(), Arrived(""))
        for name, x in w.items():
            (kind,) = {KINDS[part] for part in KINDS if part in name}
            q0 = of_start[way](name, w0[name])
            row = arrived(kind, w0[name], x, sent_before=q0, sent_after=q[name])
            kinds[kind] = row + kinds[kind]
        served = score(engine, answers)
        heard = (served - before).where(answers.mask, 0).double()
        whole = {
            "kl": apart(own, served, answers.mask),
            "heard": ((heard * movement).sum() / movement.square().sum()).item(),
            "moved": apart(own, before, answers.mask), "reward": reward,
            "tokens": int(answers.mask.sum()), "seconds": time.process_time() - began,
        }
        for row in [sum(kinds.values(), Arrived("all")), *kinds.values()]:
            yield {
                "step": learner.steps, "format": way, "kind": row.name, "share": row.share,
                "unchanged": row.unchanged, "rest": row.rest,
                **(whole if row.name == "all" else dict.fromkeys(whole, "")),
            }


KINDS = {"embed": "embedding and head", "attn": "attention", "mlp": "MLP", "norm": "norms"}
"""Kinds of tensors, by what is in their names."""


def score(model, answers: Answers) -> Tensor:
    with torch.no_grad():
        return log_probs(model, answers.prompts, answers.token_ids)
