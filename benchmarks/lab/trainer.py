"""Mixed-precision training as FSDP does it: float32 master weights, a copy that computes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lab.policy import DEVICE, Precision, State, log_probs, open_policy
from iscorrect import fp16_scaler


class Trainer:
    """A policy, its optimiser, and with float16 a loss scaler; the same settings in any precision.

    AdamW's ε is 1e-15, below the gradients that matter here (arXiv:2506.13585, 2510.26788).
    """

    def __init__(self, path: Path, precision: Precision, *, learning_rate: float):
        self.precision = precision
        self.model = open_policy(path, precision)
        self._shared = precision.dtype == "fp32"
        self.master = self.model if self._shared else open_policy(path, Precision("fp32"))
        self._pairs = list(zip(self.master.parameters(), self.model.parameters(), strict=True))
        self.optimizer = torch.optim.AdamW(
            self.master.parameters(), lr=learning_rate, betas=(0.9, 0.95), eps=1e-15, weight_decay=0
        )
        self.scaler = (
            fp16_scaler(DEVICE) if precision.dtype == "fp16"
            else torch.amp.GradScaler(DEVICE.type, enabled=False)
        )

    def log_probs(self, ids: Tensor, answer: int) -> Tensor:
        return log_probs(self.model, self.precision, ids, answer)

    def step(self, loss: Tensor, max_norm: float = 1.0) -> Tensor:
        """One update of the weights; returns the norm of the gradient before clipping."""
        self.scaler.scale(loss).backward()
        if not self._shared:
            for master, computing in self._pairs:
                master.grad = None if computing.grad is None else computing.grad.float()
                computing.grad = None
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.master.parameters(), max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if not self._shared:
            with torch.no_grad():
                for master, computing in self._pairs:
                    computing.copy_(master)
        return norm

    def state(self) -> State:
        """The weights that compute, as an engine of the same dtype takes them."""
        return self.model.state_dict()
