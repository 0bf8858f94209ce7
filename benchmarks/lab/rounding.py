"""Coarser weights for the engine alone: what serving a quantised policy does to its log-probs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # which needs transformers
    from benchmarks.lab.policy import State


def as_trained(state: State) -> State:
    """The trainer's own weights."""
    return state


def fp8(state: State) -> State:
    """e4m3 with one scale for each row, as FP8 rollouts have it."""
    return _by_rows(state, 448.0, lambda x: x.to(torch.float8_e4m3fn).float())


def int4(state: State) -> State:
    """Fifteen levels a row."""
    return _by_rows(state, 7.0, torch.round)


def int3(state: State) -> State:
    """Seven levels a row."""
    return _by_rows(state, 3.0, torch.round)


ROUNDINGS = {"none": as_trained, "fp8": fp8, "int4": int4, "int3": int3}


def _by_rows(state: State, largest: float, to_grid) -> State:
    def rounded(weight: Tensor) -> Tensor:
        wide = weight.float()
        scale = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
        return (to_grid(wide / scale) * scale).to(weight.dtype)

    # embeddings and head stay as they are, as quantisers leave them
    return {
        name: rounded(x) if x.ndim == 2 and ".layers." in name else x for name, x in state.items()
    }
