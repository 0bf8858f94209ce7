"""Corrected policy-gradient losses for LLM reinforcement learning, exact and readable.

The rollout engine and the trainer give different probabilities to the same token. Pass both
log-probs to a loss of this package, and the gradient is corrected for it:

>>> import torch, iscorrect
>>> log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
>>> loss, metrics = iscorrect.token_tis_loss(
...     log_probs, rollout_log_probs=torch.tensor([[-1.1, -1.9]]), advantages=torch.ones(1),
...     mask=torch.tensor([[True, True]]),
... )
>>> loss.backward()

``iscorrect.dumps`` reads dumps of a run, ``iscorrect.diagnose`` explains them, and
``iscorrect.testing`` tests losses.
"""

from iscorrect.errors import InputError
from iscorrect.fp16.audit import FP16Audit, audit_fp16
from iscorrect.fp16.scaler import fp16_scaler
from iscorrect.head.fused import fp32_head_loss, fused_policy_loss
from iscorrect.head.linear import HeadOutput, linear_log_probs
from iscorrect.head.logits import log_probs_from_logits
from iscorrect.head.support import Support
from iscorrect.layout import Layout, pad_sequences, unpad
from iscorrect.loss.advantages import group_advantages
from iscorrect.loss.aggregate import aggregate, global_normalizer
from iscorrect.loss.bounds import (
    Clip,
    ConfidenceCap,
    Ignore,
    Mask,
    ParetoSmooth,
    SignedTruncate,
    Truncate,
)
from iscorrect.loss.caps import (
    ESSCap,
    IonidesCap,
    MSEOptimalCap,
    ess_cap,
    ionides_cap,
    mse_optimal_cap,
)
from iscorrect.loss.correction import Correction, Weights
from iscorrect.loss.divergences import binary_kl, k1, k2, k3
from iscorrect.loss.evidence import Evidence
from iscorrect.loss.metrics import Metrics, effective_sample_size
from iscorrect.loss.objectives import CISPO, PPOClip, Reinforce
from iscorrect.loss.pareto import pareto_tail
from iscorrect.loss.policy_loss import (
    LossOutput,
    PolicyLoss,
    masked_is_loss,
    sequence_is_loss,
    token_tis_loss,
)
from iscorrect.loss.presets import (
    PRESETS,
    confidence_is,
    dppo,
    geometric_rs,
    icepop,
    kpop,
    off_policy_negative,
    pareto_is,
    parse,
    sequence_is,
    sequence_mis,
    sequence_tis,
    token_is,
    token_mis,
    token_tis,
    topr,
    trust_region_mask,
    uncorrected,
)
from iscorrect.loss.ratios import at_level, log_ratio, ratio
from iscorrect.loss.rules import (
    BinaryKL,
    DivergenceAbove,
    OffPolicyNegative,
    ProbabilityShift,
    RatioOutside,
    Veto,
)
from iscorrect.loss.terms import ReferenceKL, score_centering

__version__ = "0.1.0"

__all__ = [
    "CISPO",
    "PRESETS",
    "BinaryKL",
    "Clip",
    "ConfidenceCap",
    "Correction",
    "DivergenceAbove",
    "ESSCap",
    "Evidence",
    "FP16Audit",
    "HeadOutput",
    "Ignore",
    "InputError",
    "IonidesCap",
    "Layout",
    "LossOutput",
    "MSEOptimalCap",
    "Mask",
    "Metrics",
    "OffPolicyNegative",
    "PPOClip",
    "ParetoSmooth",
    "PolicyLoss",
    "ProbabilityShift",
    "RatioOutside",
    "ReferenceKL",
    "Reinforce",
    "SignedTruncate",
    "Support",
    "Truncate",
    "Veto",
    "Weights",
    "aggregate",
    "at_level",
    "audit_fp16",
    "binary_kl",
    "confidence_is",
    "dppo",
    "effective_sample_size",
    "ess_cap",
    "fp16_scaler",
    "fp32_head_loss",
    "fused_policy_loss",
    "geometric_rs",
    "global_normalizer",
    "group_advantages",
    "icepop",
    "ionides_cap",
    "k1",
    "k2",
    "k3",
    "kpop",
    "linear_log_probs",
    "log_probs_from_logits",
    "log_ratio",
    "masked_is_loss",
    "mse_optimal_cap",
    "off_policy_negative",
    "pad_sequences",
    "pareto_is",
    "pareto_tail",
    "parse",
    "ratio",
    "score_centering",
    "sequence_is",
    "sequence_is_loss",
    "sequence_mis",
    "sequence_tis",
    "token_is",
    "token_mis",
    "token_tis",
    "token_tis_loss",
    "topr",
    "trust_region_mask",
    "uncorrected",
    "unpad",
]
