"""One set of sampled tokens, scored in every precision: how far trainer and engine are apart."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks.harness import commit, processor
from benchmarks.lab.engines import Rollouts, open_engine
from benchmarks.lab.policy import DEVICE, Precision, log_probs, open_policy, prompts_of
from benchmarks.lab.tasks import EQUALS, START, parse
from iscorrect import effective_sample_size, k3
from iscorrect.dumps import LogProbDump, write_dump

ENGINES = [
    *(Precision(dtype) for dtype in ("bf16", "fp16", "fp32")),
    *(Precision(dtype, fp32_head=True) for dtype in ("bf16", "fp16")),
]
TRAINERS = [
    *ENGINES,
    *(Precision(dtype, autocast=True) for dtype in ("bf16", "fp16")),
    Precision("bf16", autocast=True, fp32_head=True),
    *(Precision(dtype, attention="eager") for dtype in ("bf16", "fp16")),
    *(Precision(dtype, compiled=True) for dtype in ("bf16", "fp16")),
]
PAIRS = [(Precision(dtype), Precision(dtype)) for dtype in ("bf16", "fp16")]
"""Rollout and trainer whose log-probs of the first seed are kept whole, for the figures."""

Sampled = tuple[str, list[tuple[Tensor, Rollouts]]]
"""Name of an engine, and for each seed its prompts and rollouts."""


def main(
    models: Sequence[Path], engine: str, records: Path, *, seeds: int, sequences: int, length: int
) -> None:
    """Write ``offline.csv``: a row for each model, seed, rollout precision and trainer."""
    records.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    with Progress() as progress:
        bar = progress.add_task("", total=len(models) * (len(ENGINES) + len(TRAINERS)))
        for path in models:
            sampled = {}
            for precision in ENGINES:
                progress.update(bar, description=f"{path.name}, rollouts in {precision.name}")
                drawn = path, precision, engine, seeds, sequences, length
                sampled[precision] = apart_from_here(*drawn) if engine == "vllm" else sample(*drawn)
                progress.update(bar, advance=1)
            for trainer in TRAINERS:
                progress.update(bar, description=f"{path.name}, scored in {trainer.name}")
                rows += score(path, trainer, sampled, records)
                progress.update(bar, advance=1)
    file = records / "offline.csv"
    with file.with_suffix(".part").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    file.with_suffix(".part").replace(file)
    note = {
        "sequences": sequences, "length": length, "processor": processor(DEVICE.type), "threads": 1,
        "torch": torch.__version__, "commit": commit(),
        "models": [json.loads((m / "made.json").read_text(encoding="utf-8")) for m in models],
    }
    (records / "offline.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def apart_from_here(*arguments: Any) -> Sampled:
    """:func:`sample` in another process: vLLM switches torch.compile off in its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        return worker.submit(sample, *arguments).result()


def sample(
    path: Path, precision: Precision, kind: str, seeds: int, sequences: int, length: int
) -> Sampled:
    """Prompts and rollouts of each seed, from one engine."""
    torch.set_num_threads(1)
    prompt_seeds = [first_prompts(path, sequences, seed) for seed in range(seeds)]
    engine = open_engine(path, precision, prompt_seeds[0].shape[1] + length, kind)
    found = []
    for seed, prompts in enumerate(prompt_seeds):
        torch.manual_seed(seed)
        found.append((prompts, engine.generate(prompts, length, stop=None)))
    engine.close()
    return engine.name, found


def first_prompts(path: Path, n: int, seed: int) -> Tensor:
    """Prompts that a model was trained on; random tokens for the sharp one."""
    name = json.loads((path / "made.json").read_text(encoding="utf-8"))["name"]
    if name == "sharp":
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(0, 10, (n, 6), generator=generator)
        return torch.cat([drawn.new_full((n, 1), START), drawn, drawn.new_full((n, 1), EQUALS)], 1)
    prompts = prompts_of(parse(name), n, seed)
    return prompts[torch.arange(n) % len(prompts)]


def score(
    path: Path, trainer: Precision, sampled: Mapping[Precision, Sampled], records: Path
) -> Iterator[dict[str, object]]:
    """What a trainer says about the tokens of every engine, in one row a seed."""
    model = open_policy(path, trainer)
    for precision, (engine, seeds) in sampled.items():
        for seed, (prompts, rollouts) in enumerate(seeds):
            ids = torch.cat([prompts, rollouts.token_ids], 1)
            length = rollouts.token_ids.shape[1]
            with torch.no_grad():
                own = log_probs(model, trainer, ids, length)
            if seed == 0 and (precision, trainer) in PAIRS:
                dump = LogProbDump(
                    rollout_log_probs=rollouts.log_probs, old_log_probs=own, mask=rollouts.mask,
                    token_ids=rollouts.token_ids,
                )
                write_dump(dump, records / f"{path.name}-{precision.name}.npz")
            yield {
                "model": path.name, "engine": engine, "rollout": precision.name,
                "trainer": trainer.name, "seed": seed, **apart(own, rollouts.log_probs),
                "null": null(model, trainer, ids[:8], own[:8]),
            }


def null(model: nn.Module, trainer: Precision, ids: Tensor, own: Tensor) -> str:
    """Mean |Δ| between scoring sequences together and one at a time, by the same trainer."""
    if trainer.compiled:  # every shape would be compiled anew
        return ""
    with torch.no_grad():
        alone = torch.cat([log_probs(model, trainer, row, own.shape[1]) for row in ids.split(1)])
    return f"{(alone - own).abs().mean().item():.4g}"


def apart(trainer: Tensor, rollout: Tensor) -> dict[str, str]:
    """How far two sets of log-probs "b t" of the same tokens are apart.

        mean, max   |Δ|, Δ = log π − log μ, nats
        sigma       standard deviation of Δ
        kl          k3 of KL(μ‖π), nats per token
        slope       mean Δ of 1,000 tokens, nats: how fast a sequence's log-ratio falls
        pearson     of the probabilities, less 1
        ess_N       of sequence weights over the first N tokens, as a share
    """
    d = trainer.double() - rollout.double()
    together = np.corrcoef(trainer.exp().flatten().numpy(), rollout.exp().flatten().numpy())
    found = {
        "mean": d.abs().mean(), "max": d.abs().max(), "sigma": d.std(), "kl": k3(d).mean(),
        "slope": 1000 * d.mean(), "pearson": together[0, 1] - 1,
    }
    for length in (16, 32, 64, 128, 256):
        if length <= d.shape[1]:
            weights = d[:, :length].sum(1, keepdim=True).exp()
            every = torch.ones_like(weights, dtype=torch.bool)
            found[f"ess_{length}"] = effective_sample_size(weights, every)
    return {name: f"{float(value):.4g}" for name, value in found.items()}
