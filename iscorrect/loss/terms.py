"""Per-token terms that go beside an objective: a reference penalty, score centering."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.errors import check_flag, check_number, describe, input_error
from iscorrect.layout import Layout, masked
from iscorrect.loss.divergences import Estimator, estimator
from iscorrect.loss.ratios import log_ratio


@dataclass(frozen=True, kw_only=True)
class ReferenceKL:
    """A penalty on the divergence from a reference policy, added to the objective.

        loss += β k(log π_ref − log π)

    The estimators agree in value and differ in gradient: for tokens that π samples, that of k1 has
    mean zero, that of k2 has the gradient of KL(π‖π_ref) as its mean, that of k3 the gradient of
    KL(π_ref‖π) in the tokens.

    Args:
        coefficient: β ≥ 0.
        estimator: "k1", "k2", "k3", or a callable on log π_ref − log π.
        corrected: whether the importance weights multiply the penalty too. The tokens come from μ,
            so without them the penalty is an expectation under μ.

    Raises:
        InputError: a negative coefficient, or an unknown estimator.

    References:
        GRPO (arXiv 2402.03300) uses k3, uncorrected.
    """

    coefficient: float = 1e-3
    estimator: str | Estimator = "k3"
    corrected: bool = False

    def __post_init__(self) -> None:
        check_number("ReferenceKL", "coefficient", self.coefficient, "a factor", least=0)
        estimator("ReferenceKL", self.estimator)
        check_flag("ReferenceKL", "corrected", self.corrected)

    def __call__(self, log_probs: Tensor, ref_log_probs: Tensor, layout: Layout) -> Tensor:
        d = log_ratio(ref_log_probs, log_probs, layout)
        penalty = estimator("ReferenceKL", self.estimator)(d)
        return self.coefficient * masked(penalty, layout.mask)


def score_centering(
    head_log_probs: Tensor,
    rollout_head_log_probs: Tensor,
    advantages: Tensor,
    *,
    cap: float = 2.0,
) -> Tensor:
    """Per-token loss that takes the mean score out of a truncated gradient.

        loss = A Σ_{v ∈ H} sg(q_v w(p_v/q_v) − α p_v) log p_v,
        w(ρ) = min(ρ, C),  α = ρ_H w(1/ρ_H),  ρ_H = (1 − Σ_H q)/(1 − Σ_H p)

    Added to −A w log π it makes the token's gradient Cov_q(A, w ∇log π): zero-mean in A whatever
    the truncation. Pass it as ``extra=`` to a :class:`PolicyLoss` with the same cap.

    Args:
        head_log_probs: "b t k", log p of the head H, the rollout's k likeliest tokens, normalised
            over the whole vocabulary; carries gradient. −inf fills short heads.
        rollout_head_log_probs: "b t k", log q of the same tokens, with the whole vocabulary's mass,
            after temperature, without top-p or top-k.
        advantages: "b t".
        cap: C of the weights it goes with.

    Returns:
        "b t", float32 or wider; 0 where a number is not finite.

    Raises:
        InputError: shapes differ, a tensor is not floating, or the cap is not positive.

    References:
        arXiv 2609.20807. Exact if the ratio is constant outside the head, so in particular where
        the head is the sampler's whole support.

    >>> p = torch.tensor([[[0.4, 0.4]]]).log()
    >>> q = torch.tensor([[[0.5, 0.3]]]).log()
    >>> score_centering(p, q, torch.ones(1, 1)).shape
    torch.Size([1, 1])
    """
    check_number("score_centering", "cap", cap, "the cap of the weights it goes with", above=0)
    given = {"head_log_probs": head_log_probs, "rollout_head_log_probs": rollout_head_log_probs,
             "advantages": advantages}
    for name, x in given.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise input_error(
                "score_centering", name, expected="a floating-point tensor", got=describe(x),
                fix="pass float32 or wider",
            )
    if head_log_probs.shape != rollout_head_log_probs.shape:
        raise input_error(
            "score_centering", "rollout_head_log_probs",
            expected=f"of shape {tuple(head_log_probs.shape)} like `head_log_probs`",
            got=describe(rollout_head_log_probs), fix="gather both at the same token ids",
        )
    if head_log_probs.shape[:-1] != advantages.shape:
        raise input_error(
            "score_centering", "advantages",
            expected=f"of shape {tuple(head_log_probs.shape[:-1])}", got=describe(advantages),
            fix="pass one advantage per token",
        )
    wide = torch.promote_types(head_log_probs.dtype, torch.float32)
    head = head_log_probs.to(wide)
    p, q = head.detach().exp(), rollout_head_log_probs.to(wide).exp()
    rest_p = (1 - p.sum(-1)).clamp(min=0)
    rest_q = (1 - q.sum(-1)).clamp(min=0)
    # ρ min(1/ρ, C) = min(1, C ρ); a full head leaves 0/0, where nothing is left to scale.
    rest = torch.where(rest_p > 0, rest_q / rest_p, 1)
    alpha = rearrange((cap * rest).clamp(max=1), "... -> ... 1")
    mean = torch.minimum(p, cap * q) - alpha * p
    coefficient = (rearrange(advantages, "... -> ... 1") * mean).detach()
    # 0, or a gradient would be NaN even where the mask leaves the token out
    known = coefficient.isfinite() & head.isfinite()
    return (torch.where(known, coefficient, 0) * torch.where(known, head, 0)).sum(-1)
