"""What other frameworks' settings mean, as corrections of this library.

A run can move over without a change in numbers, and the correction then prints what it does. Where
a framework's behaviour differs from its documentation, the correction follows the behaviour and the
docstring says so.

    setting                                      correction
    TRL      token_truncate, clip_max 3          token_tis(cap=3)
    TRL      sequence_mask, clip_max 3           sequence_mis(high=3)
    verl     rollout_is token, "2.0"             token_tis(cap=2)
    verl     rollout_is token, "0.5_5.0"         icepop(low=0.5, high=5)
    verl     rollout_is sequence, "2.0"          sequence_tis(cap=2)
    verl     rollout_rs seq_mean_k1, "0.5_4"     RatioOutside(level="geometric", low=1/4, high=2)
    slime    --use-tis                           token_tis(cap=2)
    AReaL    token, clamp, upper 5               token_tis(cap=5)
    NeMo-RL  icepop, 0.5 and 5                   icepop(low=0.5, high=5), overflow dropped
    OpenRLHF tis, 0.5 and 5                      Correction(bound=Clip(low=0.5, high=5))
    OpenRLHF, NeMo-RL  seq-mask-tis              token_is with RatioOutside(level="geometric")

They agree on finite log-probs. For others every function but ``from_trl`` and ``from_areal`` drops
the token, where the frameworks would train on NaN.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from iscorrect.bounds import Bound, Clip, Ignore, Mask, Truncate
from iscorrect.correction import Correction
from iscorrect.divergences import k2, k3
from iscorrect.errors import input_error
from iscorrect.layout import masked
from iscorrect.ratios import Evidence, Level, Scope, at_level, scope_of, widest
from iscorrect.reject import DivergenceAbove, Over, RatioOutside, Rule, Veto

TRLMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
MaskType = Literal["tis", "icepop", "seq-mask-tis"]
Metric = Literal["ratio", "kl_k1", "kl_k2", "kl_k3"]

SAFETY = 20.0
"""Nats at which verl and slime clamp log-ratios."""

VERL_RULES: dict[str, tuple[Over, str]] = {
    "token_k1": ("token", "k1"), "token_k2": ("token", "k2"), "token_k3": ("token", "k3"),
    "seq_sum_k1": ("sum", "k1"), "seq_sum_k2": ("sum", "k2"), "seq_sum_k3": ("sum", "k3"),
    "seq_mean_k1": ("mean", "k1"), "seq_mean_k2": ("mean", "k2"), "seq_mean_k3": ("mean", "k3"),
    "seq_max_k2": ("max", "k2"), "seq_max_k3": ("max", "k3"),
}
LEVELS: dict[Over, Level] = {"token": "token", "sum": "sequence", "mean": "geometric"}
"""The level whose log-ratio is a reduction of the tokens' log-ratios."""


@dataclasses.dataclass(frozen=True)
class NormalizedAfter:
    """Weights divided by their mean after the bound, so that they may exceed it.

        w = b(ρ) / mean b(ρ),  over the units of the level; b(ρ) where that mean is at most 1e-8

    The mean counts what rules reject. ``Correction(normalize=True)`` divides before the bound.

    Args:
        bound: b.
    """

    bound: Bound

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        weights = self.bound(ratio, evidence)
        units = evidence.units
        mean = masked(weights, units).sum() / torch.count_nonzero(units).clamp(min=1)
        return weights / torch.where(mean > 1e-8, mean, 1)


@dataclasses.dataclass(frozen=True)
class HeldBound:
    """A bound that is shown ratios within e^±limit.

    Args:
        bound: any bound; None for plain ratios.
        limit: nats.
    """

    bound: Bound | None
    limit: float = SAFETY

    @property
    def scope(self) -> Scope:
        """The bound's own."""
        return "token" if self.bound is None else scope_of(self.bound)

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        held = ratio.clamp(math.exp(-self.limit), math.exp(self.limit))
        return held if self.bound is None else self.bound(held, evidence)


@dataclasses.dataclass(frozen=True)
class HeldRule:
    """A rule that is shown log-ratios clamped token by token.

    Args:
        rule: any rule.
        limit: nats.
    """

    rule: Rule
    limit: float = SAFETY

    @property
    def scope(self) -> Scope:
        """The rule's own."""
        return scope_of(self.rule)

    def __call__(self, evidence: Evidence) -> Tensor:
        held = evidence.log_ratio.clamp(-self.limit, self.limit)
        return self.rule(dataclasses.replace(evidence, log_ratio=held))


@dataclasses.dataclass(frozen=True)
class Overflow:
    """Drop what float32 cannot hold as a ratio at the correction's level: log ρ above 88.7."""

    scope: ClassVar[Scope] = "sequence"

    def __call__(self, evidence: Evidence) -> Tensor:
        limit = math.log(torch.finfo(torch.float32).max)
        return at_level(evidence.log_ratio, evidence.layout, evidence.level) <= limit


@dataclasses.dataclass(frozen=True)
class AReaLRule:
    """AReaL's filter: a statistic of the log-ratios, reduced over the sequence, inside a band.

        ratio  exp(R log ρ)
        kl_k1  R log ρ                    of the opposite sign to k1
        kl_k2  R (log ρ)² / 2
        kl_k3  R (exp(−log ρ) − 1 + log ρ)  k3 of −log ρ: neither KL of the two under μ

    Args:
        metric: as above.
        over: R; "token" for none.
        upper: of the band.
        lower: of the band; None for none.
    """

    metric: Metric
    over: Over
    upper: float
    lower: float | None

    @property
    def scope(self) -> Scope:
        """"token" where nothing is reduced."""
        return "token" if self.over == "token" else "sequence"

    def __call__(self, evidence: Evidence) -> Tensor:
        d, layout = evidence.log_ratio, evidence.layout
        x = {"kl_k2": k2(d), "kl_k3": k3(-d)}.get(self.metric, d)
        if self.over == "sum":
            x = layout.sequence_total(x)
        elif self.over == "mean":
            x = layout.sequence_mean(x)
        elif self.over == "max":
            x = layout.sequence_max(x)
        x = x.exp() if self.metric == "ratio" else x
        keep = x <= self.upper
        return keep if self.lower is None else keep & (x >= self.lower)


@dataclasses.dataclass(frozen=True)
class ClipWhere:
    """Weights clipped where a rule would reject, raw elsewhere.

    Args:
        rule: what would reject.
        bound: what clips.
    """

    rule: Rule
    bound: Bound

    @property
    def scope(self) -> Scope:
        """The wider of the two."""
        return widest(scope_of(self.rule), scope_of(self.bound))

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        return torch.where(self.rule(evidence), ratio, self.bound(ratio, evidence))


def from_trl(
    mode: TRLMode = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> Correction:
    """TRL's ``vllm_importance_sampling_mode``, ``_clip_max`` and ``_clip_min``.

    A missing log-prob has ratio 1, as in TRL.

    Args:
        mode: TRL's default is "sequence_mask".
        clip_max: None for no upper bound.
        clip_min: None for no lower bound.

    Raises:
        InputError: an unknown mode.

    >>> from_trl("token_truncate", clip_max=2.0).bound
    Truncate(cap=2.0)
    """
    _check("from_trl", "mode", mode, get_args(TRLMode))
    level: Level = "token" if mode.startswith("token") else "sequence"
    masks = mode.endswith("mask")
    bound = Mask(clip_min or 0.0, clip_max) if masks else _clamp(clip_min, clip_max)
    return Correction(level=level, bound=bound, nonfinite="neutral")


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
    rules = _verl_rules(rollout_rs, rollout_rs_threshold, strict)
    if rollout_is is None or rollout_is_threshold is None:
        return Correction(bound=Ignore(), reject=rules)
    _check("from_verl", "rollout_is", rollout_is, ("token", "sequence"))
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
    texts = [text.strip() for text in str(thresholds).split(",") if text.strip()]
    if thresholds is None or not options or len(texts) not in (1, len(options)):
        raise input_error(
            "from_verl", "rollout_rs_threshold", expected=f"one threshold, or {len(options)} joined"
            " by commas", got=repr(thresholds), fix="pass one for each rule of rollout_rs",
        )
    texts = texts * len(options) if len(texts) == 1 else texts
    return tuple(
        _verl_rule(option, text, strict) for option, text in zip(options, texts, strict=True)
    )


def _verl_rule(option: str, text: str, strict: bool) -> Rule:
    _check("from_verl", "rollout_rs", option, tuple(VERL_RULES))
    over, estimator = VERL_RULES[option]
    low, high = _band("rollout_rs_threshold", text)
    rule: Rule
    if estimator == "k1":
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
        return Correction(bound=_clamp(args.tis_clip_low, args.tis_clip))
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
    _check("from_slime", "tis_level", level, ("token", "sequence", "geometric"))
    _check("from_slime", "tis_mode", mode, ("truncate", "clip", "mask"))
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


def from_areal(
    level: Literal["token", "sequence"] = "sequence",
    action: Literal["mask", "clamp"] = "mask",
    metric: Metric = "ratio",
    agg: Literal["sum", "mean", "max"] = "mean",
    upper: float = 5.0,
    lower: float | None = None,
) -> Correction:
    """AReaL's ``RejectionSamplingConfig``.

    The weight of level="sequence" with metric="ratio" is the geometric mean of the ratios, whatever
    ``agg`` says; with the other metrics it is the token's own ratio. Its k1 is the negative of
    everybody else's and its k3 that of the inverse ratio. A missing log-prob has ratio 1.

    Args:
        level: of the filter.
        action: "mask" rejects, "clamp" bounds the weights of what would be rejected.
        metric: what the bounds are on.
        agg: how a sequence's tokens are reduced.
        upper: upper bound.
        lower: lower bound; None for none.

    Raises:
        InputError: an unknown name; "clamp" of anything but the ratio.

    >>> from_areal("token", "clamp").bound
    Truncate(cap=5.0)
    """
    _check("from_areal", "level", level, ("token", "sequence"))
    _check("from_areal", "action", action, ("mask", "clamp"))
    _check("from_areal", "metric", metric, get_args(Metric))
    _check("from_areal", "agg", agg, ("sum", "mean", "max"))
    if action == "clamp" and metric != "ratio":
        raise input_error(
            "from_areal", "action", expected=f"'mask' with metric {metric!r}", got="'clamp'",
            fix="only ratios can be clamped",
        )
    rule = AReaLRule(metric, "token" if level == "token" else agg, upper, lower)
    weight: Level = "geometric" if level == "sequence" and metric == "ratio" else "token"
    if action == "mask":
        return Correction(level=weight, reject=(rule,), nonfinite="neutral")
    bound = _clamp(lower, upper)
    if level == "sequence" and agg != "mean" and bound is not None:
        bound = ClipWhere(rule, bound)
    return Correction(level=weight, bound=bound, nonfinite="neutral")


def from_nemo_rl(
    use_importance_sampling_correction: bool = True,
    truncated_importance_sampling_ratio: float | None = None,
    truncated_importance_sampling_ratio_min: float | None = None,
    truncated_importance_sampling_type: MaskType | None = "tis",
    sequence_level_importance_ratios: bool = False,
) -> Correction:
    """NeMo-RL's ``loss_fn`` settings of the same names.

    A ratio that overflows float32 gets weight 0, though it is the heaviest of all.

    Args:
        use_importance_sampling_correction: False for weights of 1.
        truncated_importance_sampling_ratio: upper bound; None for unbounded weights.
        truncated_importance_sampling_ratio_min: lower bound; None for 0.
        truncated_importance_sampling_type: "tis" clamps, "icepop" masks, "seq-mask-tis" masks
            sequences by their geometric mean and leaves token weights unbounded.
        sequence_level_importance_ratios: the weight is the product over the sequence.

    Raises:
        InputError: an unknown type.

    >>> from_nemo_rl(truncated_importance_sampling_ratio=2.0).bound
    Truncate(cap=2.0)
    """
    if not use_importance_sampling_correction:
        return Correction(bound=Ignore())
    level: Level = "sequence" if sequence_level_importance_ratios else "token"
    high, low = truncated_importance_sampling_ratio, truncated_importance_sampling_ratio_min
    if high is None:
        return Correction(level=level, reject=(Overflow(),))
    kind = truncated_importance_sampling_type or "tis"
    return _truncated("from_nemo_rl", level, kind, low, high, (Overflow(),))


def from_openrlhf(
    vllm_is_correction_type: MaskType = "tis",
    vllm_is_truncated_threshold: tuple[float, float] = (0.5, 5.0),
) -> Correction:
    """OpenRLHF's ``--vllm_is_correction_type`` and ``--vllm_is_truncated_threshold``.

    Its "tis" raises small weights to the lower threshold, which published ablations find harmful;
    its "seq-mask-tis" does not truncate.

    Args:
        vllm_is_correction_type: as for :func:`from_nemo_rl`.
        vllm_is_truncated_threshold: (low, high).

    Raises:
        InputError: an unknown type.

    >>> from_openrlhf().bound
    Clip(low=0.5, high=5.0)
    """
    low, high = vllm_is_truncated_threshold
    return _truncated("from_openrlhf", "token", vllm_is_correction_type, low, high, ())


def _truncated(
    caller: str, level: Level, kind: MaskType, low: float | None, high: float,
    rules: tuple[Rule, ...],
) -> Correction:
    _check(caller, "type", kind, get_args(MaskType))
    if kind == "tis":
        return Correction(level=level, bound=_clamp(low, high), reject=rules)
    if kind == "icepop":
        return Correction(level=level, bound=Mask(low or 0.0, high), reject=rules)
    band = RatioOutside(level="geometric", low=low or 0.0, high=high)
    return Correction(level=level, reject=(band, *rules))


def _clamp(low: float | None, high: float | None) -> Bound | None:
    if high is None:
        return Clip(low, math.inf) if low else None
    return Clip(low, high) if low else Truncate(high)


def _check(caller: str, argument: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise input_error(
            caller, argument, expected="one of " + ", ".join(map(repr, known)), got=repr(value),
            fix=f"pass {argument}={known[0]!r}",
        )
