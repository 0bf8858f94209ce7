"""Tests of policy-gradient losses: exact bias and variance, strategies, and ready checks.

:func:`audit` enumerates what a loss estimates on a :class:`TabularPolicy` and an engine that
differs from it by a :mod:`mismatch`. ``iscorrect.testing.checks`` and
``iscorrect.testing.strategies`` need hypothesis and are imported by their own names.

>>> from iscorrect import PolicyLoss, sequence_is
>>> from iscorrect.testing import TabularPolicy, audit, mismatch
>>> policy = TabularPolicy.random(vocab=3, length=3)
>>> reward = policy.sequences.tokens.sum(-1).double()
>>> loss_fn = PolicyLoss(correction=sequence_is(), aggregation="seq-mean-token-sum")
>>> audit(loss_fn, policy, mismatch.noise(policy, 0.2), reward).relative_bias < 1e-12
True
"""

from iscorrect.testing import mismatch
from iscorrect.testing.audit import Audit, audit, renamed
from iscorrect.testing.tabular import (
    Sequences,
    TabularPolicy,
    chi2,
    kl,
    sequences,
    total_variation,
)

__all__ = [
    "Audit",
    "Sequences",
    "TabularPolicy",
    "audit",
    "chi2",
    "kl",
    "mismatch",
    "renamed",
    "sequences",
    "total_variation",
]
