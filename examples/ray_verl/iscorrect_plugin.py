"""What verl imports: a correction for its driver, a policy loss for its workers."""

import iscorrect
from iscorrect.adapters.verl import install, register_loss

install(iscorrect.icepop(low=0.5, high=5.0))
register_loss("iscorrect_ppo", iscorrect.PPOClip(low=0.8, high=1.28, dual=3.0))
