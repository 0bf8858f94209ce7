"""AReaL: a loss function for ``engine.train_batch``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from iscorrect.errors import input_error
from iscorrect.layout import Layout
from iscorrect.loss import PolicyLoss


def loss_function(policy_loss: PolicyLoss) -> Callable[..., Tensor]:
    """What ``engine.train_batch`` takes as ``loss_fn``, beside AReaL's own ``loss_weight_fn``.

    The loss is the micro-batch's mean over tokens, which AReaL weights by their number.

    Args:
        policy_loss: aggregated by "token-mean" over the mask.

    Raises:
        InputError: another aggregation.
    """
    if policy_loss.aggregation != "token-mean" or policy_loss.over != "mask":
        raise input_error(
            "areal.loss_function", "policy_loss", expected="'token-mean' over the mask",
            got=f"{policy_loss.aggregation!r} over {policy_loss.over!r}",
            fix="pass aggregation='token-mean'; AReaL weights micro-batches by their tokens",
        )

    def loss_fn(
        logprobs: Tensor, entropy: Tensor, input_data: dict[str, Any], **_: Any
    ) -> Tensor:
        mask = input_data["loss_mask"].bool()
        lengths = input_data.get("cu_seqlens")
        layout = Layout(mask) if lengths is None else Layout.from_cu_seqlens(mask, lengths)
        proximal = input_data.get("prox_logp")
        return policy_loss(
            logprobs, rollout_log_probs=input_data["logprobs"], old_log_probs=proximal,
            advantages=input_data["advantages"], mask=layout,
        ).loss

    return loss_fn
