"""For SkyRL: call ``register_corrections`` before training; then

    trainer.algorithm.policy_loss_type=iscorrect
"""

from iscorrect import PolicyLoss, PPOClip, token_tis
from iscorrect.adapters.skyrl import register


def register_corrections() -> None:
    loss = PolicyLoss(
        correction=token_tis(cap=2.0), objective=PPOClip(low=0.8, high=1.28), aggregation="sum"
    )
    register("iscorrect", loss)
