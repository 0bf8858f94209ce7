"""Loaded by verl: VERL_USE_EXTERNAL_MODULES=verl_corrections, with this directory on the path.

    python -m verl.trainer.main_ppo ... \
        actor_rollout_ref.rollout.calculate_log_probs=true \
        algorithm.rollout_correction.rollout_is=null \
        algorithm.rollout_correction.rollout_rs=null \
        actor_rollout_ref.actor.policy_loss.loss_mode=iscorrect_ppo
"""

from iscorrect import PPOClip, token_tis
from iscorrect.adapters.verl import install, register_loss

install(token_tis(cap=2.0))
register_loss("iscorrect_ppo", PPOClip(low=0.8, high=1.28, dual=3.0))
