"""The quantised model as it is shipped, in llama.cpp, scored by transformers: a dump for each.

llama.cpp multiplies Q4_1 weights by activations that it rounds to eight bits and keeps its cache in
FP16; the trainer has the same weights made dense, or rounded to BF16 once.

Where a character takes several tokens, or is begun and not ended, llama.cpp's server lists only the
last token of the piece of text that it holds back, so that the trainer scores another text. Answers
of which it lists as many tokens as it counts are kept apart.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.lab.policy import DTYPES
from benchmarks.lab.real.model import ask, gguf, open_model, open_tokenizer
from benchmarks.lab.real.offline import Answer, dump_of, questions
from iscorrect.dumps import LogProbDump, write_dump

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


class Drawn(NamedTuple):
    """An answer as it is listed.

    Attributes:
        answer: the tokens that are listed.
        tokens: how many the server counts.
    """

    answer: Answer
    tokens: int


def main(folder: Path, records: Path, seeds: list[int]) -> None:
    """Write ``trainer-seed.npz``, and ``trainer-whole-seed.npz``, that are not there."""
    records.mkdir(parents=True, exist_ok=True)

    def paths(trainer: str, seed: int) -> tuple[Path, Path]:
        return records / f"{trainer}-{seed}.npz", records / f"{trainer}-whole-{seed}.npz"

    due = [seed for seed in seeds if not all(x.exists() for t in TRAINERS for x in paths(t, seed))]
    found = draw(folder, due) if due else []
    for trainer, scored in TRAINERS.items():
        model = open_model(folder, scored.grid, DTYPES[scored.dtype])
        for seed, drawn in zip(due, found, strict=True):
            every, apart = paths(trainer, seed)
            dump = dump_of(model, [x.answer for x in drawn])
            write_dump(dump, every)
            write_dump(whole(dump, drawn), apart)
            print(every.name, apart.name, flush=True)


def whole(dump: LogProbDump, drawn: list[Drawn]) -> LogProbDump:
    """The answers whose tokens are all listed."""
    assert dump.token_ids is not None
    rows = torch.tensor([i for i, x in enumerate(drawn) if len(x.answer.token_ids) == x.tokens])
    return LogProbDump(
        rollout_log_probs=dump.rollout_log_probs[rows], old_log_probs=dump.old_log_probs[rows],
        mask=dump.mask[rows], token_ids=dump.token_ids[rows],
    )


def draw(folder: Path, seeds: list[int]) -> list[list[Drawn]]:
    """Answers of llama.cpp to the prompts of each seed."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf())
    settings.n_ctx, settings.n_parallel = AT_ONCE * (LONGEST + 256), AT_ONCE
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(settings)
    tokenizer = open_tokenizer(folder)

    def answer(asked: tuple[list[int], int]) -> Drawn:
        prompt, seed = asked
        out = server.handle_completions({
            "prompt": prompt, "max_tokens": LONGEST, "temperature": 1.0,
            "samplers": ["temperature"], "logprobs": 1, "seed": seed, "cache_prompt": False,
        })
        content = out["choices"][0]["logprobs"]["content"]
        listed = Answer(prompt, [x["id"] for x in content], [x["logprob"] for x in content])
        return Drawn(listed, out["usage"]["completion_tokens"])

    with ThreadPoolExecutor(AT_ONCE) as asking:
        return [
            [*asking.map(answer, [
                (ask(tokenizer, question), 1000 * seed + i)
                for i, question in enumerate(questions(seed))
            ])]
            for seed in seeds
        ]
