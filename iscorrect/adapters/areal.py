"""AReaL: a loss function for ``engine.train_batch``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor

from iscorrect.adapters.averages import floats, sums
from iscorrect.adapters.bands import ClipWhere, check_adds_up, check_no_reference, clamp_to
from iscorrect.dumps import DumpWriter
from iscorrect.errors import check_choice, input_error
from iscorrect.layout import Layout
from iscorrect.loss.aggregate import TokenMean
from iscorrect.loss.bounds import Ignore
from iscorrect.loss.correction import Correction
from iscorrect.loss.divergences import k2, k3
from iscorrect.loss.evidence import Evidence, Scope
from iscorrect.loss.ratios import Level
from iscorrect.loss.rules import Over, reduced
from iscorrect.loss.specs import LossConfig, parse_loss


def install(policy_loss: LossConfig, dumps: DumpWriter | None = None) -> None:
    """Let AReaL's actor use a loss of this library for its ``grpo_loss_fn``.

    To be called in every process that trains; the actor looks its loss up at every update.

    Args:
        policy_loss: see :func:`loss_function`.
        dumps: see :func:`loss_function`.

    Raises:
        InputError: see :func:`loss_function`.
    """
    from areal.trainer.ppo import actor

    setattr(actor, "grpo_loss_fn", loss_function(policy_loss, dumps))  # noqa: B010


def loss_function(
    policy_loss: LossConfig, dumps: DumpWriter | None = None
) -> Callable[..., Tensor]:
    """What ``engine.train_batch`` takes as ``loss_fn``, beside AReaL's own ``loss_weight_fn``.

    The loss is the micro-batch's mean over tokens, which AReaL weights by their number. AReaL
    averages what is logged over micro-batches, so it is given sums:
    :func:`iscorrect.adapters.averages.from_averages` reads them. Corrections may depend on the ages
    of tokens, which are AReaL's version less the ``versions`` of the rollout.

    Args:
        policy_loss: or its text; aggregated by "token-mean" over the mask.
        dumps: writes both log-probs of every call, under AReaL's version where it says one, and
            the versions that sampled the tokens.

    Raises:
        InputError: another aggregation, parts that look across the batch, or a ``reference_kl``;
            at the call: a setting of the actor's that would make every weight 1, or be ignored.
    """
    spec = parse_loss(policy_loss)
    if spec.aggregation != TokenMean() or spec.over != "mask":
        raise input_error(
            "areal.loss_function", "policy_loss", expected="'token-mean' over the mask",
            got=f"{spec.aggregation!r} over {spec.over!r}",
            fix="pass aggregation='token-mean'; AReaL weights micro-batches by their tokens",
        )
    check_adds_up("areal.loss_function", spec, "a micro-batch")
    check_no_reference("areal.loss_function", spec, "set actor.kl_ctl, a penalty on the rewards")

    calls = itertools.count()

    def loss_fn(
        logprobs: Tensor, entropy: Tensor, input_data: dict[str, Any], **settings: Any
    ) -> Tensor:
        _check_settings(spec.correction, settings, input_data)
        mask = input_data["loss_mask"].bool()
        lengths = input_data.get("cu_seqlens")
        age = _age(input_data.get("versions"), settings.get("current_version"))
        if lengths is None:
            layout = Layout(mask, age=age)
        else:
            layout = Layout.from_cu_seqlens(mask, lengths, age=age)
        batch = dict(
            rollout_log_probs=input_data["logprobs"], old_log_probs=input_data.get("prox_logp"),
            advantages=input_data["advantages"],
        )
        if dumps is not None:
            old = logprobs if batch["old_log_probs"] is None else batch["old_log_probs"]
            number, version = next(calls), settings.get("current_version")
            dumps.write(
                step=number if version is None else version, mask=layout,
                **batch | {"old_log_probs": old},
            )
        loss, metrics = spec(logprobs, mask=layout, **batch)
        _log(floats(sums(metrics)))
        return loss

    return loss_fn


REPLACED = {
    "rejection_sampling": (None, "pass correction=from_areal(...) of its fields"),
    "m2_threshold": (None, "drop it"),
    "importance_sampling_level": ("token", "pass objective=PPOClip(level='geometric')"),
    "use_sapo_loss": (False, "drop it"),
    "c_clip": (None, "pass objective=PPOClip(dual=...)"),
}
"""What of AReaL's own loss a PolicyLoss stands for, and the value at which it is off."""


def _check_settings(
    correction: Correction, settings: dict[str, Any], input_data: dict[str, Any]
) -> None:
    for name, (off, fix) in REPLACED.items():
        if settings.get(name, off) != off:
            raise input_error(
                "areal", f"actor.{name}", expected=f"{off!r}, since the policy_loss replaces it",
                got=repr(settings[name]), fix=fix,
            )
    if settings.get("prox_logp_method") == "loglinear":
        raise input_error(
            "areal", "actor.prox_logp_method", expected="'recompute', or another that does not make"
            " the proximal log-probs up inside the loss", got="'loglinear'",
            fix="set actor.prox_logp_method=recompute",
        )
    if input_data.get("teacher_logp") is not None:
        raise input_error(
            "areal", "teacher", expected="None, since the policy_loss does not distil",
            got="log-probs of a teacher", fix="drop the teacher",
        )
    idle = isinstance(correction.bound, Ignore) and not correction.reject
    if settings.get("use_decoupled_loss") is False and not idle:
        raise input_error(
            "areal", "actor.use_decoupled_loss", expected="true: without it AReaL overwrites one of"
            " the two log-probs with the other, and every weight is 1", got="false",
            fix="set actor.use_decoupled_loss=true and actor.recompute_logprob=true",
        )


def _age(versions: Tensor | None, current: int | None) -> Tensor | None:
    """The trainer's version less that of the policy which sampled each token."""
    if versions is None or current is None:
        return None
    # a token's log-prob lies one position before the token, and its version with the token
    return current - versions.long().roll(-1, -1)


def _log(values: dict[str, float]) -> None:
    try:
        from areal.utils import stats_tracker
    except ImportError:
        return
    stats_tracker.scalar(**values)


Metric = Literal["ratio", "kl_k1", "kl_k2", "kl_k3"]


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
        x = reduced(x, layout, self.over)
        x = x.exp() if self.metric == "ratio" else x
        keep = x <= self.upper
        return keep if self.lower is None else keep & (x >= self.lower)


def from_areal(
    level: Literal["token", "sequence"] = "token",
    action: Literal["mask", "clamp"] = "mask",
    metric: Metric = "ratio",
    agg: Literal["sum", "mean", "max"] = "mean",
    upper: float = 5.0,
    lower: float | None = None,
) -> Correction:
    """AReaL's ``RejectionSamplingConfig``, with its defaults.

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

    >>> from_areal(action="clamp").bound
    Truncate(cap=5.0)
    """
    check_choice("from_areal", "level", level, ("token", "sequence"))
    check_choice("from_areal", "action", action, ("mask", "clamp"))
    check_choice("from_areal", "metric", metric, get_args(Metric))
    check_choice("from_areal", "agg", agg, ("sum", "mean", "max"))
    if action == "clamp" and metric != "ratio":
        raise input_error(
            "from_areal", "action", expected=f"'mask' with metric {metric!r}", got="'clamp'",
            fix="only ratios can be clamped",
        )
    rule = AReaLRule(metric, "token" if level == "token" else agg, upper, lower)
    weight: Level = "geometric" if level == "sequence" and metric == "ratio" else "token"
    if action == "mask":
        return Correction(level=weight, reject=(rule,), nonfinite="neutral")
    bound = clamp_to(lower, upper)
    if level == "sequence" and agg != "mean" and bound is not None:
        bound = ClipWhere(rule, bound)
    return Correction(level=weight, bound=bound, nonfinite="neutral")
