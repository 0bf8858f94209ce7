"""Corrections and the FP32 head next to simply switching from BF16 to FP16.

A small transformer, trained for a moment in float32 so that its distribution is not flat, samples
with a key-value cache, token by token, as an engine does; the trainer scores whole sequences at
once. Same weights, same dtype, other order of operations: the mismatch is a real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Setting, Workload, extra_memory, interleave, summary
from iscorrect import PRESETS, PolicyLoss, effective_sample_size, k3
from iscorrect.head.fused import fused_policy_loss
from iscorrect.head.linear import linear_log_probs

CORRECTIONS = ("token-is", "token-tis", "icepop", "sequence-tis", "sequence-mis", "geometric-rs")
LOSS_SCALE = 2.0**16
Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        dtype: of weights and activations.
        head: what the logits are rounded to, in engine and trainer alike.
        correction: name of a preset.
    """

    dtype: torch.dtype
    head: torch.dtype
    correction: str = "uncorrected"

    @property
    def name(self) -> str:
        kind = "BF16" if self.dtype == torch.bfloat16 else "FP16 and loss scaling"
        head = ", FP32 head" if self.head == torch.float32 else ""
        return kind + head + ("" if self.correction == "uncorrected" else f", {self.correction}")


def run(setting: Setting) -> Iterator[Workload]:
    if setting.small:
        yield on_a_chain("vocabulary-256", 256, 16, setting, steps=5)
        return
    yield on_a_chain("vocabulary-512", 512, 64, setting, steps=150)
    yield on_a_chain("vocabulary-32768", 32768, 64, setting, steps=60)


def arms() -> list[Arm]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        Arm(bf16, bf16), *(Arm(bf16, bf16, name) for name in CORRECTIONS), Arm(bf16, fp32),
        Arm(bf16, fp32, "token-tis"), Arm(bf16, fp32, "sequence-tis"), Arm(fp16, fp16),
    ]


class Transformer(nn.Module):
    def __init__(self, vocabulary: int, *, width: int = 128, layers: int = 4, length: int = 65):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states "b t d"; with a cache, of what follows on it."""
        start = cache[0][0].shape[2] if cache else 0
        at = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.embedding(ids) + self.position(at)
        for i, block in enumerate(self.blocks):
            x = block(x, cache, i)
        return functional.rms_norm(x, x.shape[-1:])


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cache: Cache | None, i: int) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(functional.rms_norm(x, (d,))).view(b, t, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            if len(cache) > i:
                k, v = torch.cat([cache[i][0], k], 2), torch.cat([cache[i][1], v], 2)
                cache[i] = (k, v)
            else:
                cache.append((k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(functional.gelu(self.up(functional.rms_norm(x, (d,)))))


def pretrain(vocabulary: int, steps: int, device: str) -> Transformer:
    """A few steps on a chain of tokens that half the time follow a fixed successor."""
    torch.manual_seed(0)
    model = Transformer(vocabulary).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    zipf = (1 / torch.arange(1, vocabulary + 1)).to(device)
    successor = torch.randperm(vocabulary, device=device)
    for _ in range(steps):
        ids = torch.multinomial(zipf, 16 * 65, replacement=True).view(16, 65)
        for t in range(1, 65):
            follow = torch.rand(16, device=device) < 0.5
            ids[:, t] = torch.where(follow, successor[ids[:, t - 1]], ids[:, t])
        hidden = model(ids[:, :-1])
        loss = -linear_log_probs(hidden, model.head.weight, ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(True)


class Rolled(NamedTuple):
    """What an engine sampled.

    Attributes:
        ids: "b t+1", from the first token on.
        log_probs: "b t", the engine's of all but the first; 0 outside the mask.
        mask: bool "b t", which of these it sampled.
    """

    ids: Tensor
    log_probs: Tensor
    mask: Tensor


Roll = Callable[[nn.Module, torch.dtype], Rolled]
"""Of a model and what its logits are rounded to."""


@torch.no_grad()
def rollout(model: Transformer, head: torch.dtype, n: int, length: int) -> Rolled:
    """n answers of a length."""
    torch.manual_seed(1)
    device = model.head.weight.device
    ids = torch.zeros(n, 1, dtype=torch.int64, device=device)
    cache: Cache = []
    found = []
    for _ in range(length):
        hidden = model(ids[:, -1:], cache)[:, 0]
        logits = hidden.float() @ model.head.weight.float().T
        log_probs = logits.to(head).float().log_softmax(-1)
        token = torch.multinomial(log_probs.exp(), 1)
        ids = torch.cat([ids, token], 1)
        found.append(log_probs.gather(-1, token))
    engine = torch.cat(found, 1)
    return Rolled(ids, engine, torch.ones_like(engine, dtype=torch.bool))


def on_a_chain(
    name: str, vocabulary: int, length: int, setting: Setting, *, steps: int
) -> Workload:
    master = pretrain(vocabulary, steps, setting.device)
    size = sum(x.numel() for x in master.parameters())
    n = 4 if setting.small else 32
    note = (
        f"A transformer of {size / 1e6:.1f} M parameters, vocabulary {vocabulary}; {n} sequences "
        f"of {length} tokens sampled in the same dtype with a key-value cache. "
    )
    return measure(name, note, master, partial(rollout, n=n, length=length), setting)


def measure(
    name: str, note: str, master: nn.Module, roll: Roll, setting: Setting
) -> Workload:
    """Every arm on a model.

    Args:
        name: of the table.
        note: what the model is and what it samples, a sentence and a space.
        master: float32; of ids "b t" gives hidden states, and has a ``head``.
        roll: samples from it in a dtype.
        setting: where it is run.
    """
    workload = Workload(
        name,
        note + "Times relative to the "
        "first row; a step is loss and backward, scoring the log-probs alone. Against engine: what "
        "trainer and engine differ by. Against float32: the trainer's log-probs, and its gradient "
        "beside the float32 model's, with token-IS weights, on the same samples.",
    )
    runs: dict[str, Callable[[], object]] = {}
    scoring: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, float | str]] = {}
    rolled: dict[tuple[torch.dtype, torch.dtype], tuple[nn.Module, Rolled]] = {}
    for arm in arms():
        if (arm.dtype, arm.head) not in rolled:
            model = copy.deepcopy(master).to(arm.dtype)
            rolled[arm.dtype, arm.head] = model, roll(model, arm.head)
        model, samples = rolled[arm.dtype, arm.head]
        ids, engine, mask = samples
        advantages = torch.randn(len(ids), generator=torch.Generator().manual_seed(2))
        advantages = advantages.to(setting.device)
        loss_fn = PolicyLoss(correction=PRESETS[arm.correction]())
        scale = LOSS_SCALE if arm.dtype == torch.float16 else 1.0

        def step(
            model=model, samples=samples, advantages=advantages, loss_fn=loss_fn, head=arm.head,
            scale=scale,
        ):
            ids, engine, mask = samples
            model.zero_grad()
            loss, _ = fused_policy_loss(
                loss_fn, hidden=model(ids[:, :-1]), weight=model.head.weight, target=ids[:, 1:],
                rollout_log_probs=engine, advantages=advantages, mask=mask, head_dtype=head,
            )
            (loss * scale).backward()

        @torch.no_grad()
        def score(model=model, ids=ids, head=arm.head):
            return linear_log_probs(
                model(ids[:, :-1]), model.head.weight, ids[:, 1:], head_dtype=head
            )

        runs[arm.name], scoring[arm.name] = step, score
        step()
        gradient = flat_gradient(model) / scale
        memory = extra_memory(step, setting.device)
        exact, oracle = oracle_of(master, samples, advantages)
        trainer = score()
        d = (trainer - engine).where(mask, 0)
        one = torch.ones_like(d[:, :1], dtype=torch.bool)
        rows[arm.name] = {
            "memory, MiB": memory if isinstance(memory, str) else memory / 2**20,
            "|Δ log p| to engine": d.abs()[mask].mean().item(),
            "k3 to engine": k3(d)[mask].mean().item(),
            "ESS": effective_sample_size(d.sum(-1, keepdim=True).exp(), one).item(),
            "|Δ log p| to float32": (trainer - exact).abs()[mask].mean().item(),
            "gradient cosine": torch.cosine_similarity(gradient, oracle, dim=0).item(),
            "gradient error": ((gradient - oracle).norm() / oracle.norm()).item(),
        }
    first = next(iter(runs))
    step_times, score_times = interleave(runs, setting), interleave(scoring, setting)
    for arm_name, row in rows.items():
        times = {
            "step": summary(step_times[arm_name], step_times[first], setting.clock)["ratio"],
            "scoring": summary(score_times[arm_name], score_times[first], setting.clock)["ratio"],
        }
        workload.add(arm_name, "torch", **times, **row)
    return workload


def oracle_of(
    master: nn.Module, samples: Rolled, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """float32 log-probs and gradient on an engine's samples."""
    ids, engine, mask = samples
    master.zero_grad()
    log_probs = linear_log_probs(master(ids[:, :-1]), master.head.weight, ids[:, 1:])
    loss, _ = PolicyLoss(correction=PRESETS["token-is"]())(
        log_probs, rollout_log_probs=engine, advantages=advantages, mask=mask
    )
    loss.backward()
    return log_probs.detach(), flat_gradient(master)


def flat_gradient(model: nn.Module) -> Tensor:
    grads = [x.grad for x in model.parameters() if x.grad is not None]
    return torch.cat([g.double().flatten() for g in grads])
