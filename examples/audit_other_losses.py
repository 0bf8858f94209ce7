"""What the losses of TRL and verl estimate, exactly, as installed.

Their own code runs on every batch of two sequences that a small engine can draw. "Same as" names
the loss of this package that has the same expected gradient to ten digits. The reward stands in
for the advantage, and the gradient is that of the first update after a rollout: π_old = π. A token
mean divides by the length of what was drawn, so its scale is not 1; the cosine tells the
direction.

verl: `compute_rollout_correction_and_rejection_mask` and the policy losses of `core_algos`.
TRL: `GRPOTrainer._compute_loss` on a stand-in for the trainer. TRL computes its importance weights
inside the method that also generates, which cannot be called alone; the two lines that do so are
written here again, from `GRPOConfig`'s defaults.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from iscorrect import PolicyLoss, PPOClip, parse
from iscorrect.testing import Audit, TabularPolicy, audit, mismatch
from iscorrect.testing.audit import LossFn

POLICY = TabularPolicy.random(3, 3, eos=0)
ENGINE = mismatch.noise(POLICY, 0.3)
REWARD = torch.linspace(-1, 1, len(POLICY.probabilities), dtype=torch.float64).roll(4)
BATCH = 2

CORRECTIONS = [
    "uncorrected", "token-is", "token-tis", "token-tis:cap=3", "icepop", "token-mis",
    "sequence-is", "sequence-tis", "sequence-tis:cap=3", "sequence-mis",
    "sequence-mis:low=0.5,high=2", "geometric-rs:low=0.7,high=1.1",
    f"geometric-rs:low={1 / 1.1:.16g},high={1 / 0.7:.16g}",
]
AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


def audited(loss_fn: LossFn) -> Audit:
    """The audit of a loss on the setting of this example."""
    return audit(loss_fn, POLICY, ENGINE, REWARD, batch=BATCH)


def ours() -> Iterator[tuple[str, Audit]]:
    """The losses of this package to compare with, by what they are called in the table."""
    for aggregation in AGGREGATIONS:
        for over in ("mask", "kept"):
            for text in CORRECTIONS:
                loss_fn = PolicyLoss(
                    correction=parse(text), aggregation=aggregation, over=over, objective=PPOClip()
                )
                name = f"{text}, {aggregation}" + (" over kept" if over == "kept" else "")
                yield name, audited(loss_fn)

    def two_policies(log_probs: Tensor, *, rollout_log_probs: Tensor, **others: Tensor) -> Any:
        return PolicyLoss(objective=PPOClip(dual=3.0))(
            log_probs, rollout_log_probs=rollout_log_probs, old_log_probs=rollout_log_probs,
            **others,
        )

    yield "PPO with π_old = μ, token-mean", audited(two_policies)


def verl_losses() -> Iterator[tuple[str, LossFn]]:
    """verl's policy loss under several of its rollout corrections."""
    from verl.trainer.config.algorithm import RolloutCorrectionConfig
    from verl.trainer.ppo.core_algos import (
        compute_policy_loss_reinforce,
        compute_policy_loss_vanilla,
    )
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
    from verl.workers.config.actor import ActorConfig

    actor = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)

    def loss(config: Any) -> LossFn:
        def loss_fn(
            log_probs: Tensor, *, rollout_log_probs: Tensor, advantages: Tensor, mask: Tensor
        ) -> Tensor:
            old = rollout_log_probs if config.bypass_mode else log_probs.detach()
            weights, kept, _ = compute_rollout_correction_and_rejection_mask(
                log_probs.detach(), rollout_log_probs, mask.to(log_probs.dtype),
                rollout_is=config.rollout_is, rollout_is_threshold=config.rollout_is_threshold,
                rollout_is_batch_normalize=config.rollout_is_batch_normalize,
                rollout_rs=config.rollout_rs, rollout_rs_threshold=config.rollout_rs_threshold,
            )
            policy_loss = (
                compute_policy_loss_reinforce if config.loss_type == "reinforce"
                else compute_policy_loss_vanilla
            )
            value: Tensor = policy_loss(
                old, log_probs, advantages, kept, loss_agg_mode=actor.loss_agg_mode, config=actor,
                rollout_is_weights=None if weights is None else weights.batch["rollout_is_weights"],
            )[0]
            return value

        return loss_fn

    presets = RolloutCorrectionConfig
    yield "shipped YAML (no correction)", loss(presets.disabled())
    yield "RolloutCorrectionConfig()", loss(presets())
    yield "decoupled_token_is()", loss(presets.decoupled_token_is())
    yield "decoupled_token_icepop()", loss(presets.decoupled_token_icepop())
    yield "decoupled_seq_is_rs()", loss(presets.decoupled_seq_is_rs())
    yield "decoupled_geo_rs('0.7_1.1')", loss(presets.decoupled_geo_rs("0.7_1.1"))
    yield "bypass_ppo_clip()", loss(presets.bypass_ppo_clip())
    yield "bypass_pg_is()", loss(presets.bypass_pg_is())


def trl_losses() -> Iterator[tuple[str, LossFn]]:
    """TRL's GRPO loss with its default importance weights, and with its other modes."""
    from trl import GRPOConfig, GRPOTrainer

    defaults = {
        field.name: field.default for field in dataclasses.fields(GRPOConfig)
        if field.default is not dataclasses.MISSING
    }

    def loss(**changes: Any) -> LossFn:
        args = SimpleNamespace(**defaults | {"steps_per_generation": 1} | changes)

        def loss_fn(
            log_probs: Tensor, *, rollout_log_probs: Tensor, advantages: Tensor, mask: Tensor
        ) -> Tensor:
            counted = mask.to(log_probs.dtype)
            inputs = {
                "prompt_ids": torch.zeros(len(mask), 1), "prompt_mask": torch.ones(len(mask), 1),
                "completion_ids": torch.zeros_like(mask, dtype=torch.int64),
                "completion_mask": counted, "advantages": advantages[:, 0],
                "old_per_token_logps": log_probs.detach(), "num_items_in_batch": counted.sum(),
                "importance_sampling_ratio": _trl_ratio(
                    (log_probs.detach() - rollout_log_probs) * counted, args
                ),
            }
            value: Tensor = GRPOTrainer._compute_loss(
                _trl_trainer(args, log_probs), SimpleNamespace(training=True), inputs
            )
            return value

        return loss_fn

    yield f"{defaults['loss_type']}, {defaults['vllm_importance_sampling_mode']} (defaults)", loss()
    for mode in ("sequence_truncate", "token_mask", "token_truncate"):
        yield f"{defaults['loss_type']}, {mode}", loss(vllm_importance_sampling_mode=mode)
    yield "grpo, sequence_mask", loss(loss_type="grpo")


def _trl_ratio(log_ratio: Tensor, args: SimpleNamespace) -> Tensor:
    level, bound = args.vllm_importance_sampling_mode.split("_")
    ratio = (log_ratio.sum(-1, keepdim=True) if level == "sequence" else log_ratio).exp()
    cap = args.vllm_importance_sampling_clip_max
    return ratio.clamp(max=cap) if bound == "truncate" else ratio.masked_fill(ratio > cap, 0)


def _trl_trainer(args: SimpleNamespace, log_probs: Tensor) -> SimpleNamespace:
    """What `_compute_loss` looks at, with log-probs in place of a model."""

    def unchanged(x: Tensor, **_: Any) -> Tensor:
        return x

    changes = {
        "args": args, "use_vllm": True, "aux_loss_enabled": False, "_entropy_bonus_enabled": False,
        "model": SimpleNamespace(training=True), "entropy_coef": 0.0,
        "epsilon_low": args.epsilon, "epsilon_high": args.epsilon_high or args.epsilon,
        "current_gradient_accumulation_steps": 1,
        "accelerator": SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=unchanged, reduce=unchanged
        ),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (
            log_probs, torch.zeros_like(log_probs), None
        ),
    }
    return SimpleNamespace(**vars(args) | changes)


def main() -> None:
    """Print a table for each framework that is installed."""
    known = list(ours())
    print("In units of ‖∇J‖, on one batch; scale is that of the nearest multiple of ∇J.")
    for framework, losses in {"verl": verl_losses, "trl": trl_losses}.items():
        try:
            print(f"\n{framework} {importlib.metadata.version(framework)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"\n{framework} is not installed")
            continue
        print(f"{'loss':38}{'bias':>7}{'scale':>7}{'cosine':>8}{'std':>7}  same as")
        for name, loss_fn in losses():
            found = audited(loss_fn)
            same = [
                other for other, theirs in known
                if (found.expected - theirs.expected).norm() <= 1e-10 * theirs.expected.norm()
            ]
            norm = float(found.target.norm())
            print(
                f"{name:38}{found.relative_bias:7.3f}{found.scale:7.3f}{found.cosine:8.4f}"
                f"{found.std / norm:7.2f}  {same[0] if same else '–'}"
            )


if __name__ == "__main__":
    main()
