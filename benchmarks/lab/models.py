"""Small models made here: trained on a task until they solve part of it, or random and sharp."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch
from rich.progress import Progress
from torch.nn import functional
from transformers import Qwen2ForCausalLM

from benchmarks.lab.engines import Engine, Rollouts, Transformers
from benchmarks.lab.policy import DEVICE, Size, prompts_of, sharp
from benchmarks.lab.tasks import END, Task, parse

CONTEXT = 192
"""Tokens of a training stream: the rollouts of the offline comparison are no longer."""


def make(name: str, folder: Path, size: Size, *, seed: int, solved: float, steps: int) -> Path:
    """Make a model, "sharp" or that of a task, and save it with a note on how it was made.

    Args:
        name: "sharp", or a task as :func:`benchmarks.lab.tasks.parse` reads it.
        folder: of all models.
        size: of the model.
        seed: of weights and data.
        solved: the share of sampled answers that are right at which training stops.
        steps: at which it stops at the latest.
    """
    path = folder / f"{name}-{size.width}x{size.layers}-{seed}"
    if (path / "made.json").exists():
        return path
    started = time.time()
    if name == "sharp":
        model, note = sharp(size, seed), {}
    else:
        model, note = _trained(parse(name), size, seed, solved, steps)
    model.save_pretrained(path)
    parameters = sum(x.numel() for x in model.parameters())
    note |= {"name": name, "seed": seed, "parameters": parameters,
             "seconds": round(time.time() - started)}
    (path / "made.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
    return path


def _trained(
    task: Task, size: Size, seed: int, solved: float, steps: int
) -> tuple[Qwen2ForCausalLM, dict[str, float]]:
    torch.manual_seed(seed)
    generator = random.Random(seed)
    model = Qwen2ForCausalLM(size.config()).to(DEVICE)
    largest = min(2e-3, 0.256 / size.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=largest, weight_decay=0.01)
    engine = Transformers.of(model)
    prompts = prompts_of(task, 128, seed=-1)
    accuracy = 0.0
    with Progress() as progress:
        bar = progress.add_task(f"training {task.name}", total=steps)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = largest * min(1, (step + 1) / 50)
            ids = torch.tensor([task.stream(generator, CONTEXT) for _ in range(16)])
            ids = ids.to(DEVICE)
            logits = model(ids[:, :-1]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 25 == 24:
                model.train(False)
                accuracy = right(task, prompts, ask(engine, task, prompts)).float().mean().item()
                model.train()
            progress.update(bar, advance=1, description=f"{task.name} solved {accuracy:.0%}")
            if accuracy >= solved:
                break
    return model, {"solved": accuracy, "steps": step + 1, "loss": loss.item()}


def ask(engine: Engine, task: Task, prompts: torch.Tensor) -> Rollouts:
    """One answer to each prompt."""
    return engine.generate(prompts, task.longest, END)


def right(task: Task, prompts: torch.Tensor, rollouts: Rollouts) -> torch.Tensor:
    """Which answers are right, bool "b"."""
    rows = zip(prompts.tolist(), rollouts.token_ids, rollouts.mask, strict=True)
    return torch.tensor([task.solves(prompt, ids[mask].tolist()) for prompt, ids, mask in rows])


def within_reach(
    engine: Engine, task: Task, *, seed: int, pool: int = 512, answers: int = 40,
    low: float = 0.2, high: float = 0.8,
) -> torch.Tensor:
    """Prompts of which between ``low`` and ``high`` of the sampled answers are right.

    A policy that learns can solve all of these, so 100 % is within reach, as in the sanity test of
    arXiv:2510.26788 (40 answers, 20 to 80 %).
    """
    prompts = prompts_of(task, pool, seed)
    torch.manual_seed(seed)
    solved = torch.zeros(len(prompts))
    for _ in range(answers):
        solved += right(task, prompts, ask(engine, task, prompts))
    share = solved / answers
    return prompts[(share >= low) & (share <= high)]
