"""Corrections and the FP32 head next to the plain switch to FP16, on the real model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import fp16_switch
from benchmarks.harness import Setting, Workload
from benchmarks.lab.real import stacked
from benchmarks.lab.real.model import ask, open_model, open_tokenizer, weights
from benchmarks.lab.real.senders import EMBEDDING

STORIES, LONGEST = 12, 48


class Trainer(nn.Module):
    """The model as the benchmark has its own: hidden states, and a head."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, model.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.model(ids, use_cache=False).last_hidden_state


def measure(folder: Path, setting: Setting) -> Workload:
    """Every arm of :mod:`benchmarks.fp16_switch`."""
    tokenizer = open_tokenizer(folder)
    n, longest = (4, 8) if setting.small else (STORIES, LONGEST)
    asked = [
        ask(tokenizer, f"Write a short story about the number {10 + i}.") for i in range(n)
    ]
    dense = open_model(folder)
    master = Trainer(dense).to(setting.device).requires_grad_()
    note = (
        f"{sum(x.numel() for x in master.parameters()) / 1e6:.1f} M parameters, vocabulary "
        f"{dense.config.vocab_size}; {n} answers of up to {longest} tokens sampled in the same "
        "dtype with a key-value cache. "
    )
    roll = partial(
        rolled, prompts=torch.tensor(asked), longest=longest, end=tokenizer.eos_token_id
    )
    return fp16_switch.measure("real model", note, master, roll, setting)


def rolled(
    trainer: Trainer, head: torch.dtype, *, prompts: Tensor, longest: int, end: int
) -> fp16_switch.Rolled:
    held = {name: w[None] for name, w in weights(trainer.model).items()}
    device = trainer.head.weight.device
    model = stacked.Model.of(
        stacked.Config.of(trainer.model.config), held, held[EMBEDDING].to(head)
    )
    drawn = stacked.sample(
        model, prompts.to(device)[None], 1, longest, end,
        [torch.Generator(device).manual_seed(1)],
    )
    token_ids, mask, log_probs = (x[0, :, 0] for x in drawn[1:])
    before = torch.zeros(len(prompts), prompts.shape[1] - 1, device=device)
    return fp16_switch.Rolled(
        torch.cat([prompts.to(device), token_ids], 1),
        torch.cat([before, log_probs.where(mask, 0)], 1), torch.cat([before.bool(), mask], 1),
    )
