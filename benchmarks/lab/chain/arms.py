"""What is done about a mismatch: losses of the library, and what they are told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.lab.chain.world import Baseline
from iscorrect import CISPO, PRESETS, PolicyLoss, PPOClip, icepop, token_tis, uncorrected
from iscorrect.loss.correction import Correction
from iscorrect.loss.evidence import Evidence, Scope
from iscorrect.loss.objectives import Objective, Reinforce
from iscorrect.loss.ratios import at_level


@dataclass(frozen=True)
class Arm:
    """A loss, and the policy that its update ratio is taken to.

    Attributes:
        loss: of the library; it sums over tokens and averages over sequences.
        old: "omitted": none, so that weights are π/μ. "rollout": π_old, the trainer's log-probs at
            the weights that the engine sampled with. "engine": the engine's own log-probs.
        baseline: what is taken from a reward.
    """

    loss: PolicyLoss
    old: Literal["omitted", "rollout", "engine"] = "omitted"
    baseline: Baseline = "mean"

    def old_log_probs(self, rollout: Tensor, engine: Tensor) -> Tensor | None:
        """Of the three, the one that this arm passes."""
        return {"omitted": None, "rollout": rollout, "engine": engine}[self.old]


def _loss(correction: Correction, objective: Objective) -> PolicyLoss:
    return PolicyLoss(
        correction=correction, objective=objective, aggregation="seq-mean-token-sum"
    )


@dataclass(frozen=True)
class PastTruncate:
    """Token-TIS times the ratio of all tokens before, which is not let above 1.

        w_t = min(ρ_t, C) · min(Π_{s<t} ρ_s, 1)

    Attributes:
        cap: C > 0.
    """

    cap: float = 2.0
    scope: ClassVar[Scope] = "sequence"

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        so_far = at_level(evidence.log_ratio, evidence.layout, "prefix")
        return ratio.clamp(max=self.cap) * (so_far - evidence.log_ratio).clamp(max=0).exp()


CLIP = PPOClip(low=0.8, high=1.28)
"""PPO's bounds, the upper one raised as in DAPO (arXiv:2503.14476)."""

ARMS: dict[str, Arm] = {
    **{name: Arm(_loss(preset(), Reinforce())) for name, preset in PRESETS.items()},
    "ppo": Arm(_loss(uncorrected(), CLIP), "rollout"),
    "ppo-token-tis": Arm(_loss(token_tis(), CLIP), "rollout"),
    "ppo-engine": Arm(_loss(uncorrected(), CLIP), "engine"),
    "cispo": Arm(_loss(uncorrected(), CISPO()), "rollout"),
    "gspo": Arm(
        _loss(uncorrected(), PPOClip(low=1 - 3e-4, high=1 + 4e-4, level="geometric")), "rollout"
    ),
    "past-tis": Arm(_loss(Correction(bound=PastTruncate()), Reinforce())),
    **{
        f"{name}-{baseline}": Arm(_loss(preset(), Reinforce()), baseline=baseline)
        for baseline in ("critic", "half")
        for name, preset in (("uncorrected", uncorrected), ("token-tis", token_tis),
                             ("icepop", icepop))
    },
}
"""Every preset with REINFORCE on π/μ; PPO, CISPO and GSPO on the update ratio; and what may do
better: a weight of the past, and two other baselines."""

TOKEN_LOCAL = tuple(name for name, arm in ARMS.items() if arm.loss.scope == "token")
"""Arms whose weights depend on context, token and the advantage's sign alone: their expectations
are exact on the chain."""
SIGNED = ("dppo", "ppo", "ppo-token-tis", "ppo-engine")
"""Of these, the arms that treat positive and negative advantages differently."""


def slopes(arm: Arm, policy: Tensor, rollout: Tensor, engine: Tensor) -> tuple[Tensor, Tensor]:
    """−∂loss/∂log π of each token of each context, for advantages of 1 and of −1.

    Every token of every context is given to the loss as a sequence of its own.

    Args:
        arm: token-local.
        policy: log π, nats, any shape.
        rollout: log π_old at the weights of the rollout.
        engine: log μ; −inf where it never samples.
    """
    drawn = (engine > -torch.inf).reshape(1, -1, 1).expand(2, -1, 1).reshape(-1, 1)

    def twice(x: Tensor) -> Tensor:
        return x.detach().reshape(1, -1, 1).expand(2, -1, 1).reshape(-1, 1).contiguous()

    log_probs = twice(policy).requires_grad_()
    old = arm.old_log_probs(rollout, engine)
    ones = torch.ones_like(log_probs.detach()[: policy.numel()])
    loss, _ = replace(arm.loss, aggregation="sum")(
        log_probs, rollout_log_probs=twice(engine), advantages=torch.cat([ones, -ones]),
        mask=drawn, old_log_probs=None if old is None else twice(old),
    )
    (found,) = torch.autograd.grad(loss, log_probs)
    positive, negative = (-found).view(2, *policy.shape)
    return positive, negative
