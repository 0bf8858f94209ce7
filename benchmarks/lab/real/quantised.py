"""The quantised model as it is shipped, in llama.cpp, scored by transformers: a dump for each.

llama.cpp multiplies Q4_1 weights by activations that it rounds to eight bits and keeps its cache in
FP16; the trainer has the same weights made dense, or rounded to BF16 once.

Where a character takes several tokens, llama.cpp's server lists only the last of them, so that the
trainer scores another text. What has all its tokens is kept apart.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.lab.policy import DTYPES
from benchmarks.lab.real.model import ask, gguf, open_model, open_tokenizer
from benchmarks.lab.real.offline import Answer, dump_of, questions
from iscorrect.dumps import LogProbDump, read_dump, write_dump

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
    """Write ``trainer-seed.npz``, and ``trainer-whole-seed.npz``, that are not there."""
    records.mkdir(parents=True, exist_ok=True)

    def record(trainer: str, seed: int) -> Path:
        return records / f"{trainer}-{seed}.npz"

    due = [seed for seed in seeds if not all(record(t, seed).exists() for t in TRAINERS)]
    if due:
        found = draw(folder, due)
        for trainer, scored in TRAINERS.items():
            model = open_model(folder, scored.grid, DTYPES[scored.dtype])
            for seed, answers in zip(due, found, strict=True):
                write_dump(dump_of(model, answers), record(trainer, seed))
                print(record(trainer, seed).name, flush=True)
    tokenizer = open_tokenizer(folder)
    for trainer in TRAINERS:
        for seed in seeds:
            if not record(f"{trainer}-whole", seed).exists():
                dump = whole(read_dump(record(trainer, seed)), tokenizer)
                write_dump(dump, record(f"{trainer}-whole", seed))


def whole(dump: LogProbDump, tokenizer) -> LogProbDump:
    """The answers whose tokens are text, but for a character that the end cuts."""
    assert dump.token_ids is not None
    texts = [
        tokenizer.decode(ids[kept]) for ids, kept in zip(dump.token_ids, dump.mask, strict=True)
    ]
    part = "\ufffd"
    rows = torch.tensor([i for i, x in enumerate(texts) if part not in x.rstrip(part)])
    return LogProbDump(
        rollout_log_probs=dump.rollout_log_probs[rows], old_log_probs=dump.old_log_probs[rows],
        mask=dump.mask[rows], token_ids=dump.token_ids[rows],
    )


def draw(folder: Path, seeds: list[int]) -> list[list[Answer]]:
    """Answers of llama.cpp to the prompts of each seed."""
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
