"""What other frameworks' settings mean, as corrections of this library.

A run can move over without a change in numbers, and the correction then prints what it does. Where
a framework's behaviour differs from its documentation, the correction follows the behaviour and the
docstring says so.

    setting                                      correction
    TRL      token_truncate, clip_max 3          token_tis(cap=3)
    TRL      sequence_mask, clip_max 3           sequence_mis(high=3)
    verl     rollout_is token, "2.0"             token_tis(cap=2)
    verl     rollout_is token, "0.5_5.0"         icepop(low=0.5, high=5)
    verl     rollout_is sequence, "2.0"          sequence_tis(cap=2)
    verl     rollout_rs seq_mean_k1, "0.5_4"     RatioOutside(level="geometric", low=1/4, high=2)
    slime    --use-tis                           token_tis(cap=2)
    AReaL    token, clamp, upper 5               token_tis(cap=5)
    NeMo-RL  icepop, 0.5 and 5                   icepop(low=0.5, high=5), overflow dropped
    OpenRLHF token, clip, 0.5 and 5              Correction(bound=Clip(low=0.5, high=5))
    OpenRLHF token, mask, 0.5 and 5              icepop(low=0.5, high=5)
    OpenRLHF seq, mask; NeMo-RL seq-mask-tis     token_is with RatioOutside(level="geometric")
    SkyRL    tis_ratio_type token                token_tis(cap=2)
    prime-rl default, ipo                        token_is with a rule on p − q
    ms-swift sequence_truncate, 2                the truncated geometric mean

They agree on finite log-probs, with four exceptions. Ratios saturate here at e^30.5 in float32, so
an unbounded weight beyond it differs. verl's, slime's and ms-swift's statistics of a sequence, and
SkyRL's and ms-swift's weights, are held within e^±20 there; the first are here too. OpenRLHF holds
probabilities 1e-6 away from 0 and 1 for its divergences; here the binary KL does, |p − q| does not.
OpenRLHF's binary KL is often below 0 by rounding where the policies agree, and drops those tokens;
here it is at least 0, and keeps them.

For log-probs that are not finite every function but ``from_trl`` and ``from_areal`` drops the
token, where the frameworks would train on NaN.
"""

from iscorrect.adapters.areal import from_areal
from iscorrect.adapters.ms_swift import from_ms_swift
from iscorrect.adapters.nemo_rl import from_nemo_rl
from iscorrect.adapters.openrlhf import from_openrlhf
from iscorrect.adapters.prime_rl import from_prime_rl
from iscorrect.adapters.skyrl import from_skyrl
from iscorrect.adapters.slime import from_slime
from iscorrect.adapters.trl import from_trl
from iscorrect.adapters.verl import from_verl

__all__ = [
    "from_areal", "from_ms_swift", "from_nemo_rl", "from_openrlhf", "from_prime_rl", "from_skyrl",
    "from_slime", "from_trl", "from_verl",
]
