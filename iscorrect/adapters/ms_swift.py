"""ms-swift: a correction in the place of its GRPO trainers' rollout weights."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from iscorrect.adapters.averages import sums
from iscorrect.adapters.bands import SAFETY, HeldRule, check_adds_up
from iscorrect.adapters.methods import around
from iscorrect.dumps import DumpWriter
from iscorrect.errors import check_choice, input_error
from iscorrect.loss.bounds import Mask, Truncate
from iscorrect.loss.correction import Correction
from iscorrect.loss.evidence import Evidence, Scope
from iscorrect.loss.rules import RatioOutside
from iscorrect.loss.specs import CorrectionConfig, parse
from iscorrect.ranks import sum_over

MODE = "rollout_importance_sampling_mode"


def install(
    correction: CorrectionConfig, trainer: Any = None, dumps: DumpWriter | None = None
) -> None:
    """Let a correction make the weights of ms-swift's GRPO trainer; for ``--external_plugins``.

    The weights multiply the loss, its KL penalty included. The trainer asks for them only with a
    ``rollout_importance_sampling_mode``, whose own weights they replace.

    Args:
        correction: or its text; must not look at advantages, which the trainer does not show, nor
            across the batch.
        trainer: ``GRPOTrainer``, which None stands for, or ``MegatronGRPOTrainer``.
        dumps: writes both log-probs of every call, counted from 0.

    Raises:
        InputError: the correction looks across the batch; when the trainer is made: no mode, or
            ``--loss_type real``, which no weight reaches; in training: no rollout log-probs, or
            none of the old policy with ``--use_liger_kernel``.
    """
    spec = parse(correction)
    check_adds_up("ms_swift.install", spec, "a micro-batch")
    if trainer is None:
        from swift.rlhf_trainers import grpo_trainer

        trainer = grpo_trainer.GRPOTrainer

    calls = itertools.count()

    def weigh(self: Any, old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
        batch = dict(old_log_probs=old.detach(), rollout_log_probs=rollout, mask=mask.bool())
        if dumps is not None:
            dumps.write(step=next(calls), **batch)
        weights, _, self._iscorrect_metrics = spec(**batch)
        return weights

    def with_log_probs(
        self: Any, old: Tensor, rollout: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        return old - rollout, weigh(self, old, rollout, mask)

    def with_log_ratio(self: Any, log_ratio: Tensor, mask: Tensor) -> Tensor:
        old, rollout = self._iscorrect_log_probs
        return weigh(self, old, rollout, mask)

    def metrics_of(self: Any, *_: Any) -> dict[str, Tensor]:
        return sums(self._iscorrect_metrics)

    def metrics_of_all(self: Any, *_: Any) -> dict[str, Tensor]:
        return _over_ranks(sums(self._iscorrect_metrics))

    def remember(self: Any, old: Tensor, rollout: Tensor, mask: Tensor) -> None:
        self._iscorrect_log_probs = old, rollout

    def check_batch(self: Any, *arguments: Any, **named: Any) -> None:
        batch = named["data"]["grpo_batch"] if "data" in named else arguments[-1]
        if batch.rollout_per_token_logps is None or self.disable_rollout_importance_sampling:
            raise input_error(
                "ms_swift", "rollout_per_token_logps", expected="the engine's log-probs",
                got="None, or a vLLM before 0.10.2", fix="set use_vllm=true with a newer vLLM",
            )

    def check_liger_batch(self: Any, *arguments: Any, **named: Any) -> None:
        check_batch(self, *arguments, **named)
        if arguments[-1].old_per_token_logps is None:
            raise input_error(
                "ms_swift", "old_per_token_logps", expected="the trainer's log-probs, which"
                " --use_liger_kernel takes from no one else", got="None",
                fix="drop --use_liger_kernel",
            )

    def check_mode(self: Any) -> None:
        if getattr(self, MODE) is None:
            raise input_error(
                "ms_swift", MODE, expected="set: without one the trainer asks for no weights",
                got="None", fix=f"pass --{MODE} token_truncate, whose weights are replaced",
            )
        if self.loss_type == "real":
            raise input_error(
                "ms_swift", "loss_type", expected="one that rollout weights multiply", got="'real',"
                " which ignores them", fix="pass another --loss_type, or drop the correction",
            )

    if hasattr(trainer, "_get_rollout_is_correction"):
        trainer._compute_is_correction_metrics = metrics_of
        trainer._get_rollout_is_correction = with_log_probs
        around(trainer, "_compute_loss_and_metrics", before=check_batch)
        around(trainer, "compute_liger_loss", before=check_liger_batch)
        around(trainer, "_prepare_algorithm_params", after=check_mode)
    else:
        trainer._compute_is_correction_metrics = metrics_of_all
        trainer._apply_rollout_importance_sampling = with_log_ratio
        around(trainer, "_compute_rollout_offpolicy_metrics", before=remember)
        around(trainer, "loss_func", before=check_batch)
        around(trainer, "_init_grpo_params", after=check_mode)


def _over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averages over the ranks, which Megatron's trainer does not take of these metrics itself."""
    from megatron.core import mpu

    group = mpu.get_data_parallel_group(with_context_parallel=True)
    total = sum_over(torch.stack(list(values.values())), group)
    return dict(zip(values, total / torch.distributed.get_world_size(group), strict=True))


@dataclasses.dataclass(frozen=True)
class HeldGeometric:
    """The geometric mean of a sequence's ratios, each held within e^±20, truncated.

    Args:
        cap: upper bound of the mean.
    """

    cap: float
    scope: ClassVar[Scope] = "sequence"

    def __call__(self, ratio: Tensor, evidence: Evidence) -> Tensor:
        held = evidence.log_ratio.clamp(-SAFETY, SAFETY)
        return evidence.layout.sequence_mean(held).exp().clamp(max=self.cap)


SwiftMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def from_ms_swift(
    rollout_importance_sampling_mode: SwiftMode = "token_truncate",
    rollout_importance_sampling_threshold: float = 2.0,
) -> Correction:
    """ms-swift's ``rollout_importance_sampling_mode`` and ``_threshold``.

    The modes have the names of TRL's and mean something else: a sequence's ratio is the geometric
    mean of token ratios held within e^±20, masks have no lower bound, and "sequence_mask" keeps
    token weights. A token's weight below 2.1e-9 or above 4.9e8 is held there by ms-swift alone.

    Args:
        rollout_importance_sampling_mode: as above.
        rollout_importance_sampling_threshold: upper bound.

    Raises:
        InputError: an unknown mode.

    References:
        swift/rlhf_trainers/grpo_trainer.py (4.6.0).

    >>> from_ms_swift("token_mask").bound
    Mask(low=0.0, high=2.0)
    """
    mode, high = rollout_importance_sampling_mode, rollout_importance_sampling_threshold
    check_choice("from_ms_swift", MODE, mode, get_args(SwiftMode))
    if mode == "token_truncate":
        return Correction(bound=Truncate(high))
    if mode == "token_mask":
        return Correction(bound=Mask(0.0, high))
    if mode == "sequence_mask":
        rule = HeldRule(RatioOutside(level="geometric", high=high))
        return Correction(reject=(rule,))
    return Correction(level="geometric", bound=HeldGeometric(high))
