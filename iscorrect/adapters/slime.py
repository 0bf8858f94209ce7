"""slime and miles: a correction as ``--custom-tis-function-path``."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iscorrect.adapters.averages import token_metrics
from iscorrect.adapters.bands import HeldBound, NormalizedAfter, check_adds_up, clamp_to
from iscorrect.adapters.ragged import check_together, pad_together
from iscorrect.errors import check_choice, input_error
from iscorrect.layout import masked, unpad
from iscorrect.loss.bounds import Bound, Clip, Ignore, Mask, Truncate
from iscorrect.loss.correction import Correction
from iscorrect.loss.rules import RatioOutside, Rule, Veto
from iscorrect.loss.specs import CorrectionConfig, parse

TISResult = tuple[Tensor, list[Tensor], dict[str, Tensor]]


def tis_function(correction: CorrectionConfig) -> Callable[..., TISResult]:
    """What slime calls with its policy-gradient loss, to be multiplied by weights.

    Masks come back as they were: rejected tokens have weight 0 and stay in the denominators. The
    metrics are tokens' values, which slime reduces as it reduces the loss. With
    ``--get-mismatch-metrics`` alone there are metrics, and the loss comes back as it was.

    Args:
        correction: or its text; without parts that need advantages, or look beyond a micro-batch
            of one rank.

    Raises:
        InputError: the correction looks across the batch; at the call: a list is shorter than its
            response, or missing.
    """
    spec = parse(correction)
    check_adds_up("tis_function", spec, "a micro-batch")

    def correct(
        args: Any,
        *,
        pg_loss: Tensor,
        train_log_probs: list[Tensor] | None,
        rollout_log_probs: list[Tensor] | None,
        loss_masks: list[Tensor],
        total_lengths: list[int],
        response_lengths: list[int],
        parallel_state: Any = None,
        max_seq_lens: list[int] | None = None,
        **_: Any,
    ) -> TISResult:
        _check_settings(args, train_log_probs, rollout_log_probs)
        warn_of_truncated_sampling(
            getattr(args, "rollout_top_p", 1.0), getattr(args, "rollout_top_k", -1)
        )
        assert train_log_probs is not None and rollout_log_probs is not None
        check_together(
            "slime", LISTS, train_log_probs=train_log_probs, rollout_log_probs=rollout_log_probs
        )
        cut = _context_parallel(args, parallel_state, total_lengths, response_lengths, max_seq_lens)
        old, rollout = cut.gather(train_log_probs), cut.gather(rollout_log_probs)
        rows, present = pad_together(
            "slime", LISTS, loss_masks=loss_masks, train_log_probs=old, rollout_log_probs=rollout
        )

        def flat(padded: Tensor) -> Tensor:
            shards = cut.slice(unpad(padded, present))
            return torch.cat([pg_loss.new_zeros(0, dtype=padded.dtype), *shards])

        mask = rows["loss_masks"].bool()
        log_probs = dict(
            old_log_probs=rows["train_log_probs"], rollout_log_probs=rows["rollout_log_probs"]
        )
        weights, keep, _metrics = spec(mask=mask, **log_probs)
        values = token_metrics(mask=mask, weights=weights, keep=keep, **log_probs)
        metrics = {name: flat(x) for name, x in values.items()}
        if args.use_tis:
            pg_loss = masked(pg_loss, flat(keep)) * flat(weights)
        return pg_loss, loss_masks, metrics

    return correct


LISTS = "pass log-probs and a mask for every token of each response"


class _ContextParallel(NamedTuple):
    """How slime cuts responses over the ranks of a context-parallel group, and joins them."""

    gather: Callable[[list[Tensor]], list[Tensor]]
    slice: Callable[[list[Tensor]], list[Tensor]]


def _context_parallel(
    args: Any,
    parallel_state: Any,
    total_lengths: list[int],
    response_lengths: list[int],
    max_seq_lens: list[int] | None,
) -> _ContextParallel:
    """By the size of the group, which is the same on all its ranks, and not by what a rank holds.

    miles passes its ``parallel_state``, slime asks Megatron.
    """
    where = [*zip(total_lengths, response_lengths, strict=True)]
    more: list[tuple[Any, ...]] = [()] * len(where)
    if parallel_state is not None:
        size = parallel_state.cp.size
        helpers = "miles.backends.training_utils.cp_utils"
        longest: list[int | None] = [None] * len(where)
        more = [(args.qkv_format, n) for n in max_seq_lens or longest]
    else:
        from megatron.core import mpu

        size = mpu.get_context_parallel_world_size()
        helpers = "slime.backends.megatron_utils.cp_utils"
    if size == 1:
        return _ContextParallel(gather=list, slice=list)
    module = importlib.import_module(helpers)

    def each(function: Callable[..., Tensor], rows: list[Tensor]) -> list[Tensor]:
        places = zip(where, more, strict=True)
        return [function(x, *n, *m) for x, (n, m) in zip(rows, places, strict=True)]

    return _ContextParallel(
        # its all-reduce returns tensors with gradient
        gather=lambda rows: [x.detach() for x in each(module.all_gather_with_cp, rows)],
        slice=lambda rows: each(module.slice_log_prob_with_cp, rows),
    )


def _check_settings(
    args: Any, train_log_probs: list[Tensor] | None, rollout_log_probs: list[Tensor] | None
) -> None:
    if args.use_tis and getattr(args, "use_rollout_logprobs", False):
        raise input_error(
            "slime", "--use-rollout-logprobs", expected="off with --use-tis: the loss would divide"
            " by the engine's log-probs twice", got="on", fix="drop one of the two",
        )
    lists = {"train_log_probs": train_log_probs, "rollout_log_probs": rollout_log_probs}
    settings = {
        "train_log_probs": "let the trainer score the responses: drop --use-rollout-logprobs",
        "rollout_log_probs": "let the engine return log-probs with its samples",
    }
    for name, tensors in lists.items():
        if tensors is None:
            raise input_error(
                "slime", name, expected="given", got="None", fix=settings[name]
            )


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
