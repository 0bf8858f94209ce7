"""One set of the real model's own tokens in every pair of precisions: a dump for each."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.lab import engines
from benchmarks.lab.policy import DTYPES, Precision
from benchmarks.lab.real.model import ask, open_model, open_tokenizer
from iscorrect import linear_log_probs
from iscorrect.dumps import LogProbDump, write_dump

PROMPTS, LONGEST = 24, 1024


class Answer(NamedTuple):
    """A prompt's tokens, an answer's, and what the engine said of these."""

    prompt: list[int]
    token_ids: list[int]
    log_probs: list[float]


def main(
    folder: Path, records: Path, seeds: list[int], rollouts: list[str], trainers: list[str]
) -> None:
    """Write ``rollout-trainer-seed.npz`` for every pair and seed that is not there."""
    records.mkdir(parents=True, exist_ok=True)

    def record(rollout: str, trainer: str, seed: int) -> Path:
        return records / f"{rollout}-{trainer}-{seed}.npz"

    for rollout in rollouts:
        due = [s for s in seeds if not all(record(rollout, t, s).exists() for t in trainers)]
        if not due:
            continue
        found = drawn_apart(folder, rollout, due)
        for trainer in trainers:
            model = open_model(folder, dtype=DTYPES[trainer])
            for seed, answers in zip(due, found, strict=True):
                if not record(rollout, trainer, seed).exists():
                    write_dump(dump_of(model, answers), record(rollout, trainer, seed))
                    print(record(rollout, trainer, seed).name, flush=True)


def drawn_apart(folder: Path, dtype: str, seeds: list[int]) -> list[list[Answer]]:
    """:func:`draw` in another process: vLLM leaves threads and a process group behind."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        return worker.submit(draw, folder, dtype, seeds).result()


def draw(folder: Path, dtype: str, seeds: list[int]) -> list[list[Answer]]:
    """Answers of an engine to the prompts of each seed."""
    torch.set_num_threads(1)
    engine = engines.Vllm(folder / "bf16-grid", Precision(dtype), max_length=LONGEST + 64)
    tokenizer = open_tokenizer(folder)
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        asked = [ask(tokenizer, question) for question in questions(seed)]
        out = engine.generate(asked, LONGEST, stop=tokenizer.eos_token_id)
        found.append([
            Answer(prompt, ids[kept].tolist(), log_probs[kept].tolist())
            for prompt, ids, log_probs, kept in zip(asked, *out, strict=True)
        ])
    engine.close()
    return found


def questions(seed: int, n: int = PROMPTS) -> list[str]:
    """Sums, stories, explanations and lists, in turn."""
    r = random.Random(seed)

    def one(i: int) -> str:
        a, b = r.randint(2, 99), r.randint(2, 99)
        hero = r.choice(["fox", "lighthouse", "robot", "river"])
        why = r.choice(["the sky is blue", "bread rises", "ice floats"])
        of = r.choice(["Paris", "whales", "volcanoes", "chess"])
        return [
            f"What is {a} + {b}? Think step by step.",
            f"Write a short story about a {hero} and the number {a}.",
            f"Explain to a child why {why}.", f"List {r.randint(3, 6)} facts about {of}.",
        ][i % 4]

    return [one(i) for i in range(n)]


@torch.no_grad()
def dump_of(model, answers: list[Answer]) -> LogProbDump:
    """What a trainer says about the engine's tokens, one answer at a time, without padding."""
    shape = len(answers), max(len(x.token_ids) for x in answers)
    mask = torch.zeros(shape, dtype=torch.bool)
    rollout, old = torch.zeros(shape), torch.zeros(shape)
    token_ids = torch.zeros(shape, dtype=torch.int64)
    for i, (prompt, ids, log_probs) in enumerate(answers):
        mask[i, : len(ids)] = True
        token_ids[i, : len(ids)] = torch.tensor(ids)
        rollout[i, : len(ids)] = torch.tensor(log_probs)
        old[i, : len(ids)] = score(model, torch.tensor([prompt + ids]), len(ids))
    return LogProbDump(
        rollout_log_probs=rollout, old_log_probs=old, mask=mask, token_ids=token_ids
    )


def score(model, ids: Tensor, answer: int) -> Tensor:
    """Log-probs of the last tokens, whose logits are of the model's dtype, as its own head has."""
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[:, -answer:]
    found = linear_log_probs(
        hidden, model.lm_head.weight, ids[:, -answer:], head_dtype=model.dtype
    )
    return found[0].float()
