"""The real rollouts that ship with the package."""

from __future__ import annotations

from importlib.resources import as_file, files
from itertools import product
from typing import Literal, get_args

import numpy as np
import torch

from iscorrect.dumps import LogProbDump

Model = Literal["sharp", "add"]
Precision = Literal["float32", "bfloat16", "float16"]

MODELS: tuple[Model, ...] = get_args(Model)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PAIRS = tuple(product(PRECISIONS, PRECISIONS))
"""Precisions of rollout engine and trainer."""


def shipped_rollouts(model: Model, rollout: Precision, trainer: Precision) -> LogProbDump:
    """64 sequences of 128 tokens that vLLM sampled in one precision, scored in another.

    Args:
        model: "sharp", as peaked as a model of a billion parameters, or "add", trained on sums.
        rollout: of the engine.
        trainer: of the Hugging Face model that scored the same tokens.

    Returns:
        A dump without optional columns; every token counts.

    References:
        ``iscorrect/cli/data/README.md`` says how they were made.

    >>> shipped_rollouts("sharp", "bfloat16", "bfloat16").mask.shape
    torch.Size([64, 128])
    """
    with as_file(files("iscorrect.cli") / "data" / "rollouts.npz") as path, np.load(path) as arrays:
        rollout_log_probs = torch.from_numpy(arrays[f"{model}/{rollout}/rollout_log_probs"])
        old_log_probs = torch.from_numpy(arrays[f"{model}/{rollout}/trainer_log_probs/{trainer}"])
    return LogProbDump(
        rollout_log_probs=rollout_log_probs, old_log_probs=old_log_probs,
        mask=torch.ones_like(rollout_log_probs, dtype=torch.bool),
    )
