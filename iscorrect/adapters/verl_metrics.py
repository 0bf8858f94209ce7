"""What verl logs under ``rollout_corr/``, of any correction, by verl's own arithmetic."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from iscorrect.adapters.dialects import (
    LEVELS,
    VERL_RULES,
    HeldBound,
    HeldRule,
    NormalizedAfter,
)
from iscorrect.bounds import Ignore
from iscorrect.correction import Correction
from iscorrect.divergences import estimator
from iscorrect.layout import Layout, masked
from iscorrect.ratios import at_level, log_ratio
from iscorrect.reject import DivergenceAbove, RatioOutside, Rule


def verl_metrics(
    correction: Correction,
    *,
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    keep: Tensor,
) -> dict[str, float]:
    """Metrics under the names that verl gives them.

    ``rollout_rs_<option>_…`` are there for the rules that :func:`from_verl` makes.

    Args:
        correction: as installed.
        old_log_probs: "b t", log π_old, nats.
        rollout_log_probs: "b t", log μ, nats.
        mask: bool "b t".
        keep: bool "b t", what the rules leave of it.
    """
    from verl.trainer.ppo import rollout_corr_helper

    layout = Layout(mask)
    d = log_ratio(old_log_probs, rollout_log_probs, layout)
    metrics = dict(rollout_corr_helper.compute_offpolicy_metrics(
        masked(old_log_probs, mask), masked(rollout_log_probs, mask), mask
    ))
    if not isinstance(correction.bound, Ignore):
        metrics |= _weight_metrics(correction, old_log_probs, rollout_log_probs, d, layout)
    for rule in correction.reject:
        metrics |= _rule_metrics(rule, d, layout)
    rejected = (mask & ~keep).to(d.dtype)
    metrics["rollout_rs_masked_fraction"] = layout.mean(rejected).item()
    metrics["rollout_rs_seq_masked_fraction"] = rejected.amax(-1).mean().item()
    return {f"rollout_corr/{name}": float(value) for name, value in metrics.items()}


def _weight_metrics(
    correction: Correction, old: Tensor, rollout: Tensor, d: Tensor, layout: Layout
) -> dict[str, float]:
    from verl.trainer.ppo import rollout_corr_helper

    def weights_of(correction: Correction) -> Tensor:
        evidence = dict(old_log_probs=old, rollout_log_probs=rollout, mask=layout)
        return correction(**evidence).weights  # type: ignore[arg-type]

    # verl's statistics are of the weights before normalisation and rejection
    bound = inner = correction.bound
    while isinstance(inner, (NormalizedAfter, HeldBound)):
        inner = inner.bound
    plain = dataclasses.replace(correction, bound=HeldBound(inner), reject=())
    weights = weights_of(plain)
    if not weights.any():  # verl divides by their mean
        return {}
    low, high = getattr(inner, "low", None), getattr(inner, "cap", getattr(inner, "high", None))
    high = high if isinstance(high, float) else weights.max().item()
    at = at_level(d, layout, correction.level)
    raw = masked(at.clamp(-20, 20).exp(), layout.mask)
    token = correction.level == "token"
    metrics: dict[str, float] = rollout_corr_helper.compute_is_metrics(
        rollout_is_weights=weights, raw_rollout_is_weights=raw,
        log_ratio_for_metrics=at if token else at[:, :1], response_mask=layout.mask.to(d.dtype),
        rollout_is="token" if token else "sequence",
        rollout_is_threshold=high, rollout_is_threshold_lower=low,
    )
    if low is not None:
        outside = ((raw < low) | (raw > high)).to(d.dtype)
        metrics["rollout_is_oob_ratio"] = layout.mean(outside).item()
    if isinstance(bound, NormalizedAfter):
        normalized = weights_of(dataclasses.replace(plain, bound=bound))
        metrics["rollout_is_batch_norm_factor"] = (weights.max() / normalized.max()).item()
    return metrics


def _rule_metrics(rule: Rule, d: Tensor, layout: Layout) -> dict[str, float]:
    from verl.trainer.ppo import rollout_corr_helper

    if not isinstance(rule, HeldRule):
        return {}
    d = d.clamp(-rule.limit, rule.limit)
    inner = rule.rule
    if isinstance(inner, RatioOutside) and inner.high is not None:
        over = next(over for over, level in LEVELS.items() if level == inner.level)
        name, low, high = "k1", -math.log(inner.high), -math.log(inner.low)
    elif isinstance(inner, DivergenceAbove) and isinstance(inner.estimator, str):
        over, name, low, high = inner.over, inner.estimator, None, inner.limit
    else:
        return {}
    option = next(option for option, of in VERL_RULES.items() if of == (over, name))
    x = estimator("verl_metrics", name)(d)
    if over == "sum":
        x = layout.sequence_total(x)
    elif over == "mean":
        x = layout.sequence_mean(x)
    elif over == "max":
        x = layout.sequence_max(x)
        x = torch.where(x.isfinite(), x, 0)
    present = layout.mask.any(-1)
    metrics: dict[str, float] = rollout_corr_helper.compute_rs_metrics(
        option_name=option, rs_statistic=x, response_mask=layout.mask.to(d.dtype),
        seq_valid_mask=present, level="token" if over == "token" else "sequence",
        per_sequence_values=None if over == "token" else x[:, 0],
        rollout_rs_threshold=high, rollout_rs_threshold_lower=0.0 if low is None else low,
        apply_lower_threshold=low is not None,
    )
    outside = (x > high) if low is None else (x > high) | (x < low)
    dropped = (outside & layout.mask).to(d.dtype)
    metrics[f"rollout_rs_{option}_masked_fraction"] = layout.mean(dropped).item()
    sequences = dropped.amax(-1).sum() / present.sum().clamp(min=1)
    metrics[f"rollout_rs_{option}_seq_masked_fraction"] = sequences.item()
    return metrics
