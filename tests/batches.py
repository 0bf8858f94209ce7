"""Batches that hypothesis draws: ragged masks, empty rows, NaN and ±inf in the padding."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from oracle import Sequence

SCALES = (1e-4, 0.05, 1.0, 100.0)


class Batch(NamedTuple):
    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    rollout_log_probs: torch.Tensor
    ref_log_probs: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor

    def to(self, dtype):
        return Batch(*(x if x.dtype == torch.bool else x.to(dtype) for x in self))

    def rows(self, rows):
        return Batch(*(x[rows] for x in self))

    def sequences(self):
        return [
            Sequence(*(x[m].numpy() for x in row))
            for *row, m in zip(
                self.old_log_probs, self.rollout_log_probs, self.advantages, self.log_probs,
                self.ages(), self.mask, strict=True,
            )
        ]

    def ages(self):
        """An age for each token: 0 to 20, several in a sequence, anything in the padding."""
        position = torch.arange(self.mask.numel()).view(self.mask.shape)
        return torch.where(self.mask, position * 5 % 21, -7)


def make_batch(seed, rows=3, width=6, scale=0.05):
    """A float64 batch, ragged and with holes."""
    rng = np.random.default_rng(seed)
    shape = (rows, width)
    mask = np.arange(width) < rng.integers(0, width + 1, (rows, 1))
    mask &= rng.random(shape) < 0.9  # holes: environment tokens
    rollout = -rng.exponential(1.0, shape) - 0.05
    old = np.minimum(rollout + scale * rng.standard_normal(shape), -1e-3)
    current = np.minimum(old + 0.2 * rng.standard_normal(shape), -1e-3)
    reference = np.minimum(old + 0.1 * rng.standard_normal(shape), -1e-3)
    advantages = np.broadcast_to(rng.standard_normal((rows, 1)), shape).copy()
    tensors = [current, old, rollout, reference, advantages]
    for x in tensors:
        x[~mask] = rng.choice([np.nan, np.inf, -np.inf, 0.0, 7.0], (~mask).sum())
    return Batch(*map(torch.from_numpy, tensors), torch.from_numpy(mask))


def batches(max_rows=4, max_width=7, scales=SCALES):
    return st.builds(
        make_batch,
        seed=st.integers(0, 2**32 - 1),
        rows=st.integers(1, max_rows),
        width=st.integers(1, max_width),
        scale=st.sampled_from(scales),
    )
