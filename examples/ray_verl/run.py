"""verl's worker function under Ray, on CPUs: two workers' shares of a loss against the whole."""

import os
import sys
from pathlib import Path

import ray
import torch
from tensordict import TensorDict

WORKERS = 2
HERE = Path(__file__).parent


def make_batch(rows: int = 8, width: int = 32) -> TensorDict:
    """What verl has of a batch after rollout and recomputation, and the policy being trained."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(rows, width, generator=generator)

    rollout = -normal().abs() - 0.05
    old = (rollout + 0.3 * normal()).clamp(max=-1e-3)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    return TensorDict({
        "rollout_log_probs": rollout,
        "old_log_probs": old,
        "log_probs": (old + 0.2 * normal()).clamp(max=-1e-3),
        "advantages": normal()[:, :1].expand(rows, width).contiguous(),
        "response_mask": (torch.arange(width) < lengths).float(),
    }, batch_size=rows)


def actor_loss(batch: TensorDict, tokens: float, workers: int) -> tuple[float, torch.Tensor]:
    """What verl's actor does with a mini-batch: its registered loss, with the global count."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_dynamic_bsz=False
    )
    config.global_batch_info.update(
        dp_size=workers, batch_num_tokens=tokens, global_batch_size=None, loss_scale_factor=None
    )
    log_probs = batch["log_probs"].clone().requires_grad_()
    loss, _ = get_policy_loss_fn("iscorrect_ppo")(
        old_log_prob=batch["old_log_probs"], log_prob=log_probs, advantages=batch["advantages"],
        response_mask=batch["response_mask"], loss_agg_mode="token-mean", config=config,
        rollout_is_weights=batch["rollout_is_weights"],
    )
    loss.backward()
    return loss.item(), log_probs.grad


def main() -> None:
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "iscorrect_plugin"
    sys.path.insert(0, str(HERE))
    import iscorrect_plugin  # noqa: F401
    from verl import DataProto
    from verl.trainer.ppo import rollout_corr_helper

    batch, metrics = rollout_corr_helper.compute_rollout_correction_and_add_to_batch(
        DataProto(batch=make_batch()), {}
    )
    batch = batch.batch
    tokens = batch["response_mask"].sum().item()
    loss, gradient = actor_loss(batch, tokens, 1)

    paths = os.pathsep.join([str(HERE), *sys.path])
    ray.init(
        num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, runtime_env={
            "env_vars": {"PYTHONPATH": paths, "VERL_USE_EXTERNAL_MODULES": "iscorrect_plugin"}
        },
    )
    worker = ray.remote(actor_loss)
    shares = ray.get([worker.remote(part, tokens, WORKERS) for part in batch.chunk(WORKERS)])
    ray.shutdown()
    # verl multiplies by the number of ranks, over which gradients are averaged
    together = sum(share for share, _ in shares) / WORKERS
    gradients = torch.cat([share for _, share in shares]) / WORKERS
    print(f"loss of the whole batch {loss:+.7f}, of {WORKERS} workers together {together:+.7f}")
    print(f"largest difference of a gradient {(gradients - gradient).abs().max():.1e}")
    print(f"rejected {metrics['is/rejected']:.3f}, ESS {metrics['is/ess']:.3f}")


if __name__ == "__main__":
    main()
