"""Corrections: level × bound × rejection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from iscorrect.errors import (
    check_choice,
    check_flag,
    check_per_token,
    check_shape,
    describe,
    input_error,
    is_part,
)
from iscorrect.layout import Layout, as_layout, masked
from iscorrect.loss.bounds import Bound, Ignore
from iscorrect.loss.evidence import Evidence, Given, Scope, level_scope, scope_of, widest
from iscorrect.loss.metrics import Metrics, correction_metrics
from iscorrect.loss.ratios import Level, at_level, check_level, is_log_prob, ratio
from iscorrect.loss.rules import Rule
from iscorrect.ranks import Group, max_over

Nonfinite = Literal["drop", "neutral", "raise"]


class Weights(NamedTuple):
    """What a correction returns.

    Attributes:
        weights: "b t", float32 or wider, 0 outside ``keep``, without gradient.
        keep: bool "b t", the mask less what has weight 0.
        metrics: `mismatch/…` and `is/…`.
    """

    weights: Tensor
    keep: Tensor
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Importance weights for tokens that another policy sampled.

        w = bound(ρ_level) · Π_rules keep,  ρ = π_old/μ

    Args:
        level: whose ratio becomes the weight.
        bound: callable (ratio, evidence) -> weights; None for plain importance sampling.
        reject: callables (evidence) -> keep; a token must pass all of them.
        normalize: divide by the mean raw ratio over the batch's units, before the bound, so that a
            cap stays a cap.
        nonfinite: tokens of the mask with a log-prob that is none (NaN, ±inf, or beyond 10⁴ nats):
            "drop" gives them (at other levels their sequence, segment, or the rest of it) weight 0,
            "neutral" a ratio of 1, "raise" an error that names them, at the price of a
            synchronisation.

    Raises:
        InputError: an unknown level, or parts that are not callable; at the call: what a part
            returns has another shape, or what looks at the whole batch is given ranks that share
            sequences and not the ``batch_group``.

    >>> from iscorrect.loss.bounds import Truncate
    >>> correct = Correction(level="token", bound=Truncate(cap=2.0))
    >>> mask = torch.tensor([[True, True, False]])
    >>> old, rollout = torch.tensor([[-1.0, -1.0, 0.0]]), torch.tensor([[-1.0, -3.0, 0.0]])
    >>> correct(old_log_probs=old, rollout_log_probs=rollout, mask=mask).weights
    tensor([[1., 2., 0.]])
    """

    level: Level = "token"
    bound: Bound | None = None
    reject: tuple[Rule, ...] = ()
    normalize: bool = False
    nonfinite: Nonfinite = "drop"

    def __post_init__(self) -> None:
        check_level("Correction", self.level)
        check_choice("Correction", "nonfinite", self.nonfinite, get_args(Nonfinite))
        check_flag("Correction", "normalize", self.normalize)
        if self.bound is not None and not is_part(self.bound):
            raise input_error(
                "Correction", "bound", expected="None or a callable (ratio, evidence) -> weights",
                got=repr(self.bound), fix="pass Truncate(cap=2.0), an instance and not the class",
            )
        if isinstance(self.reject, Sequence):  # YAML has lists only
            object.__setattr__(self, "reject", tuple(self.reject))
        if not isinstance(self.reject, tuple) or not all(map(is_part, self.reject)):
            raise input_error(
                "Correction", "reject", expected="a tuple of callables (evidence) -> keep",
                got=repr(self.reject), fix="pass reject=(Veto(),), with its comma",
            )

    @property
    def scope(self) -> Scope:
        """How far the weights look: each token alone, whole sequences, or across the batch."""
        parts = [*self.reject] if self.bound is None else [self.bound, *self.reject]
        scope = widest(level_scope(self.level), *map(scope_of, parts))
        return "batch" if self.normalize else scope

    def __call__(
        self,
        *,
        old_log_probs: Tensor,
        rollout_log_probs: Tensor,
        mask: Tensor | Layout,
        advantages: Tensor | None = None,
    ) -> Weights:
        """Weights, what is kept, and metrics.

        Args:
            old_log_probs: "b t", log π_old, nats, the trainer's policy at the rollout's weights.
            rollout_log_probs: "b t", log μ, nats, as the engine reported.
            mask: bool "b t", or a layout.
            advantages: "b t", for parts that look at their sign.

        Raises:
            InputError: shapes, dtypes or devices differ; a tensor carries gradient.
        """
        layout = as_layout("Correction", mask)
        check_per_token(
            "Correction", layout.mask, optional=("advantages",), old_log_probs=old_log_probs,
            rollout_log_probs=rollout_log_probs, advantages=advantages,
        )
        given = Given(old_log_probs, rollout_log_probs, advantages)
        with torch.no_grad():
            finite = layout.mask & is_log_prob(old_log_probs) & is_log_prob(rollout_log_probs)
            weighed = self.weigh(Evidence.of(given, layout, present=layout.mask, finite=finite))
            return Weights(weighed.weights, weighed.keep, weighed.metrics())

    def weigh(self, evidence: Evidence) -> Weighed:
        """The weights alone, from evidence that is finite already.

        Args:
            evidence: at the level of tokens.
        """
        self._check_groups(evidence.layout)
        with torch.no_grad():  # as a decorator it stops torch.compile
            return self._weigh(evidence)

    def _check_groups(self, layout: Layout) -> None:
        """A sequence's unit is on one of its ranks: the others would see a batch of none."""
        if layout.sequence_group is None or layout.batch_group is not None:
            return
        if self.scope == "batch":
            raise input_error(
                "Correction", "mask", expected="a Layout with the batch_group, where ranks share"
                " sequences and the correction looks at the whole batch", got="one without",
                fix="pass Layout(..., batch_group=) with all ranks that hold the batch; to a part"
                " of your own that looks at tokens or sequences alone add scope = 'sequence'",
            )

    def _weigh(self, evidence: Evidence) -> Weighed:
        layout = evidence.layout
        if self.nonfinite == "raise":
            _raise_nonfinite(layout.mask & ~evidence.finite, layout.sequence_group)
        neutral = self.nonfinite == "neutral"
        evidence = evidence.at(self.level, neutral=neutral)
        log_ratio = at_level(evidence.log_ratio, evidence.layout, self.level)
        rho = ratio(log_ratio)
        if self.normalize:
            mean = evidence.batch_mean(rho)
            rho = rho / torch.where(mean > 0, mean, 1)
        weights = rho if self.bound is None else self.bound(rho, evidence)
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            raise input_error(
                "Correction", "bound", expected="to return weights, floats `b t`",
                got=describe(weights), fix="multiply the ratio by what is kept: torch.where",
            )
        check_shape("Correction", "bound", weights, layout.mask, "weights")
        weights = weights.to(torch.promote_types(weights.dtype, rho.dtype))
        keep = evidence.usable & weights.bool()
        if neutral:
            keep = keep & evidence.present
        for rule in self.reject:
            kept = rule(evidence)
            if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
                raise input_error(
                    "Correction", "reject", expected="to return bool `b t`, what is kept",
                    got=describe(kept), fix="return a comparison",
                )
            check_shape("Correction", "reject", kept, layout.mask, "what is kept")
            keep = keep & kept
        bounds = self.bound is not None and not isinstance(self.bound, Ignore)
        bounded = (weights - rho).bool() if bounds else None
        return Weighed(masked(weights, keep), keep, evidence, log_ratio, bounded)


class Weighed(NamedTuple):
    """Weights, and what metrics are made of.

    Attributes:
        weights: "b t", as in :class:`Weights`.
        keep: bool "b t", as in :class:`Weights`.
        evidence: at the correction's level.
        log_ratio: "b t", nats, at that level, before normalisation and bound.
        bounded: bool "b t", where the bound changed the ratio; None where there is no bound.
    """

    weights: Tensor
    keep: Tensor
    evidence: Evidence
    log_ratio: Tensor
    bounded: Tensor | None

    def metrics(self) -> Metrics:
        """What the correction saw and did."""
        return correction_metrics(
            self.evidence, log_ratio=self.log_ratio, bounded=self.bounded, weights=self.weights,
            keep=self.keep,
        )


def _raise_nonfinite(where: Tensor, group: Group) -> None:
    positions = where.nonzero().tolist()
    anywhere = positions
    if group is not None:  # a rank that raised alone would leave the others waiting
        anywhere = max_over(torch.tensor(len(positions), device=where.device), group).tolist()
    if anywhere:
        shown = ", ".join(str(tuple(p)) for p in positions[:8])
        more = f" and {len(positions) - 8} more" if len(positions) > 8 else ""
        raise input_error(
            "Correction", "old_log_probs, rollout_log_probs", expected="finite under the mask",
            got=f"NaN, ±inf, or 10⁴ nats and more at {shown or 'places of another rank'}{more}",
            fix="mask these tokens, or pass nonfinite='drop' to give them weight 0",
        )
