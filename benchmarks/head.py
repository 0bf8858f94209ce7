"""How exact the log-probs and gradients of each head are, against float64 of the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Setting, Workload
from iscorrect.head.linear import linear_log_probs


def run(setting: Setting) -> Iterator[Workload]:
    n, v, d = (32, 509, 64) if setting.small else (128, 4099, 256)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield measure(dtype, n, v, d, setting)


def measure(dtype: torch.dtype, n: int, v: int, d: int, setting: Setting) -> Workload:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).to(setting.device)
    weight = (torch.randn(v, d, generator=generator) / 8).to(dtype).to(setting.device)
    target = torch.randint(v, (n,), generator=generator).to(setting.device)
    coefficient = torch.randn(n, generator=generator, dtype=torch.float64).to(setting.device)
    name = str(dtype).removeprefix("torch.")
    workload = Workload(
        name,
        f"{n} tokens, vocabulary {v}, width {d}, {name} hidden states and weights: largest error "
        "of a log-prob in nats, and relative errors of the two gradients, "
        "against float64 of the same "
        "inputs.",
    )

    def outcome(log_probs: peers.LogProbs, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        found = log_probs(leaves[0], leaves[1], target)
        (found * coefficient).sum().backward()
        return found.detach().double(), [x.grad.double() for x in leaves if x.grad is not None]

    exact, exact_grads = outcome(exactly, hidden.double(), weight.double())
    providers: dict[str, peers.LogProbs] = {
        "iscorrect, float32 head": linear_log_probs,
        f"iscorrect, {name} head": partial(linear_log_probs, head_dtype=dtype),
    }
    missing = {}
    for provider in peers.PACKAGES:
        try:
            providers[provider] = peers.load(provider, setting.device)
        except peers.UnavailableError as why:
            missing[provider] = str(why)
    for provider, log_probs in providers.items():
        package = peers.PACKAGES.get(provider, "iscorrect")
        try:
            found, grads = outcome(log_probs, hidden, weight)
        except Exception as error:  # whatever a peer raises is what there is to tell
            workload.add(provider, package, **{"log-prob error": f"fails: {type(error).__name__}"})
            continue
        errors = [
            ((a - b).norm() / b.norm()).item() for a, b in zip(grads, exact_grads, strict=True)
        ]
        workload.add(
            provider, package, **{
                "log-prob error": (found - exact).abs().max().item(),
                "∂ hidden": errors[0], "∂ weight": errors[1],
            },
        )
    for provider, why in missing.items():
        workload.add(provider, peers.PACKAGES[provider], **{"log-prob error": why})
    return workload


def exactly(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
