"""SkyRL: a loss of this library in its registry of policy losses."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from iscorrect.adapters.averages import floats, maxima, sums
from iscorrect.adapters.bands import check_adds_up, check_no_reference
from iscorrect.dumps import DumpWriter
from iscorrect.errors import check_choice, input_error
from iscorrect.layout import Layout, masked
from iscorrect.loss.aggregate import Sum
from iscorrect.loss.bounds import Bound, Ignore, Truncate
from iscorrect.loss.correction import Correction
from iscorrect.loss.evidence import Evidence, Scope
from iscorrect.loss.ratios import ratio as ratio_of
from iscorrect.loss.rules import RatioOutside, Rule, Veto
from iscorrect.loss.specs import LossConfig, parse_loss

OFF_POLICY_CORRECTION = (
    "tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low",
    "outlier_token_is_threshold_high", "token_mask_is_threshold_low",
    "token_mask_is_threshold_high",
)


def register(name: str, policy_loss: LossConfig, dumps: DumpWriter | None = None) -> None:
    """Make a loss one of SkyRL's: ``trainer.algorithm.policy_loss_type=name``.

    SkyRL averages metrics over micro-batches and ranks, so it is given sums and maxima:
    :func:`iscorrect.adapters.averages.from_averages` reads what it logs.

    Args:
        name: as in the configuration.
        policy_loss: or its text; aggregated by "sum", since SkyRL folds its denominators into the
            advantages.
        dumps: writes both log-probs of every call, counted from 0.

    Raises:
        InputError: another aggregation, parts that look across the batch, or a ``reference_kl``;
            at the call: SkyRL's own correction is configured too.
    """
    from skyrl.backends.skyrl_train.utils.ppo_utils import register_policy_loss

    spec = parse_loss(policy_loss)
    if spec.aggregation != Sum() or spec.over != "mask":
        raise input_error(
            "skyrl.register", "policy_loss", expected="aggregation 'sum' over the mask",
            got=f"{spec.aggregation!r} over {spec.over!r}",
            fix="pass aggregation='sum'; SkyRL divides the advantages",
        )
    check_adds_up("skyrl.register", spec, "a micro-batch")
    check_no_reference("skyrl.register", spec, "set trainer.algorithm.use_kl_loss=true")

    calls = 0

    def corrected(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls  # SkyRL pickles the function, and iterators are losing their pickling
        own = getattr(config, "off_policy_correction", None)
        for setting in OFF_POLICY_CORRECTION:
            if getattr(own, setting, None) is not None:
                raise input_error(
                    "skyrl", f"trainer.algorithm.off_policy_correction.{setting}",
                    expected="null, since the registered loss corrects", got=getattr(own, setting),
                    fix=f"set trainer.algorithm.off_policy_correction.{setting}=null",
                )
        if rollout_logprobs is None:
            raise input_error(
                "skyrl", "rollout_logprobs", expected="the engine's log-probs", got="None",
                fix="set generator.sampling_params.logprobs=0",
            )
        mask = (torch.ones_like(log_probs) if loss_mask is None else loss_mask).bool()
        batch = dict(
            rollout_log_probs=masked(rollout_logprobs, mask), old_log_probs=old_log_probs,
            advantages=advantages, mask=mask,
        )
        if dumps is not None:
            dumps.write(step=calls, **batch)
            calls += 1
        loss, metrics = spec(log_probs, **batch)
        return loss, floats(sums(metrics) | maxima(metrics))

    register_policy_loss(name)(corrected)


@dataclasses.dataclass(frozen=True)
class RuleAfter:
    """A rule that does not see the tokens which another drops.

    Args:
        first: the other rule.
        rule: asked about the tokens that are left.
    """

    first: Rule
    rule: Rule
    scope: ClassVar[Scope] = "sequence"

    def __call__(self, evidence: Evidence) -> Tensor:
        return self.rule(dataclasses.replace(evidence, layout=_left(self.first, evidence)))


@dataclasses.dataclass(frozen=True)
class TruncateAfter:
    """Truncates the product over a sequence's tokens without those that a rule drops.

    Args:
        first: the rule.
        cap: of the product.
    """

    first: Rule
    cap: float
    scope: ClassVar[Scope] = "sequence"

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        left = _left(self.first, evidence)
        return ratio_of(left.sequence_total(evidence.log_ratio)).clamp(max=self.cap)


def _left(first: Rule, evidence: Evidence) -> Layout:
    return evidence.layout.with_mask(evidence.layout.mask & first(evidence))


def from_skyrl(
    tis_ratio_type: Literal["token", "sequence"] | None = None,
    token_tis_ratio_clip_high: float = 2.0,
    sequence_tis_ratio_clip_high: float = 5.0,
    sequence_mask_metric: Literal["product", "geometric"] | None = None,
    geo_mask_high: float = 1.01,
    geo_mask_low: float = 0.99,
    product_mask_high: float = 2.0,
    product_mask_low: float = 0.5,
    outlier_token_is_threshold_low: float | None = None,
    outlier_token_is_threshold_high: float | None = None,
    token_mask_is_threshold_low: float | None = None,
    token_mask_is_threshold_high: float | None = None,
) -> Correction:
    """SkyRL's ``trainer.algorithm.off_policy_correction``, its settings by their names.

    The token mask works only with both of its thresholds, and what it drops is not part of a
    sequence's ratio. SkyRL holds ratios within e^±20, so a weight below 2.1e-9 is 2.1e-9 there.

    Args:
        tis_ratio_type: level of the truncated weights; None for weights of 1.
        token_tis_ratio_clip_high: cap of level "token".
        sequence_tis_ratio_clip_high: cap of level "sequence", the product.
        sequence_mask_metric: which ratio of a sequence must lie in its band; None for no rule.
        geo_mask_high: of the band of "geometric".
        geo_mask_low: of the same.
        product_mask_high: of the band of "product".
        product_mask_low: of the same.
        outlier_token_is_threshold_low: a single token below drops its sequence.
        outlier_token_is_threshold_high: a single token above drops its sequence.
        token_mask_is_threshold_low: tokens below are dropped.
        token_mask_is_threshold_high: tokens above are dropped.

    Raises:
        InputError: an unknown level or metric.

    References:
        skyrl/backends/skyrl_train/utils/off_policy_correction_utils.py (0.3.0).

    >>> from_skyrl("token").bound
    Truncate(cap=2.0)
    """
    if tis_ratio_type is not None:
        check_choice("from_skyrl", "tis_ratio_type", tis_ratio_type, ("token", "sequence"))
    if sequence_mask_metric is not None:
        check_choice(
            "from_skyrl", "sequence_mask_metric", sequence_mask_metric, ("product", "geometric")
        )
    band = None
    if token_mask_is_threshold_low is not None and token_mask_is_threshold_high is not None:
        band = RatioOutside(
            level="token", low=token_mask_is_threshold_low, high=token_mask_is_threshold_high
        )
    rules: list[Rule] = [] if band is None else [band]
    least, most = outlier_token_is_threshold_low, outlier_token_is_threshold_high
    if least is not None or most is not None:
        rules.append(Veto(low=least or 0.0, high=most))
    if sequence_mask_metric is not None:
        product = sequence_mask_metric == "product"
        rule = RatioOutside(
            level="sequence" if product else "geometric",
            low=product_mask_low if product else geo_mask_low,
            high=product_mask_high if product else geo_mask_high,
        )
        rules.append(rule if band is None else RuleAfter(band, rule))
    if tis_ratio_type is None:
        return Correction(bound=Ignore(), reject=tuple(rules))
    if tis_ratio_type == "token":
        return Correction(bound=Truncate(token_tis_ratio_clip_high), reject=tuple(rules))
    cap = sequence_tis_ratio_clip_high
    bound: Bound = Truncate(cap) if band is None else TruncateAfter(band, cap)
    return Correction(level="sequence", bound=bound, reject=tuple(rules))
