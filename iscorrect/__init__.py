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

from types import ModuleType as _Module

from iscorrect.errors import (
    InputError as InputError,
)
from iscorrect.fp16.arrival import (
    WeightArrival as WeightArrival,
    weight_arrival as weight_arrival,
)
from iscorrect.fp16.audit import (
    FP16Audit as FP16Audit,
    audit_fp16 as audit_fp16,
)
from iscorrect.fp16.masters import (
    round_after_step as round_after_step,
)
from iscorrect.fp16.scaler import (
    fp16_scaler as fp16_scaler,
)
from iscorrect.fp16.sending import (
    Sent as Sent,
    round_with_feedback as round_with_feedback,
    stochastic_round as stochastic_round,
    stochastic_round_weights as stochastic_round_weights,
)
from iscorrect.head.fused import (
    fp32_head_loss as fp32_head_loss,
    fused_policy_loss as fused_policy_loss,
)
from iscorrect.head.linear import (
    HeadOutput as HeadOutput,
    linear_log_probs as linear_log_probs,
)
from iscorrect.head.logits import (
    log_probs_from_logits as log_probs_from_logits,
)
from iscorrect.head.support import (
    Support as Support,
)
from iscorrect.layout import (
    Layout as Layout,
    pad_sequences as pad_sequences,
    unpad as unpad,
)
from iscorrect.loop.coherence import (
    Coherence as Coherence,
    GradientSketch as GradientSketch,
    coherence as coherence,
)
from iscorrect.loop.monitor import (
    Alarm as Alarm,
    Monitor as Monitor,
)
from iscorrect.loss.advantages import (
    group_advantages as group_advantages,
)
from iscorrect.loss.aggregate import (
    AGGREGATIONS as AGGREGATIONS,
    Aggregation as Aggregation,
    SequenceMeanTokenMean as SequenceMeanTokenMean,
    SequenceMeanTokenSum as SequenceMeanTokenSum,
    SequenceMeanTokenSumNorm as SequenceMeanTokenSumNorm,
    Sum as Sum,
    TokenMean as TokenMean,
    aggregate as aggregate,
    global_normalizer as global_normalizer,
)
from iscorrect.loss.bounds import (
    ByAge as ByAge,
    Clip as Clip,
    ConfidenceCap as ConfidenceCap,
    Ignore as Ignore,
    Mask as Mask,
    ParetoSmooth as ParetoSmooth,
    SignedTruncate as SignedTruncate,
    Truncate as Truncate,
)
from iscorrect.loss.caps import (
    ESSCap as ESSCap,
    IonidesCap as IonidesCap,
    MSEOptimalCap as MSEOptimalCap,
    ess_cap as ess_cap,
    ionides_cap as ionides_cap,
    mse_optimal_cap as mse_optimal_cap,
)
from iscorrect.loss.correction import (
    Correction as Correction,
    Weights as Weights,
)
from iscorrect.loss.divergences import (
    binary_kl as binary_kl,
    k1 as k1,
    k2 as k2,
    k3 as k3,
    probability_gap as probability_gap,
)
from iscorrect.loss.evidence import (
    Evidence as Evidence,
)
from iscorrect.loss.metrics import (
    Metrics as Metrics,
    effective_sample_size as effective_sample_size,
)
from iscorrect.loss.objectives import (
    ASPO as ASPO,
    CISPO as CISPO,
    GMPO as GMPO,
    OBJECTIVES as OBJECTIVES,
    SAPO as SAPO,
    VESPO as VESPO,
    PerToken as PerToken,
    PPOClip as PPOClip,
    Reinforce as Reinforce,
)
from iscorrect.loss.pareto import (
    pareto_tail as pareto_tail,
)
from iscorrect.loss.policy_loss import (
    LossOutput as LossOutput,
    PolicyLoss as PolicyLoss,
    masked_is_loss as masked_is_loss,
    sequence_is_loss as sequence_is_loss,
    token_tis_loss as token_tis_loss,
)
from iscorrect.loss.presets import (
    PRESETS as PRESETS,
    confidence_is as confidence_is,
    dppo as dppo,
    flash_reinforce as flash_reinforce,
    geometric_rs as geometric_rs,
    icepop as icepop,
    ipo as ipo,
    kpop as kpop,
    m2po as m2po,
    off_policy_negative as off_policy_negative,
    pareto_is as pareto_is,
    sequence_is as sequence_is,
    sequence_mis as sequence_mis,
    sequence_tis as sequence_tis,
    token_is as token_is,
    token_mis as token_mis,
    token_tis as token_tis,
    topr as topr,
    trust_region_mask as trust_region_mask,
    uncorrected as uncorrected,
)
from iscorrect.loss.ratios import (
    at_level as at_level,
    log_ratio as log_ratio,
    ratio as ratio,
)
from iscorrect.loss.rules import (
    AgeAbove as AgeAbove,
    BinaryKL as BinaryKL,
    DivergenceAbove as DivergenceAbove,
    OffPolicyNegative as OffPolicyNegative,
    ProbabilityShift as ProbabilityShift,
    RatioOutside as RatioOutside,
    SecondMomentAbove as SecondMomentAbove,
    Veto as Veto,
)
from iscorrect.loss.specs import (
    parse as parse,
    parse_loss as parse_loss,
    to_dict as to_dict,
    to_text as to_text,
)
from iscorrect.loss.terms import (
    ReferenceKL as ReferenceKL,
    score_centering as score_centering,
)

__version__ = "0.2.0"

__all__ = [
    name for name, value in sorted(vars().items())
    if not name.startswith("_") and not isinstance(value, _Module)
]
