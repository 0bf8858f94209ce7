"""verl: corrections in place of its own, and objectives as policy losses.

verl imports the modules named in ``VERL_USE_EXTERNAL_MODULES``; call these functions in one of
them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from iscorrect.adapters.bands import LEVELS, HeldBound, HeldRule, NormalizedAfter
from iscorrect.adapters.methods import around
from iscorrect.dumps import DumpWriter
from iscorrect.errors import check_choice, check_flag, input_error
from iscorrect.layout import Layout, masked
from iscorrect.loss.bounds import Bound, Ignore, Mask, Truncate
from iscorrect.loss.correction import Correction
from iscorrect.loss.divergences import estimator
from iscorrect.loss.metrics import policy_metrics
from iscorrect.loss.objectives import Objective, made
from iscorrect.loss.policy_loss import PolicyLoss
from iscorrect.loss.ratios import at_level, log_ratio
from iscorrect.loss.rules import DivergenceAbove, Over, RatioOutside, Rule, reduced
from iscorrect.loss.specs import CorrectionConfig, parse, parse_loss

Hook = Callable[[Any, Mapping[str, Any]], tuple[Any, dict[str, float]]]


def install(correction: CorrectionConfig, dumps: DumpWriter | None = None) -> None:
    """Let a correction make verl's ``rollout_is_weights`` and ``response_mask``.

    Args:
        correction: or its text; must not look at advantages, which verl computes later.
        dumps: writes both log-probs of every batch, under the number of the trainer's weights, or
            counted from 0.

    Where verl says which versions of the weights sampled a trajectory, its tokens have the age of
    the first of them: where another one took over is not said.

    Raises:
        InputError: in training: a setting of verl's that would count twice, or pass the hook by.
    """
    from verl.trainer.ppo import rollout_corr_helper

    name = "compute_rollout_correction_and_add_to_batch"
    told: list[Sampled] = []
    hook = batch_hook(parse(correction), dumps, told)
    setattr(rollout_corr_helper, name, hook)
    setattr(rollout_corr_helper, "apply_bypass_mode", _refuse_bypass)  # noqa: B010
    # binds the function when it is imported, which may have happened already
    bound = sys.modules.get("verl.trainer.ppo.v1.trainer_base")
    if bound is not None:
        setattr(bound, name, hook)
    for module, (kind, method) in ADVANTAGES.items():
        with contextlib.suppress(ImportError):  # of a package that this trainer needs
            trainer = getattr(importlib.import_module(module), kind)
            around(trainer, method, before=functools.partial(_tell, told))


class Sampled(NamedTuple):
    """What verl knows of the weights that sampled a batch.

    Attributes:
        version: the trainer's.
        first: which version sampled the beginning of each trajectory; None where nobody said.
    """

    version: int
    first: Sequence[int | None]


ADVANTAGES = {
    "verl.trainer.ppo.v1.trainer_base": ("PPOTrainer", "_compute_advantage"),
    "verl.experimental.separation.ray_trainer": (
        "SeparateRayPPOTrainer", "_fit_compute_advantage"
    ),
}
"""The trainers' methods that call the hook, by module."""


def _tell(told: list[Sampled], trainer: Any, batch: Any, *_: Any, **__: Any) -> None:
    name = "min_global_steps"
    if hasattr(batch, "tags"):
        first = [tag.get(name) for tag in batch.tags]
    else:
        first = list(batch.non_tensor_batch.get(name, [None]))
    # weights are sent to the engine, with the step's number, at the end of a step
    version = getattr(trainer, "current_param_version", trainer.global_steps - 1)
    told[:] = [Sampled(version, first)]


def _refuse_bypass(*_: Any, **__: Any) -> None:
    raise input_error(
        "iscorrect.adapters.verl", "algorithm.rollout_correction.bypass_mode",
        expected="false: in bypass verl asks for no weights", got="true",
        fix="set algorithm.rollout_correction.bypass_mode=false",
    )


def batch_hook(
    correction: Correction, dumps: DumpWriter | None = None, told: list[Sampled] | None = None
) -> Hook:
    """What stands for verl's ``compute_rollout_correction_and_add_to_batch``.

    As in verl, tokens that a rule rejects leave ``response_mask``, those whose weight the bound
    makes 0 stay in it. Where a rule rejects the whole batch the mask stays too, with weights of 0.

    Args:
        correction: must not look at advantages.
        dumps: writes both log-probs of every batch.
        told: holds what is known of the next batch, which the hook takes out.
    """
    batches = itertools.count()

    def add_to_batch(batch: Any, config: Mapping[str, Any]) -> tuple[Any, dict[str, float]]:
        for setting in ("rollout_is", "rollout_rs"):
            if config.get(setting) is not None:
                raise input_error(
                    "iscorrect.adapters.verl", f"algorithm.rollout_correction.{setting}",
                    expected="null, since the correction stands for it",
                    got=repr(config.get(setting)),
                    fix=f"set algorithm.rollout_correction.{setting}=null, or pass"
                    " from_verl(...) of these settings to install",
                )
        response_mask = batch.batch["response_mask"]
        mask, number = response_mask.bool(), next(batches)
        log_probs = {name: batch.batch[name] for name in ("old_log_probs", "rollout_log_probs")}
        sampled = told.pop() if told else None
        layout = Layout(mask, age=_ages(sampled, mask))
        weights, _, metrics = correction(mask=layout, **log_probs)
        rules = dataclasses.replace(correction, bound=Ignore(), normalize=False)
        keep = rules(mask=layout, **log_probs).keep
        keep = torch.where(keep.any(), keep, mask)
        if dumps is not None:
            step = batch.meta_info.get("global_steps", sampled.version if sampled else number)
            dumps.write(step=int(step), mask=layout, **log_probs)
        batch.batch["rollout_is_weights"] = weights
        batch.batch["response_mask"] = (response_mask * keep).to(response_mask.dtype)
        logged = verl_metrics(correction, mask=mask, keep=keep, **log_probs)
        measured = {n: x for n, x in metrics.to_floats().items() if not math.isnan(x)}
        return batch, logged | measured

    return add_to_batch


def _ages(sampled: Sampled | None, mask: Tensor) -> Tensor | None:
    """Ages of tokens, int "b t", where all trajectories have one."""
    if sampled is None or len(sampled.first) != len(mask) or None in sampled.first:
        return None
    first = torch.tensor(sampled.first, device=mask.device)[:, None]
    return (sampled.version - first).expand(mask.shape)


def register_loss(name: str, objective: Objective | str) -> None:
    """Make an objective a policy loss of verl: ``actor.policy_loss.loss_mode=name``.

    verl's weights multiply it, verl aggregates.

    Args:
        name: not one of verl's own.
        objective: callable (log_probs, old_log_probs, advantages, layout) -> loss "b t", or the
            text of one, such as "ppo-clip:high=1.28".

    Raises:
        InputError: verl has a loss of that name; the text says more than an objective.
    """
    from verl.trainer.ppo import core_algos

    part = _objective(objective)
    if name in core_algos.POLICY_LOSS_REGISTRY:
        raise input_error(
            "register_loss", "name", expected="a name that verl does not use", got=repr(name),
            fix=f"pass 'iscorrect_{name}'",
        )

    def policy_loss(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        layout = Layout(response_mask.bool())
        log_probs, old, advantages = (
            masked(x.float(), layout.mask) for x in (log_prob, old_log_prob, advantages)
        )
        per_token, clipped = made(part, log_probs, old, advantages, layout)
        if rollout_is_weights is not None:
            per_token = per_token * masked(rollout_is_weights, layout.mask)
        loss = core_algos.agg_loss(
            loss_mat=per_token, loss_mask=response_mask, loss_agg_mode=loss_agg_mode,
            **config.global_batch_info,
        )
        metrics = policy_metrics((log_probs - old).detach(), layout, clipped)
        return loss, metrics.to_floats()

    core_algos.register_policy_loss(name)(policy_loss)


def _objective(given: Objective | str) -> Objective:
    if not isinstance(given, str):
        return given
    loss = parse_loss(given)
    if loss != PolicyLoss(objective=loss.objective):
        raise input_error(
            "register_loss", "objective", expected="an objective alone: verl applies the weights"
            " and aggregates", got=repr(given), fix="pass 'ppo-clip:high=1.28'",
        )
    return loss.objective


VERL_RULES: dict[str, tuple[Over, str]] = {
    "token_k1": ("token", "k1"), "token_k2": ("token", "k2"), "token_k3": ("token", "k3"),
    "seq_sum_k1": ("sum", "k1"), "seq_sum_k2": ("sum", "k2"), "seq_sum_k3": ("sum", "k3"),
    "seq_mean_k1": ("mean", "k1"), "seq_mean_k2": ("mean", "k2"), "seq_mean_k3": ("mean", "k3"),
    "seq_max_k2": ("max", "k2"), "seq_max_k3": ("max", "k3"),
}


def from_verl(
    rollout_is: Literal["token", "sequence"] | None = "sequence",
    rollout_is_threshold: float | str | None = 2.0,
    rollout_is_batch_normalize: bool = False,
    rollout_rs: str | None = None,
    rollout_rs_threshold: float | str | None = None,
    *,
    strict: bool = False,
) -> Correction:
    """The ``algorithm.rollout_correction`` of verl.

    In verl the bounds of every ``*_k1`` rule act on 1/ρ, so that "0.5_5.0" keeps 0.2 ≤ ρ ≤ 2;
    normalisation comes after truncation, so that weights exceed the threshold; rules see
    log-ratios clamped to ±20 nats.

    Args:
        rollout_is: level of the weights; None for weights of 1.
        rollout_is_threshold: 2.0 or "2.0" truncates, "0.5_5.0" masks; None for weights of 1.
        rollout_is_batch_normalize: divide by the batch mean of the weights.
        rollout_rs: rules joined by commas; a token must pass all of them.
        rollout_rs_threshold: one for all rules or one for each, joined by commas; "low_high" for
            the k1 rules, where a single x means "1/x_x".
        strict: what verl's documentation says in place of what verl does: k1 bounds on ρ itself, a
            threshold that no weight exceeds (normalisation before it), no clamp.

    Raises:
        InputError: a setting that verl refuses too.

    References:
        verl/trainer/ppo/rollout_corr_helper.py (0.9.1).

    >>> from_verl("token", "0.5_5.0").bound
    Mask(low=0.5, high=5.0)
    >>> from_verl(None, rollout_rs="seq_mean_k1", rollout_rs_threshold="0.5_4").reject
    (HeldRule(rule=RatioOutside(level='geometric', low=0.25, high=2.0), limit=20.0),)
    >>> from_verl(None, rollout_rs="seq_mean_k1", rollout_rs_threshold="0.5_4", strict=True).reject
    (RatioOutside(level='geometric', low=0.5, high=4.0),)
    """
    check_flag("from_verl", "strict", strict)
    check_flag("from_verl", "rollout_is_batch_normalize", rollout_is_batch_normalize)
    rules = _verl_rules(rollout_rs, rollout_rs_threshold, strict)
    if rollout_is is None or rollout_is_threshold is None:
        return Correction(bound=Ignore(), reject=rules)
    check_choice("from_verl", "rollout_is", rollout_is, ("token", "sequence"))
    low, high = _band("rollout_is_threshold", rollout_is_threshold)
    bound: Bound = Truncate(high) if low is None else Mask(low, high)
    if rollout_is_batch_normalize and not strict:
        bound = NormalizedAfter(HeldBound(bound))
    return Correction(
        level=rollout_is, bound=bound, reject=rules,
        normalize=rollout_is_batch_normalize and strict,
    )


def _verl_rules(
    names: str | None, thresholds: float | str | None, strict: bool
) -> tuple[Rule, ...]:
    if names is None:
        return ()
    # verl drops repeated names before it counts thresholds
    options = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not options:
        raise input_error(
            "from_verl", "rollout_rs", expected="one or more of " + ", ".join(VERL_RULES),
            got=repr(names), fix="pass rollout_rs=None for no rule",
        )
    texts = [text.strip() for text in str(thresholds).split(",") if text.strip()]
    if thresholds is None or len(texts) not in (1, len(options)):
        raise input_error(
            "from_verl", "rollout_rs_threshold", expected=f"one threshold, or {len(options)} joined"
            " by commas", got=repr(thresholds), fix="pass one for each rule of rollout_rs",
        )
    texts = texts * len(options) if len(texts) == 1 else texts
    return tuple(
        _verl_rule(option, text, strict) for option, text in zip(options, texts, strict=True)
    )


def _verl_rule(option: str, text: str, strict: bool) -> Rule:
    check_choice("from_verl", "rollout_rs", option, tuple(VERL_RULES))
    over, estimator = VERL_RULES[option]
    low, high = _band("rollout_rs_threshold", text)
    rule: Rule
    if estimator == "k1":
        if low is None and high < 1:
            raise input_error(
                "from_verl", "rollout_rs_threshold", expected=f"at least 1 for {option}, where a"
                " single x is the band from 1/x to x", got=repr(text),
                fix=f"pass '{1 / high:g}', or the band as 'low_high'",
            )
        low = 1 / high if low is None else low
        low, high = (low, high) if strict else (1 / high, 1 / low)
        rule = RatioOutside(level=LEVELS[over], low=low, high=high)
    elif low is not None:
        raise input_error(
            "from_verl", "rollout_rs_threshold", expected=f"one upper bound for {option}",
            got=repr(text), fix="pass a number; only the k1 rules have two bounds",
        )
    else:
        rule = DivergenceAbove(limit=high, estimator=estimator, over=over)
    return rule if strict else HeldRule(rule)


def _band(argument: str, threshold: float | str) -> tuple[float | None, float]:
    """(None, 2.0) of 2.0 or "2.0", (0.5, 5.0) of "0.5_5.0"."""
    try:
        if isinstance(threshold, bool):
            raise ValueError
        first, _, second = str(threshold).strip().partition("_")
        low, high = (float(first), float(second)) if second else (None, float(first))
    except ValueError:
        low, high = None, math.nan
    if not high > 0 or (low is not None and not 0 < low <= high):
        raise input_error(
            "from_verl", argument, expected="a positive number, or 'low_high' with low <= high",
            got=repr(threshold), fix="pass 2.0 or '0.5_5.0'",
        ) from None
    return low, high


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

    if not mask.any():  # verl's functions assert that there are tokens
        return {}
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
    x = reduced(estimator("verl_metrics", name)(d), layout, over)
    if over == "max":
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
