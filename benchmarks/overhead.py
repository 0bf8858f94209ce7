"""The correction alone: weights, loss, gradient of the log-probs, and every metric as a float."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Setting, Workload, installed, interleave, summary
from iscorrect import PolicyLoss, PPOClip, Reinforce, token_tis

PEERS = {"verl": "verl", "TRL": "trl"}
CAP, LOW, HIGH, DUAL = 2.0, 0.8, 1.2, 3.0


class Batch(NamedTuple):
    log_probs: Tensor
    old_log_probs: Tensor | None
    rollout_log_probs: Tensor
    advantages: Tensor
    mask: Tensor


Provider = Callable[[Batch], tuple[Tensor, dict[str, float]]]


def run(setting: Setting) -> Iterator[Workload]:
    b, t = (8, 64) if setting.small else (512, 4096)
    yield measure("reinforce", make_batch(b, t, setting.device, old=False), setting)
    yield measure("ppo", make_batch(b, t, setting.device, old=True), setting)


def make_batch(b: int, t: int, device: str, *, old: bool) -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(t // 4, t, (b, 1), generator=generator)
    rollout = -3 * torch.rand(b, t, generator=generator)
    trainer = rollout + 0.05 * torch.randn(b, t, generator=generator)
    current = trainer + 0.05 * torch.randn(b, t, generator=generator) if old else trainer
    advantages = torch.randn(b, 1, generator=generator).expand(b, t).contiguous()
    mask = torch.arange(t) < lengths
    return Batch(
        current.to(device).requires_grad_(), trainer.to(device) if old else None,
        rollout.to(device), advantages.to(device), mask.to(device),
    )


def measure(name: str, batch: Batch, setting: Setting) -> Workload:
    b, t = batch.mask.shape
    share = batch.mask.float().mean().item()
    policies = "three policies, PPO clip" if batch.old_log_probs is not None else (
        "two policies, policy gradient"
    )
    workload = Workload(
        name,
        f"{b} × {t} tokens in ragged rows, {share:.0%} of them counted; {policies}, token-TIS; "
        "loss, gradient of the log-probs, and all metrics as floats. verl and TRL compute their "
        "own metrics (TRL's loss has few); all others compute the same ones.",
    )
    packages = {"iscorrect": "iscorrect", "iscorrect, torch.compile": "iscorrect"} | PEERS
    providers: dict[str, Provider] = {
        "iscorrect": ours(batch),
        "iscorrect, torch.compile": compiled(batch),
        "straightforward torch": straightforward,
    }
    if installed("verl"):
        providers["verl"] = verl(batch)
    if installed("trl") and batch.old_log_probs is not None:
        providers["TRL"] = trl(batch)
    check(providers, batch)
    runs: dict[str, Callable[[], object]] = {
        provider: lambda f=f: backward(f, batch) for provider, f in providers.items()
    }
    runs["limit: copy of the inputs"] = copy_inputs(batch)
    times = interleave(runs, setting)
    for provider, taken in times.items():
        values = summary(taken, times["iscorrect"], setting.clock)
        workload.add(provider, packages.get(provider, "torch"), **values)
    for provider, package in PEERS.items():
        if not installed(package):
            workload.add(provider, package, **{"wall, ms": "not installed"})
    return workload


def backward(provider: Provider, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    batch.log_probs.grad = None
    loss, metrics = provider(batch)
    loss.backward()
    return loss.detach(), metrics


def check(providers: dict[str, Provider], batch: Batch) -> None:
    """All compute the same loss and gradient, and, where the names agree, the same metrics."""
    expected, expected_metrics = backward(providers["iscorrect"], batch)
    assert batch.log_probs.grad is not None
    gradient = batch.log_probs.grad.clone()
    for provider in providers.values():
        loss, metrics = backward(provider, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(batch.log_probs.grad, gradient, rtol=1e-4, atol=1e-12)
        for name in metrics.keys() & expected_metrics.keys():
            assert abs(metrics[name] - expected_metrics[name]) <= 1e-3 * (
                1e-3 + abs(expected_metrics[name])
            ), name


def spec(batch: Batch) -> PolicyLoss:
    three = batch.old_log_probs is not None
    objective = PPOClip(low=LOW, high=HIGH, dual=DUAL) if three else Reinforce()
    return PolicyLoss(correction=token_tis(CAP), objective=objective)


def ours(batch: Batch) -> Provider:
    loss_fn = spec(batch)

    def provider(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = loss_fn(
            batch.log_probs, rollout_log_probs=batch.rollout_log_probs,
            advantages=batch.advantages, mask=batch.mask, old_log_probs=batch.old_log_probs,
        )
        return loss, metrics.to_floats()

    return provider


def compiled(batch: Batch) -> Provider:
    loss_fn = spec(batch)

    @torch.compile(fullgraph=True)
    def traced(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        loss, metrics = loss_fn(
            batch.log_probs, rollout_log_probs=batch.rollout_log_probs,
            advantages=batch.advantages, mask=batch.mask, old_log_probs=batch.old_log_probs,
        )
        read = metrics.as_tensors()
        names[:] = read
        return loss, torch.stack(list(read.values()))

    names: list[str] = []

    def provider(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, values = traced(batch)
        return loss, dict(zip(names, values.tolist(), strict=True))

    return provider


def straightforward(batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """What one writes by hand, without looking for speed."""
    log_probs, old, rollout, advantages, mask = batch
    trainer = log_probs.detach() if old is None else old
    n = mask.sum()

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum() / n

    d = torch.where(mask, trainer - rollout, 0.0)
    rho = d.exp()
    w = torch.where(mask, rho.clamp(max=CAP), 0.0)
    metrics = {}
    if old is None:
        per_token = -w * advantages * log_probs
    else:
        update = torch.where(mask, log_probs - old, 0.0)
        r = update.exp()
        plain, clamped = -advantages * r, -advantages * r.clamp(LOW, HIGH)
        ceiling = -DUAL * advantages
        worst = torch.maximum(plain, clamped)
        worst = torch.where(advantages < 0, torch.minimum(worst, ceiling), worst)
        per_token = w * worst
        u = update.detach()
        out = ((advantages > 0) & (r > HIGH)) | ((advantages < 0) & ((r < LOW) | (r > DUAL)))
        metrics = {
            "policy/kl_k1": mean(-u), "policy/kl_k3": mean(torch.expm1(u) - u),
            "policy/clipped": (out & mask).sum() / n,
        }
    loss = mean(per_token)
    lengths = mask.sum(1)
    sequences = (lengths > 0).sum()
    sequence_ratio = torch.where(lengths > 0, d.double().sum(1).exp(), 0.0)
    metrics |= {
        "batch/tokens": n, "batch/sequences": sequences, "batch/length": n / sequences,
        "mismatch/kl/sequence": torch.where(mask, torch.expm1(d) - d, 0.0).sum() / sequences,
        "mismatch/chi2/sequence":
            torch.where(lengths > 0, (sequence_ratio - 1).square(), 0.0).sum() / sequences,
        "mismatch/ess/sequence":
            sequence_ratio.sum().square() / (sequences * sequence_ratio.square().sum()),
        "mismatch/kl_k1": mean(-d),
        "mismatch/kl_k2": mean(d.square() / 2),
        "mismatch/kl_k3": mean(torch.expm1(d) - d),
        "mismatch/log_prob_diff/mean": mean(d.abs()),
        "mismatch/log_prob_diff/max": d.abs().max(),
        "mismatch/chi2/token": mean((rho - 1).square()),
        "is/ratio/mean": mean(rho),
        "is/ratio/min": torch.where(mask, rho, torch.inf).min(),
        "is/ratio/max": torch.where(mask, rho, 0.0).max(),
        "is/chi2": mean((rho - 1).square()),
        "is/weight/mean": w.sum() / (w > 0).sum(),
        "is/weight/max": w.max(),
        "is/kept_weight": w.sum() / n,
        "is/ess": w.sum().square() / (n * w.square().sum()),
        "is/bounded": ((w != rho) & mask).sum() / n,
        "is/rejected": 1 - ((w > 0) & mask).sum() / n,
        "is/nonfinite": (~torch.isfinite(d) & mask).sum() / n,
    }
    return loss, {name: value.item() for name, value in metrics.items()}


def verl(batch: Batch) -> Provider:
    from verl.trainer.ppo.core_algos import compute_policy_loss_reinforce, get_policy_loss_fn
    from verl.trainer.ppo.rollout_corr_helper import (
        compute_rollout_correction_and_rejection_mask,
    )
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_dynamic_bsz=False,
    )
    vanilla = get_policy_loss_fn("vanilla")
    mask = batch.mask.float()

    def provider(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        trainer = batch.old_log_probs
        found, kept, metrics = compute_rollout_correction_and_rejection_mask(
            old_log_prob=batch.log_probs.detach() if trainer is None else trainer,
            rollout_log_prob=batch.rollout_log_probs, response_mask=mask, rollout_is="token",
            rollout_is_threshold=CAP,
        )
        weights = found.batch["rollout_is_weights"]
        if trainer is None:
            loss, more = compute_policy_loss_reinforce(
                batch.rollout_log_probs, batch.log_probs, batch.advantages, kept, "token-mean",
                config, weights,
            )
        else:
            loss, more = vanilla(
                trainer, batch.log_probs, batch.advantages, kept, "token-mean", config, weights,
            )
        return loss, metrics | more

    return provider


def trl(batch: Batch) -> Provider:
    """The trainer's own loss, handed log-probs where it would run the model."""
    from collections import defaultdict
    from types import SimpleNamespace

    from trl import GRPOTrainer

    mask, entropies = batch.mask.float(), torch.zeros_like(batch.rollout_log_probs)
    logged: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=False
        ),
        args=SimpleNamespace(delta=DUAL), model=SimpleNamespace(training=True), loss_type="bnpo",
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.log_probs, entropies, None),
        _metrics=logged, beta=0.0, epsilon_low=1 - LOW, epsilon_high=HIGH - 1,
        importance_sampling_level="token", use_vllm=True, vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1, off_policy_mask_threshold=None,
        aux_loss_enabled=False, top_entropy_quantile=1.0, _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
    )
    inputs = {
        "prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0], "completion_ids": mask,
        "completion_mask": mask, "advantages": batch.advantages,
        "old_per_token_logps": batch.old_log_probs,
    }

    def provider(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        assert batch.old_log_probs is not None
        logged["train"].clear()
        difference = (batch.old_log_probs - batch.rollout_log_probs) * mask
        inputs["importance_sampling_ratio"] = difference.exp().clamp(max=CAP)
        loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
        return loss, {name: values[-1] for name, values in logged["train"].items()}

    return provider


def copy_inputs(batch: Batch) -> Callable[[], object]:
    """Read every input once and write as much: no implementation moves less."""
    tensors = [x.detach() for x in batch if x is not None]
    copies = [torch.empty_like(x) for x in tensors]

    def copy() -> None:
        for to, x in zip(copies, tensors, strict=True):
            to.copy_(x)

    return copy
