"""prime-rl: a custom loss for ``trainer.loss``, one sample at a time."""

from __future__ import annotations

from typing import Any

from iscorrect.errors import input_error
from iscorrect.layout import masked
from iscorrect.loss.policy_loss import PolicyLoss
from iscorrect.loss.specs import parse


def loss(inputs: Any, *, correction: str = "token-tis:cap=2") -> Any:
    """REINFORCE with corrected weights: ``import_path = "iscorrect.adapters.prime_rl.loss"``.

        loss = −Σ_t w_t A_t log π_t

    prime-rl has no log-probs of the trainer at the rollout's weights, so the ratio is that of the
    policy being trained; it divides the sums of all samples by the number of tokens.

    Args:
        inputs: prime-rl's ``LossInputs``, "t" each.
        correction: as on the command line, such as "icepop:low=0.5,high=5".

    Raises:
        InputError: a correction that looks beyond one sample.
    """
    from prime_rl.trainer.rl.loss import LossOutputs  # type: ignore[import-not-found]

    loss_fn = PolicyLoss(correction=parse(correction), aggregation="sum")
    if loss_fn.scope == "batch":
        raise input_error(
            "prime_rl.loss", "correction", expected="one that looks at tokens or sequences",
            got=repr(correction), fix="prime-rl shows one sample at a time; use a fixed bound",
        )
    mask, advantages = inputs.loss_mask.bool(), inputs.advantages
    if getattr(inputs, "loss_weights", None) is not None:
        advantages = masked(advantages * inputs.loss_weights, mask)
    value, metrics = loss_fn(
        inputs.trainer_logprobs, rollout_log_probs=inputs.inference_logprobs,
        advantages=advantages, mask=mask,
    )
    return LossOutputs(loss=value, metrics=metrics.as_tensors())
