"""The quantised model as it is shipped, in llama.cpp, scored by transformers: a dump for each.

llama.cpp multiplies Q4_1 weights by activations that it rounds to eight bits and keeps its cache in
FP16; the trainer has the same weights made dense, or rounded to BF16 once.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.lab.policy import DTYPES
from benchmarks.lab.real.model import ask, gguf, open_model, open_tokenizer
from benchmarks.lab.real.offline import Answer, dump_of, questions
from iscorrect.dumps import write_dump

LONGEST, AT_ONCE = 256, 4


class Scored(NamedTuple):
    """A trainer.

    Attributes:
        grid: of its weights.
        dtype: of its arithmetic.
    """

    grid: str
    dtype: str


TRAINERS = {
    "dense-fp32": Scored("off-grid", "fp32"), "bf16-grid-fp32": Scored("bf16-grid", "fp32"),
    "bf16-grid-bf16": Scored("bf16-grid", "bf16"),
}


def main(folder: Path, records: Path, seeds: list[int]) -> None:
    """Write ``trainer-seed.npz`` for every trainer and seed that is not there."""
    records.mkdir(parents=True, exist_ok=True)

    def record(trainer: str, seed: int) -> Path:
        return records / f"{trainer}-{seed}.npz"

    due = [seed for seed in seeds if not all(record(t, seed).exists() for t in TRAINERS)]
    if not due:
        return
    found = draw(folder, due)
    for trainer, scored in TRAINERS.items():
        model = open_model(folder, scored.grid, DTYPES[scored.dtype])
        for seed, answers in zip(due, found, strict=True):
            write_dump(dump_of(model, answers), record(trainer, seed))
            print(record(trainer, seed).name, flush=True)


def draw(folder: Path, seeds: list[int]) -> list[list[Answer]]:
    """Answers of llama.cpp to the prompts of each seed, without their end tokens."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf())
    settings.n_ctx, settings.n_parallel = AT_ONCE * (LONGEST + 256), AT_ONCE
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(settings)
    tokenizer = open_tokenizer(folder)

    def answer(asked: tuple[list[int], int]) -> Answer:
        prompt, seed = asked
        out = server.handle_completions({
            "prompt": prompt, "max_tokens": LONGEST, "temperature": 1.0,
            "samplers": ["temperature"], "logprobs": 1, "seed": seed, "cache_prompt": False,
        })
        content = out["choices"][0]["logprobs"]["content"]
        return Answer(prompt, [x["id"] for x in content], [x["logprob"] for x in content])

    with ThreadPoolExecutor(AT_ONCE) as asking:
        return [
            [*asking.map(answer, [
                (ask(tokenizer, question), 1000 * seed + i)
                for i, question in enumerate(questions(seed))
            ])]
            for seed in seeds
        ]
