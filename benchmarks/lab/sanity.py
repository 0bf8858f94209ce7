"""The sanity test: a task whose every prompt is within reach, learnt in each precision and method.

After arXiv:2510.26788: a method that is right reaches 100 % on these prompts, so what keeps it from
there, or makes it fall, is the method.
"""

from __future__ import annotations

from benchmarks.lab.policy import Precision
from benchmarks.lab.reinforce import Arm
from iscorrect import (
    CISPO,
    Correction,
    PolicyLoss,
    PPOClip,
    sequence_is,
    sequence_mis,
    sequence_tis,
    token_mis,
    token_tis,
    uncorrected,
)
from iscorrect.loss.objectives import Objective

LOW, HIGH = 0.8, 1.28
"""PPO's bounds on the ratio, the upper one raised as in DAPO (arXiv:2503.14476)."""


def arms(longest: int) -> list[Arm]:
    """The arms; ``longest`` is the token budget that losses are divided by (Dr.GRPO)."""

    def arm(
        name: str, dtype: str, correction: Correction, *,
        objective: Objective | None = None, fp32_head: bool = False,
    ) -> Arm:
        loss = PolicyLoss(
            correction=correction, objective=objective or PPOClip(low=LOW, high=HIGH),
            aggregation="seq-mean-token-sum-norm", horizon=longest,
        )
        return Arm(name, Precision(dtype, fp32_head=fp32_head), loss)

    return [
        arm("bf16", "bf16", uncorrected()),
        arm("bf16-token-tis", "bf16", token_tis()),
        arm("bf16-token-mis", "bf16", token_mis()),
        arm("bf16-sequence-tis", "bf16", sequence_tis()),
        arm("bf16-sequence-mis", "bf16", sequence_mis()),
        arm("bf16-cispo", "bf16", uncorrected(), objective=CISPO()),
        arm("bf16-gspo", "bf16", uncorrected(),
            objective=PPOClip(low=1 - 3e-4, high=1 + 4e-4, level="geometric")),
        arm("bf16-fp32-head", "bf16", uncorrected(), fp32_head=True),
        arm("fp16", "fp16", uncorrected()),
        arm("fp16-sequence-is", "fp16", sequence_is()),
        arm("fp32", "fp32", uncorrected()),
    ]
