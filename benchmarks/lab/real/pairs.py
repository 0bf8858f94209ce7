"""The offline table on a GPU: what the model samples in one precision, scored in others.

What samples is :mod:`benchmarks.lab.real.stacked`, token by token with a cache; what scores is
transformers, whole answers at once, eager, compiled or under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from math import log, nan
from pathlib import Path
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from benchmarks.lab.chain.records import append, due
from benchmarks.lab.policy import DTYPES
from benchmarks.lab.real import stacked
from benchmarks.lab.real.model import ask, open_model, open_tokenizer, weights
from benchmarks.lab.real.offline import LONGEST, questions
from benchmarks.lab.real.senders import EMBEDDING
from iscorrect import k3, linear_log_probs
from iscorrect.dumps import LogProbDump


class Side(NamedTuple):
    """A precision of engine or trainer.

    Attributes:
        dtype: of weights and arithmetic; with autocast, of the arithmetic alone.
        head: "same", or "fp32".
        how: "eager", "compiled" or "autocast".
    """

    dtype: str
    head: str = "same"
    how: str = "eager"

    @property
    def name(self) -> str:
        return " ".join(x for x in (self.dtype, *(
            ["fp32 head"] if self.head == "fp32" else []), self.how) if x != "eager")


ROLLOUTS = (Side("fp16"), Side("bf16"), Side("fp32"), Side("fp16", "fp32"), Side("bf16", "fp32"))
TRAINERS = (
    *ROLLOUTS, *(Side(dtype, how="autocast") for dtype in ("fp16", "bf16")),
    *(Side(dtype, how="compiled") for dtype in ("fp16", "bf16")),
)


class Pair(NamedTuple):
    """A row of the record.

    Attributes:
        rollout: a name of ``ROLLOUTS``.
        trainer: a name of ``TRAINERS``.
        seed: of the prompts.
    """

    rollout: str
    trainer: str
    seed: int


def main(
    folder: Path, record: Path, seeds: list[int], *, device: str, longest: int = LONGEST,
) -> None:
    """A line for every pair and seed that is not on record."""
    wanted = [
        Pair(mu.name, pi.name, seed) for mu in ROLLOUTS for pi in TRAINERS for seed in seeds
    ]
    left = {*due(wanted, record, device)}
    answers = {
        mu.name: draw(folder, mu, seeds, device, longest) for mu in ROLLOUTS
        if any(pair.rollout == mu.name for pair in left)
    }
    for pi in TRAINERS:
        model = trainer(folder, pi, device)
        for rollout, drawn in answers.items():
            for seed, each in zip(seeds, drawn, strict=True):
                pair = Pair(rollout, pi.name, seed)
                if pair in left:
                    found = of_dump(dump_of(model, pi, each))
                    numbers = {name: f"{value:.6g}" for name, value in found.items()}
                    append(record, {**pair._asdict(), **numbers})
        print(pi.name, flush=True)


class Answers(NamedTuple):
    """Of one seed.

    Attributes:
        ids: "b t", padded prompts and answers.
        known: bool "b t", where they are no padding.
        mask: bool "b n", the tokens of the answers, which stand last.
        log_probs: "b n", the engine's.
    """

    ids: Tensor
    known: Tensor
    mask: Tensor
    log_probs: Tensor


def draw(folder: Path, side: Side, seeds: list[int], device: str, longest: int) -> list[Answers]:
    """Answers of an engine to the prompts of all seeds, which it has at once, by draws of each."""
    tokenizer = open_tokenizer(folder)
    asked = [ask(tokenizer, question) for seed in seeds for question in questions(seed)]
    width = max(map(len, asked))
    known = torch.tensor([[False] * (width - len(x)) + [True] * len(x) for x in asked])
    prompts = torch.tensor([[0] * (width - len(x)) + x for x in asked])
    dense = open_model(folder)
    exact = {name: w.to(device)[None] for name, w in weights(dense).items()}
    model = stacked.Model.of(
        stacked.Config.of(dense.config),
        {name: w.to(DTYPES[side.dtype]) for name, w in exact.items()},
        exact[EMBEDDING] if side.head == "fp32" else None,
    )
    drawn = stacked.sample(
        model, prompts.to(device)[None], 1, longest, tokenizer.eos_token_id,
        [torch.Generator(device).manual_seed(seed) for seed in seeds], known=known.to(device),
    )
    token_ids, mask, log_probs = (x[0, :, 0] for x in drawn[1:])
    ids = torch.cat([prompts.to(device), token_ids], 1)
    known = torch.cat([known.to(device), mask], 1)
    parts = (x.chunk(len(seeds)) for x in (ids, known, mask, log_probs))
    return [Answers(*part) for part in zip(*parts, strict=True)]


def trainer(folder: Path, side: Side, device: str):
    dtype = torch.float32 if side.how == "autocast" else DTYPES[side.dtype]
    model = open_model(folder, dtype=dtype).to(device)
    if side.how == "compiled":
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    return model


@torch.no_grad()
def dump_of(model, side: Side, answers: Answers, rows: int = 12) -> LogProbDump:
    """What a trainer says about an engine's tokens."""
    n = answers.mask.shape[1]
    found = []
    for ids, known in zip(*(x.split(rows) for x in answers[:2]), strict=True):
        cast = torch.autocast(ids.device.type, DTYPES[side.dtype])
        place = (known.cumsum(1) - 1).clamp(min=0)
        with cast if side.how == "autocast" else nullcontext():
            hidden = model.model(
                ids, attention_mask=known.long(), position_ids=place, use_cache=False
            ).last_hidden_state[:, -n - 1 : -1]
        dtype = torch.float32 if side.head == "fp32" else DTYPES[side.dtype]
        found.append(linear_log_probs(
            hidden.to(dtype), model.lm_head.weight.to(dtype), ids[:, -n:], head_dtype=dtype
        ).float())
    rollout, old, mask = (x.cpu() for x in (answers.log_probs, torch.cat(found), answers.mask))
    return LogProbDump(rollout_log_probs=rollout, old_log_probs=old, mask=mask)


def of_dump(dump: LogProbDump) -> dict[str, float]:
    """What a pair of precisions is judged by.

        tokens, longest    how many, and the longest answer
        mean, sigma, kl    of |Δ|, of Δ = log π − log μ, and k3 of KL(μ‖π), nats per token
        answer             σ of an answer's Σ Δ
        growth             :func:`growth`
        drift              how much |Δ| rises in 1,000 tokens
    """
    mask = dump.mask
    d = (dump.old_log_probs.double() - dump.rollout_log_probs.double()).where(mask, 0)
    places = torch.arange(mask.shape[1]).expand_as(mask)[mask].double()
    size = d.abs()[mask]
    drift = ((places - places.mean()) * (size - size.mean())).sum()
    return {
        "tokens": int(mask.sum()), "longest": int(mask.sum(1).max()), "mean": size.mean().item(),
        "sigma": d[mask].std().item(), "kl": k3(d)[mask].mean().item(),
        "answer": d.sum(1).std().item(), "growth": growth(d, mask),
        "drift": (1000 * drift / (places - places.mean()).square().sum()).item(),
    }


def growth(d: Tensor, mask: Tensor, fewest: int = 12) -> float:
    """The power of t in the variance of Σ_{s≤t} Δ_s, over answers "b t" that are so long.

    A line through logarithms at t = 8, 16, 32, … as long as ``fewest`` answers reach t; NaN where
    that is at fewer than three t.
    """
    lengths, sums = mask.sum(1), d.cumsum(1)
    spread = {
        t: sums[lengths >= t, t - 1].var().item()
        for t in sizes(mask.shape[1]) if (lengths >= t).sum() >= fewest
    }
    points = [(log(t), log(variance)) for t, variance in spread.items() if variance > 0]
    if len(points) < 3:
        return nan
    return float(stats.linregress(*zip(*points, strict=True)).slope)


def sizes(longest: int) -> Iterator[int]:
    t = 8
    while t <= longest:
        yield t
        t *= 2
