"""prime-rl: a custom loss for ``trainer.loss``, one sample at a time."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from iscorrect.adapters.averages import token_metrics
from iscorrect.adapters.bands import check_adds_up
from iscorrect.errors import check_choice, check_flag, input_error
from iscorrect.layout import masked
from iscorrect.loss.bounds import Truncate
from iscorrect.loss.correction import Correction
from iscorrect.loss.evidence import Evidence, Scope
from iscorrect.loss.policy_loss import PolicyLoss
from iscorrect.loss.rules import DivergenceAbove
from iscorrect.loss.specs import CorrectionConfig, parse
from iscorrect.loss.terms import score_centering as centering_loss


def loss(
    inputs: Any, *, correction: CorrectionConfig = "token-tis:cap=2", score_centering: bool = False
) -> Any:
    """REINFORCE with corrected weights: ``import_path = "iscorrect.adapters.prime_rl.loss"``.

        loss = −Σ_t w_t A_t log π_t

    prime-rl has no log-probs of the trainer at the rollout's weights, so the ratio is that of the
    policy being trained; it divides the sums of all samples by their tokens, or their weights.
    The metrics are tokens' values, of which it takes mean, median and extrema over all samples.

    Args:
        inputs: prime-rl's ``LossInputs``, "t" each.
        correction: as on the command line, such as "icepop:low=0.5,high=5", or a table of the same.
        score_centering: add :func:`iscorrect.score_centering` over the kept ids, for a prime-rl
            that replays them. "is/centered" is 0 for tokens without any.

    Raises:
        InputError: a correction that looks beyond one sample; centering of other weights than
            tokens' with a fixed cap, or by a prime-rl that passes no log-probs of kept ids.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    check_flag("prime_rl.loss", "score_centering", score_centering)
    loss_fn = PolicyLoss(correction=parse(correction), aggregation="sum")
    check_adds_up("prime_rl.loss", loss_fn.correction, "one sample at a time")
    mask, advantages = inputs.loss_mask.bool(), inputs.advantages
    if getattr(inputs, "loss_weights", None) is not None:
        advantages = masked(advantages * inputs.loss_weights, mask)
    extra = _centering(loss_fn.correction, inputs, advantages) if score_centering else None
    value, _ = loss_fn(
        inputs.trainer_logprobs, rollout_log_probs=inputs.inference_logprobs,
        advantages=advantages, mask=mask, extra=extra,
    )
    log_probs = dict(
        old_log_probs=inputs.trainer_logprobs.detach(), rollout_log_probs=inputs.inference_logprobs
    )
    weights, keep, _ = loss_fn.correction(mask=mask, advantages=advantages, **log_probs)
    metrics = token_metrics(mask=mask, weights=weights, keep=keep, **log_probs)
    if score_centering:
        centered = inputs.inference_mask_logprobs
        metrics["is/centered"] = torch.zeros_like(weights) if centered is None else (
            centered.isfinite().any(-1).to(weights.dtype)
        )
    return LossOutputs(loss=value, metrics={name: x[mask] for name, x in metrics.items()})


def _centering(correction: Correction, inputs: Any, advantages: Tensor) -> Tensor | None:
    """Per-token loss "t" over the kept ids; None for a sample without any."""
    bound = correction.bound
    cap = bound.cap if isinstance(bound, Truncate) else None
    if not isinstance(cap, (int, float)) or correction != Correction(bound=bound):
        raise input_error(
            "prime_rl.loss", "score_centering", expected="false but with tokens' weights under a"
            " fixed cap, which it centers", got=repr(correction),
            fix="pass correction='token-tis:cap=2'",
        )
    if not hasattr(inputs, "trainer_mask_logprobs"):
        raise input_error(
            "prime_rl.loss", "score_centering", expected="false with a prime-rl whose LossInputs"
            " hold no trainer_mask_logprobs", got="true", fix="use one that replays kept ids",
        )
    trainer, sampler = inputs.trainer_mask_logprobs, inputs.inference_mask_logprobs
    if trainer is None or sampler is None:
        return None
    used = sampler.isfinite() & inputs.loss_mask.bool()[:, None]
    trainer, sampler = (torch.where(used, x, -torch.inf) for x in (trainer, sampler))
    return centering_loss(trainer, sampler, advantages, cap=cap)


@dataclasses.dataclass(frozen=True)
class PrimeRLRule:
    """prime-rl's mask: drop tokens whose probability has moved too far up or down.

        keep = 1{p − q ≤ high} where A > 0, 1{p − q ≥ −low} where not

    Args:
        low: limit on q − p, p = π(token), q = μ(token).
        high: limit on p − q.
    """

    low: float
    high: float
    scope: ClassVar[Scope] = "token"

    def __call__(self, evidence: Evidence) -> Tensor:
        shift = evidence.old_log_probs.exp() - evidence.rollout_log_probs.exp()
        pushed_up = evidence.advantages("PrimeRLRule") > 0
        return torch.where(pushed_up, shift <= self.high, shift >= -self.low)


def from_prime_rl(
    type: Literal["default", "ipo"] = "default",
    dppo_mask_low: float = 0.2,
    dppo_mask_high: float = 0.2,
    ipo_threshold: float = 0.1,
) -> Correction:
    """prime-rl's ``trainer.loss`` of type "default" or "ipo", for REINFORCE.

    Its losses differentiate through the unbounded ratio, which on the tokens that are kept gives
    the gradient of the weights here. Its ``kl_tau`` is a penalty and not part of the correction:
    ``ReferenceKL(coefficient=2 * kl_tau, estimator="k2")`` towards the rollout's log-probs;
    ``adv_tau`` multiplies the advantages.

    Args:
        type: "default" drops tokens whose probability has moved too far in the direction of their
            advantage, "ipo" in any direction.
        dppo_mask_low: of "default": limit on q − p where the advantage is not positive.
        dppo_mask_high: of "default": limit on p − q where the advantage is positive.
        ipo_threshold: of "ipo": limit on |p − q|.

    Raises:
        InputError: another type.

    References:
        prime_rl/trainer/rl/loss.py (559b44772, 2026-08-21).

    >>> from_prime_rl("default", 0.1, 0.3).reject
    (PrimeRLRule(low=0.1, high=0.3),)
    """
    check_choice("from_prime_rl", "type", type, ("default", "ipo"))
    if type == "ipo":
        return Correction(
            reject=(DivergenceAbove(limit=ipo_threshold, estimator="tv", over="token"),)
        )
    return Correction(reject=(PrimeRLRule(dppo_mask_low, dppo_mask_high),))
