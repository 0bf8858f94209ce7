"""slime and miles: a correction as ``--custom-tis-function-path``."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iscorrect.adapters.bands import HeldBound, NormalizedAfter, clamp_to
from iscorrect.errors import check_choice, input_error
from iscorrect.layout import Layout, masked, pad_sequences, unpad
from iscorrect.loss.bounds import Bound, Clip, Ignore, Mask, Truncate
from iscorrect.loss.correction import Correction
from iscorrect.loss.divergences import k3
from iscorrect.loss.ratios import log_ratio
from iscorrect.loss.rules import RatioOutside, Rule, Veto

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


def from_slime(args: Any) -> Correction:
    """Arguments of slime and miles: the built-in corrections, or the example ``mis.py``.

    The lower bound of slime's masking is 0 unless ``--tis-clip-low`` is given: one-sided. In
    ``mis.py`` rejection does nothing without ``use_tis``, normalisation comes after truncation and
    is over the micro-batch of a rank, and an unset lower bound is 1/upper.

    Args:
        args: the namespace that slime passes to its hooks, or one with the same names.

    Raises:
        InputError: a custom function that is neither of the two; normalised geometric weights,
            which ``mis.py`` refuses too.

    >>> import argparse
    >>> args = argparse.Namespace(use_tis=True, tis_clip=2.0, tis_clip_low=0.0)
    >>> from_slime(args).bound
    Truncate(cap=2.0)
    """
    custom = getattr(args, "custom_tis_function_path", None)
    if not args.use_tis:
        return Correction(bound=Ignore())
    if custom is None:
        return Correction(bound=clamp_to(args.tis_clip_low, args.tis_clip))
    if custom.endswith(".icepop_function"):
        return Correction(bound=Mask(args.tis_clip_low, args.tis_clip))
    if ".mis." not in custom:
        raise input_error(
            "from_slime", "custom_tis_function_path",
            expected="None, slime's icepop_function, or its example mis.py", got=repr(custom),
            fix="build the Correction that your function stands for",
        )
    return _from_mis(args)


def _from_mis(args: Any) -> Correction:
    level, mode, high = args.tis_level, args.tis_mode, args.tis_upper_bound
    check_choice("from_slime", "tis_level", level, ("token", "sequence", "geometric"))
    check_choice("from_slime", "tis_mode", mode, ("truncate", "clip", "mask"))
    low = 1 / high if args.tis_lower_bound is None else args.tis_lower_bound
    rules: list[Rule] = []
    bound: Bound | None
    if mode == "mask":
        bound = None
        rules.append(RatioOutside(level=level, low=low, high=high))
    else:
        bound = Truncate(high) if mode == "truncate" else Clip(low, high)
    if args.use_rs:
        rules.append(RatioOutside(
            level=args.rs_level,
            low=low if args.rs_lower_bound is None else args.rs_lower_bound,
            high=high if args.rs_upper_bound is None else args.rs_upper_bound,
        ))
        if args.rs_veto_threshold is not None:
            rules.append(Veto(low=args.rs_veto_threshold))
    if args.tis_batch_normalize:
        if level == "geometric":
            raise input_error(
                "from_slime", "tis_batch_normalize", expected="False with tis_level 'geometric'",
                got="True", fix="set tis_batch_normalize: false",
            )
        bound = NormalizedAfter(HeldBound(bound))
    return Correction(level=level, bound=bound, reject=tuple(rules))
