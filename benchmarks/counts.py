"""How many operations on tensors the library asks of torch; times nothing.

``python -m benchmarks counts`` prints them. On a GPU most are a kernel each: what a small batch
pays for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from iscorrect import PolicyLoss, PPOClip, fused_policy_loss, token_tis

ROWS, LENGTH, HIDDEN, VOCABULARY, CHUNK = 8, 32, 16, 64, 64


class Operations(TorchDispatchMode):
    """Counts what reaches torch's dispatcher below autograd, without views and empty tensors."""

    FREE = ("aten::view", "aten::_unsafe_view", "aten::expand", "aten::t", "aten::transpose",
            "aten::slice", "aten::select", "aten::unsqueeze", "aten::squeeze", "aten::alias",
            "aten::detach", "aten::split", "aten::as_strided", "aten::permute", "aten::unbind",
            "aten::empty", "aten::empty_like", "aten::new_empty", "aten::lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func._schema.name not in self.FREE
        return func(*args, **kwargs or {})


def operations() -> dict[str, int]:
    """The number of operations of each of the library's calls, by name."""
    torch.manual_seed(0)
    b, t = ROWS, LENGTH
    rollout = -3 * torch.rand(b, t)
    tokens = dict(
        old_log_probs=rollout + 0.05 * torch.randn(b, t), rollout_log_probs=rollout,
        advantages=torch.randn(b, 1).expand(b, t), mask=torch.arange(t) < torch.tensor([[t]] * b),
    )
    log_probs = (rollout + 0.05 * torch.randn(b, t)).requires_grad_()
    hidden = torch.randn(b, t, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    target = torch.randint(VOCABULARY, (b, t))
    loss_fn = PolicyLoss(correction=token_tis(), objective=PPOClip())

    counts = {}
    with Operations() as seen:
        loss, _ = loss_fn(log_probs, **tokens)
    counts["one loss"] = seen.count
    with Operations() as seen:
        loss.backward()
    counts["its backward"] = seen.count
    with Operations() as seen:
        loss, _ = fused_policy_loss(
            loss_fn, hidden=hidden, weight=weight, target=target, chunk_size=CHUNK, **tokens
        )
    counts[f"one fused loss of {b * t // CHUNK} chunks"] = seen.count
    for name, read in (("to_floats()", lambda m: m.to_floats()), ("dict(metrics)", dict)):
        _, metrics = loss_fn(log_probs, **tokens)
        with Operations() as seen:
            read(metrics)
        counts[name] = seen.count
    return counts


def main() -> None:
    for name, count in operations().items():
        print(f"{name:32}{count:6}")
