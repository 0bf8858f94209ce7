"""slime and miles: a correction as ``--custom-tis-function-path``."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iscorrect.correction import Correction
from iscorrect.divergences import k3
from iscorrect.errors import input_error
from iscorrect.layout import Layout, masked, pad_sequences, unpad
from iscorrect.ratios import log_ratio

Result = tuple[Tensor, list[Tensor], dict[str, Tensor]]


def tis_function(correction: Correction, *, package: str = "slime") -> Callable[..., Result]:
    """What slime calls with its policy-gradient loss, to be multiplied by weights.

    Masks come back as they were: rejected tokens have weight 0 and stay in the denominators. The
    metrics are tokens' values, which slime reduces as it reduces the loss.

    Args:
        correction: without parts that need advantages, or look beyond a micro-batch of one rank.
        package: "slime", or "miles": whose helpers join the shards of context parallelism.

    Raises:
        InputError: the correction looks across the batch.
    """
    if correction.scope == "batch":
        raise input_error(
            "tis_function", "correction", expected="one that looks at tokens or sequences",
            got=f"{correction!r}, which looks across a batch of which slime shows a micro-batch",
            fix="use a fixed bound and normalize=False",
        )

    def correct(
        args: Any,
        *,
        pg_loss: Tensor,
        train_log_probs: list[Tensor],
        rollout_log_probs: list[Tensor],
        loss_masks: list[Tensor],
        total_lengths: list[int],
        response_lengths: list[int],
        **_: Any,
    ) -> Result:
        warn_of_truncated_sampling(
            getattr(args, "rollout_top_p", 1.0), getattr(args, "rollout_top_k", -1)
        )
        lengths = list(zip(total_lengths, response_lengths, strict=True))
        sharded = any(len(x) != n for x, n in zip(train_log_probs, response_lengths, strict=True))
        helpers = importlib.import_module(
            f"{package}.backends.megatron_utils.cp_utils"
        ) if sharded else None

        def whole(shards: list[Tensor]) -> Tensor:
            if helpers is not None:
                shards = [
                    helpers.all_gather_with_cp(x, *n) for x, n in zip(shards, lengths, strict=True)
                ]
            return pad_sequences(shards)[0]

        def flat(padded: Tensor) -> Tensor:
            rows = unpad(padded, present)
            if helpers is not None:
                rows = [
                    helpers.slice_log_prob_with_cp(x, *n)
                    for x, n in zip(rows, lengths, strict=True)
                ]
            return torch.cat(rows)

        mask, present = pad_sequences([x.bool() for x in loss_masks], value=False)
        old, rollout = whole(train_log_probs), whole(rollout_log_probs)
        weights, keep, _metrics = correction(
            old_log_probs=old, rollout_log_probs=rollout, mask=mask
        )
        d = log_ratio(old, rollout, Layout(mask))
        kept = flat(keep)
        metrics = {
            "is/weight": flat(weights), "is/rejected": 1 - kept.float(),
            "mismatch/kl_k1": -flat(d), "mismatch/kl_k3": flat(k3(d)),
            "mismatch/log_prob_diff": flat(d.abs()),
        }
        return masked(pg_loss, kept) * flat(weights), loss_masks, metrics

    return correct


def warn_of_truncated_sampling(top_p: float, top_k: int) -> None:
    """Warn where the engine samples from a cut distribution, on which every ratio is off."""
    if top_p < 1 or top_k > 0:
        warnings.warn(
            f"top_p={top_p}, top_k={top_k} cut the rollout's distribution: every ratio is then off"
            " by the mass that was cut, unless the trainer replays the kept tokens.",
            stacklevel=3,
        )
