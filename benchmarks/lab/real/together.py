"""Reinforcement of many runs at once on a GPU: what is run, and how; judged by the plan's part 6.

The engine is the model itself in another number format, with a cache of keys and values, one token
at a time; the trainer computes whole answers. So both are PyTorch's, and differ as engines and
trainers do: in format, in the order of operations, and in what arrived of the weights.
"""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.lab.chain.records import append, due
from benchmarks.lab.policy import DTYPES
from benchmarks.lab.real import stacked
from benchmarks.lab.real.learner import LOSS_SCALE, PPO, loss_of, mismatch
from benchmarks.lab.real.model import open_model, open_tokenizer, weights
from benchmarks.lab.real.packed import Answers
from benchmarks.lab.real.senders import EMBEDDING
from benchmarks.lab.real.sums import LONGEST, PAIRS, Sums
from iscorrect import (
    group_advantages,
    round_after_step,
    round_with_feedback,
    stochastic_round,
)

STEPS, JUDGED, WARMUP, PROMPTS, ANSWERS = 60, 6, 3, 4, 8
AT_ONCE = 10
"""Runs that are computed together, at most."""
AFTER_STEP = "after-step"


class Run(NamedTuple):
    """One run; what its record is found by.

    Attributes:
        task: a name in ``PAIRS``.
        engine: the format of its weights and arithmetic.
        trainer: the format of its arithmetic; its weights are float32.
        head: "same", or "fp32" on both sides.
        every: steps from one sending of weights to the next.
        rate: learning rate of AdamW.
        correction: as :func:`iscorrect.parse` reads it, or ``PPO``.
        rounding: of the weights that are sent: "nearest", "stochastic" or "feedback"; "after-step":
            :func:`iscorrect.round_after_step`, so that the trainer computes with them too.
        baseline: "group", a group's mean with its advantages divided by their deviation; without
            that, "mean", or "half" of the mean.
        seed: of prompts and draws.
    """

    task: str = "one digit"
    engine: str = "bf16"
    trainer: str = "fp32"
    head: str = "same"
    every: int = 1
    rate: float = 2e-5
    correction: str = "uncorrected"
    rounding: str = "nearest"
    baseline: str = "group"
    seed: int = 0

    @property
    def shared(self) -> tuple:
        """What runs that are computed together have in common."""
        return (self.task, self.engine, self.trainer, self.head, self.every, self.rate,
                self.rounding == AFTER_STEP)


TIS, ICEPOP = "token-tis:cap=2", "icepop:low=0.5,high=5"
BEHIND = ("uncorrected", TIS, ICEPOP, "sequence-tis:cap=2", PPO)
MAIN = tuple(
    Run(engine=engine, correction=correction, rounding=rounding)
    for engine, correction, rounding in (
        ("bf16", "uncorrected", "nearest"), ("bf16", TIS, "nearest"),
        ("bf16", "uncorrected", "stochastic"), ("fp16", "uncorrected", "nearest"),
        ("fp16", TIS, "nearest"), ("fp32", "uncorrected", "nearest"), ("fp32", TIS, "nearest"),
    )
)
FIVE = (*MAIN[:4], MAIN[5])


def design() -> list[list[Run]]:
    """Blocks of runs, in the order in which they are done."""
    def behind(every: int, rate: float = 2e-5) -> list[Run]:
        return [
            Run(every=every, rate=rate, correction=correction, rounding="stochastic")
            for correction in BEHIND
        ]

    def halved(every: int, rate: float, rounding: str) -> list[Run]:
        return [
            Run(every=every, rate=rate, correction=correction, rounding=rounding, baseline=baseline)
            for baseline in ("mean", "half") for correction in ("uncorrected", TIS)
        ]

    compute = [
        Run(engine=dtype, trainer=dtype, correction=correction)
        for dtype in ("bf16", "fp16") for correction in ("uncorrected", TIS)
    ]
    remedies = [Run(trainer="bf16", rounding=AFTER_STEP), Run(head="fp32"),
                Run(trainer="bf16", head="fp32")]
    others = [
        Run(engine=engine, correction=correction)
        for engine in ("bf16", "fp16")
        for correction in ("token-mis", ICEPOP, "sequence-mis:high=2", PPO)
    ]
    parts: list[tuple[int, Iterable[Run]]] = [
        (10, MAIN), (5, (*compute, *remedies)),
        (5, (*others, Run(rounding="feedback"), Run(correction=TIS, rounding="stochastic"))),
        (5, (run._replace(rate=rate) for rate in (1e-5, 4e-5) for run in FIVE)),
        (5, (run._replace(task="two digits") for run in FIVE)),
        (10, behind(8)), (10, halved(8, 2e-5, "stochastic")),
        (5, (run._replace(every=every) for every in (4, 8) for run in (MAIN[0], MAIN[3]))),
        (10, behind(4)), (10, behind(1)), (10, behind(8, 4e-5)),
        (10, halved(8, 4e-5, "stochastic")), (5, halved(1, 2e-5, "nearest")),
    ]
    known: set[Run] = set()
    blocks = []
    for seeds, arms in parts:
        runs = [arm._replace(seed=seed) for arm in arms for seed in range(seeds)]
        blocks.append([run for run in runs if run not in known])
        known |= {*runs}
    return blocks


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that share what they must, ``AT_ONCE`` at most, each way to send in one piece."""
    found = []
    for _, some in groupby(sorted(runs, key=lambda run: run.shared), lambda run: run.shared):
        alike = sorted(some, key=lambda run: (run.seed // 5, run.rounding))
        for start in range(0, len(alike), AT_ONCE):
            found.append(sorted(alike[start : start + AT_ONCE], key=lambda run: run.rounding))
    return found


def main(
    folder: Path, record: Path, *, share: tuple[int, int], seconds: float, device: str
) -> None:
    """Do what is not on record, a group at a time, until the time is over.

    Args:
        folder: of the models.
        record: CSV, a line a run.
        share: of the groups, this process's number and how many there are.
        seconds: after which no group is begun that would not be over by then.
        device: where.
    """
    start = time.perf_counter()
    longest = 0.0
    number, of = share
    mine = [group for block in design() for group in groups(block)][number::of]
    left = {*due([run for group in mine for run in group], record, device)}
    todo = [some for group in mine if (some := [run for run in group if run in left])]
    for i, group in enumerate(todo):
        before = time.perf_counter()
        if before - start + longest > seconds:
            print(f"time is over: {len(todo) - i} groups left", flush=True)
            return
        rows = train(folder, group, device=device, steps=STEPS, judged=JUDGED)
        for run, found in zip(group, rows, strict=True):
            append(record, {**run._asdict(), **found})
        longest = max(longest, time.perf_counter() - before)
        print(f"{time.perf_counter() - start:.0f} s: {len(group)} runs of {group[0].shared} in "
              f"{time.perf_counter() - before:.1f} s", flush=True)


class Senders:
    """What the engines of a group get; each way to send stands in one piece of the runs."""

    def __init__(self, group: Sequence[Run], device: str):
        self._dtype = DTYPES[group[0].engine]
        self._head = group[0].head
        self._generator = torch.Generator(device).manual_seed(zlib.crc32(repr([*group]).encode()))
        self._rests: dict[str, Tensor] = {}
        ways = [run.rounding for run in group]
        assert ways == sorted(ways)
        self._pieces = {
            way: slice(ways.index(way), ways.index(way) + ways.count(way)) for way in {*ways}
        }

    @torch.no_grad()
    def __call__(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, w in masters.items():
            sent = torch.empty_like(w, dtype=self._dtype)
            for way, piece in self._pieces.items():
                sent[piece] = self._rounded(name, w[piece], way)
            found[name] = sent
        return found

    def _rounded(self, name: str, w: Tensor, way: str) -> Tensor:
        if self._dtype == torch.float32 or way in ("nearest", AFTER_STEP):
            return w.to(self._dtype)
        if way == "stochastic":
            return stochastic_round(w, self._dtype, generator=self._generator)
        sent, self._rests[name] = round_with_feedback(w, self._dtype, self._rests.get(name))
        return sent

    def engine(self, config: stacked.Config, masters: Mapping[str, Tensor]) -> stacked.Model:
        """What samples from now on."""
        head = masters[EMBEDDING].detach().clone() if self._head == "fp32" else None
        return stacked.Model.of(config, self(masters), head)


def train(
    folder: Path, group: Sequence[Run], *, device: str, steps: int, judged: int
) -> list[dict[str, str]]:
    """Runs together; of each, by step with spaces between (``sampled``, ``greedy``: every
    ``judged`` steps; ``arrival``, ``arrival_all``: at every sending but the first):

        reward, kl, log_prob_diff, ess_token, ess_sequence, gradient_norm, length
                     as :meth:`benchmarks.lab.real.learner.Learner.update` has them
        sampled, greedy
                     the policy's own share of right answers to all prompts, in float32
        arrival, arrival_all
                     of the update since the last sending, and since the first, a sample
        seconds      of the group, over its runs
    """
    began = time.perf_counter()
    first = group[0]
    task, dense = opened(folder, first.task)
    prompts = task.prompts.to(device)
    config = stacked.Config.of(dense.config)
    masters = {
        name: w.to(device).expand(len(group), *w.shape).clone().requires_grad_()
        for name, w in weights(dense).items()
    }
    optimizer = torch.optim.AdamW(
        masters.values(), lr=first.rate, betas=(0.9, 0.99), weight_decay=0, fused=device == "cuda"
    )
    if first.rounding == AFTER_STEP:
        round_after_step(optimizer, DTYPES[first.engine])
    orders = [random.Random(run.seed) for run in group]
    draws, trials = (
        [torch.Generator(device).manual_seed(offset + run.seed) for run in group]
        for offset in (0, 1000)
    )
    send = Senders(group, device)
    engine = send.engine(config, masters)
    begin = last = Sample(whole(masters, optimizer), engine)
    found: list[dict[str, list[float]]] = [{} for _ in group]

    def note(**columns: Iterable[float]) -> None:
        for name, values in columns.items():
            for run, value in zip(found, values, strict=True):
                run.setdefault(name, []).append(float(value))

    for step in range(steps + 1):
        if step % judged == 0:
            policy = whole(masters, optimizer)
            greedy, sampled = right(config, policy, task, prompts, trials)
            del policy
            note(greedy=greedy, sampled=sampled)
        if step and step % first.every == 0:
            engine = send.engine(config, masters)
            now = Sample(whole(masters, optimizer), engine)
            note(arrival=now.since(last), arrival_all=now.since(begin))
            last = now
        which = [order.sample(range(len(prompts)), PROMPTS) for order in orders]
        answers = stacked.sample(
            engine, prompts[torch.tensor(which, device=device)], ANSWERS, LONGEST, task.end, draws
        )
        for settings in optimizer.param_groups:
            settings["lr"] = first.rate * min(1, (step + 1) / WARMUP)
        rows = update(config, masters, optimizer, group, task, which, answers)
        note(**{name: [row[name] for row in rows] for name in rows[0]})
    seconds = (time.perf_counter() - began) / len(group)
    return [
        {**{name: " ".join(f"{x:.4g}" for x in values) for name, values in run.items()},
         "seconds": f"{seconds:.3g}"}
        for run in found
    ]


@torch.no_grad()
def whole(
    masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The masters, with what :func:`iscorrect.round_after_step` has put aside of them."""
    return {
        name: w + rest if (rest := optimizer.state[w].get("rest")) is not None else w
        for name, w in masters.items()
    }


@cache
def opened(folder: Path, task: str) -> tuple[Sums, PreTrainedModel]:
    """A task, and the policy that every run starts from."""
    return Sums(open_tokenizer(folder), PAIRS[task]), open_model(folder)


class Sample:
    """Some entries of every run's masters, "r k", and of what was sent of them."""

    def __init__(self, masters: Mapping[str, Tensor], engine: stacked.Model, entries: int = 2**20):
        sent = {EMBEDDING: engine.embedding, "model.norm.weight": engine.norm} | {
            f"{stacked.LAYERS}{i}.{name}": w
            for i, layer in enumerate(engine.layers) for name, w in layer.items()
        }
        share = entries / sum(w[0].numel() for w in masters.values())
        generator = torch.Generator().manual_seed(0)
        mine, theirs = [], []
        for name, w in masters.items():
            size = w[0].numel()
            places = torch.randint(size, (1 + int(share * size),), generator=generator).to(w.device)
            mine.append(w.detach().flatten(1)[:, places])
            theirs.append(sent[name].flatten(1)[:, places].float())
        self.masters, self.sent = torch.cat(mine, 1), torch.cat(theirs, 1)

    def since(self, before: Sample) -> list[float]:
        """The share that arrived of what has changed; NaN where nothing has."""
        moved = (self.masters - before.masters).double()
        arrived = ((self.sent - before.sent).double() * moved).sum(1)
        return (arrived / moved.square().sum(1)).tolist()


def answers_of(drawn: Answers, i: int) -> Answers:
    return Answers(*(x[i].cpu() for x in drawn))


def right(
    config: stacked.Config, masters: Mapping[str, Tensor], task: Sums, prompts: Tensor,
    draws: Sequence[torch.Generator],
) -> tuple[list[float], list[float]]:
    """Each policy's share of right answers to all prompts: greedily, and at temperature 1."""
    policy = stacked.Model.of(config, {name: w.detach() for name, w in masters.items()})
    asked = prompts.expand(len(draws), -1, -1)
    drawn = stacked.sample(policy, asked, 2, LONGEST, task.end, draws, greedy=1)
    drawn = Answers(*(x.cpu() for x in drawn))
    every = range(len(prompts))
    shares = [task.rewards(every, answers_of(drawn, i)).mean(0) for i in range(len(draws))]
    greedy, sampled = torch.stack(shares).T.tolist()
    return greedy, sampled


def update(
    config: stacked.Config, masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
    group: Sequence[Run], task: Sums, which: Sequence[Sequence[int]], drawn: Answers,
) -> list[dict[str, float]]:
    """Every run learns from its batch; what each was like, before the update."""
    dtype = DTYPES[group[0].trainer]
    scale = LOSS_SCALE if dtype == torch.float16 else 1.0
    cast = {name: w.to(dtype) for name, w in masters.items()}
    head = masters[EMBEDDING] if group[0].head == "fp32" else None
    own = stacked.log_probs(
        stacked.Model.of(config, cast, head), drawn.prompts, drawn.token_ids
    ).flatten(1, 2)
    mask, sampled = drawn.mask.flatten(1, 2), drawn.log_probs.flatten(1, 2)
    host = Answers(*(x.cpu() for x in drawn))
    rewards = [task.rewards(rows, answers_of(host, i)) for i, rows in enumerate(which)]
    loss = sum(
        loss_of(run.correction, own[i], sampled[i], mask[i],
                advantages(rewards[i].to(own.device), run.baseline))
        for i, run in enumerate(group)
    )
    (loss * scale).backward()
    norms = clipped([w.grad for w in masters.values()], scale)
    optimizer.step()
    optimizer.zero_grad()
    before, lengths = own.detach().cpu(), host.mask.flatten(1, 2).sum(2).float().mean(1)
    return [
        {
            "reward": rewards[i].mean().item(),
            **{name: value for name, value in mismatch(
                before[i], host.log_probs[i].flatten(0, 1), host.mask[i].flatten(0, 1),
            ).items() if name not in ("max", "tokens")},
            "gradient_norm": norms[i], "length": lengths[i].item(),
        }
        for i in range(len(group))
    ]


def advantages(rewards: Tensor, baseline: str) -> Tensor:
    """What each answer of "g n" earned beyond the baseline; "(g n)"."""
    if baseline == "half":
        return rearrange(rewards - rewards.mean(1, keepdim=True) / 2, "g n -> (g n)")
    group = torch.arange(len(rewards), device=rewards.device).repeat_interleave(rewards.shape[1])
    estimator = "grpo" if baseline == "group" else "dr-grpo"
    return group_advantages(rewards.flatten(), group, estimator=estimator)


@torch.no_grad()
def clipped(gradients: Sequence[Tensor], scale: float, most: float = 1.0) -> list[float]:
    """Each run's norm, to which its part "r …" of the gradients is then cut.

    What is not finite, as FP16 makes it, becomes 0; the norm says so.
    """
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
    norm = norms.norm(dim=0) / scale
    factor = (most / (norm + 1e-6)).clamp(max=1) / scale
    for g in gradients:
        shape = -1, *[1] * (g.ndim - 1)
        g.copy_(torch.where(norm.isfinite().view(shape), g * factor.view(shape), 0))
    return norm.tolist()
