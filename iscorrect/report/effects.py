"""What corrections do to given rollouts, beside what they are worth where it can be enumerated."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import repeat
from torch import Tensor

from iscorrect.dumps import LogProbDump
from iscorrect.loss.bounds import Ignore
from iscorrect.loss.correction import Correction
from iscorrect.loss.metrics import Metrics
from iscorrect.loss.policy_loss import PolicyLoss
from iscorrect.testing import Audit, TabularPolicy, audit, mismatch
from iscorrect.text import number, percent

HEADER = ["correction", "ESS", "kept weight", "largest weight", "bounded", "rejected"]


def effects(dump: LogProbDump, corrections: Mapping[str, Correction]) -> dict[str, Metrics]:
    """The metrics of each correction on the same rollouts.

    Args:
        dump: where it holds no advantages, each sequence gets +1 or −1 at random, for corrections
            that look at the sign.
        corrections: by name.

    Returns:
        Metrics by the correction's name, in the order given.

    >>> from iscorrect import sequence_tis
    >>> from iscorrect.cli.rollouts import shipped_rollouts
    >>> dump = shipped_rollouts("sharp", "bfloat16", "bfloat16")
    >>> 0.5 < effects(dump, {"mine": sequence_tis()})["mine"]["is/ess"] < 0.9
    tensor(True)
    """
    advantages = random_signs(dump.mask) if dump.advantages is None else dump.advantages
    return {
        name: correction(
            old_log_probs=dump.old_log_probs, rollout_log_probs=dump.rollout_log_probs,
            mask=dump.mask, advantages=advantages,
        ).metrics
        for name, correction in corrections.items()
    }


def random_signs(mask: Tensor) -> Tensor:
    """+1 or −1 for each row of a mask, the same at every call; "b t".

    >>> random_signs(torch.ones(3, 1, dtype=torch.bool)).abs().tolist()
    [[1.0], [1.0], [1.0]]
    """
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(2, (len(mask),), generator=generator) - 1
    return repeat(signs.float(), "b -> b t", t=mask.shape[1])


def effect_row(name: str, correction: Correction, metrics: Metrics) -> list[str]:
    """A line of the table under :data:`HEADER`."""
    m = metrics.to_floats()
    weighs = not isinstance(correction.bound, Ignore)
    return [
        name, number(m["is/ess"]), number(m["is/kept_weight"]), number(m["is/weight/max"]),
        percent(m["is/bounded"]) if weighs else "–", percent(m["is/rejected"]),
    ]


def enumerated(correction: Correction, sigma: float, *, vocab: int = 3, length: int = 4) -> Audit:
    """Exact bias and standard deviation of a correction's gradient on a small policy.

    Args:
        correction: looks at no more than a sequence, for batches of one sequence say nothing about
            a correction that looks at many.
        sigma: root mean square of the log-ratio per token, nats.
        vocab: of the policy.
        length: tokens per sequence.

    Returns:
        The audit over all vocab^length sequences, of a loss that sums over tokens.

    >>> from iscorrect import sequence_is
    >>> enumerated(sequence_is(), 0.05).bias < 1e-12
    True
    """
    policy = TabularPolicy.random(vocab=vocab, length=length)
    rollout_policy = mismatch.noise(policy, sigma)
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(vocab**length, generator=generator, dtype=torch.float64)
    loss_fn = PolicyLoss(correction=correction, aggregation="seq-mean-token-sum")
    return audit(loss_fn, policy, rollout_policy, reward - policy.expected_reward(reward))
