"""A small transformer served by one implementation, scored by another, with faults on request.

The engine decodes token by token from a cache with fused, wide intermediate results; the trainer
scores whole sequences and rounds after every operation. Both hold the same 16-bit weights, so that
what differs between them without a fault is rounding, as on real stacks. Every fault happens where
it would happen in life: in the sampler, in the report, in the weights, or in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iscorrect.dumps import LogProbDump

VOCABULARY, WIDTH, LAYERS, HEADS, PROMPT = 512, 128, 4, 4, 6
Weights = dict[str, Tensor]
Sampler = Callable[[Tensor, Tensor], Tensor]
"""From logits "b v" and the tokens so far "b t" to the logits that are sampled from."""


@dataclass(frozen=True)
class Stack:
    """How one side computes: what it rounds to, and whether after every operation."""

    dtype: torch.dtype
    fused: bool
    head: torch.dtype | None = None  # None: float32 logits
    experts: bool = False

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).float()

    def inner(self, x: Tensor) -> Tensor:
        return x if self.fused else self.rounded(x)


def random_weights(seed: int) -> Weights:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    weights = {
        "embed": normal(VOCABULARY, WIDTH, scale=1.0),
        "position": normal(512, WIDTH, scale=0.5),
        "head": normal(VOCABULARY, WIDTH, scale=2.6 / math.sqrt(WIDTH)),
    }
    for i in range(LAYERS):
        for name, columns, rows in (
            ("qkv", 3 * WIDTH, WIDTH), ("out", WIDTH, WIDTH), ("up", 4 * WIDTH, WIDTH),
            ("down", WIDTH, 4 * WIDTH), ("up2", 4 * WIDTH, WIDTH), ("down2", WIDTH, 4 * WIDTH),
            ("router", 1, WIDTH),
        ):
            weights[f"{i}.{name}"] = normal(columns, rows, scale=1 / math.sqrt(rows))
    return weights


def forward(
    weights: Weights, tokens: Tensor, stack: Stack, cache: list[Tensor] | None = None
) -> Tensor:
    """Logits "b t v" of ``tokens``; with a cache, of the tokens that it does not hold yet."""
    r, inner = stack.rounded, stack.inner
    past = 0 if not cache else cache[0].shape[1]
    new = tokens[:, past:]
    x = r(weights["embed"])[new] + r(weights["position"])[past : past + new.shape[1]]
    x = inner(x)
    b, t, _ = x.shape
    for i in range(LAYERS):
        w = {name: r(weights[f"{i}.{name}"]) for name in
             ("qkv", "out", "up", "down", "up2", "down2", "router")}
        h = inner(torch.nn.functional.rms_norm(x, (WIDTH,)))
        qkv = r(h @ w["qkv"].T)
        if cache is not None:
            if len(cache) <= i:
                cache.append(qkv)
            else:
                cache[i] = torch.cat([cache[i], qkv], dim=1)
            keys = cache[i]
        else:
            keys = qkv
        q = qkv[..., :WIDTH].view(b, t, HEADS, -1).transpose(1, 2)
        k, v = (
            keys[..., n * WIDTH : (n + 1) * WIDTH].view(b, past + t, HEADS, -1).transpose(1, 2)
            for n in (1, 2)
        )
        scores = inner(q @ k.transpose(2, 3) / math.sqrt(WIDTH / HEADS))
        causal = torch.ones(t, past + t, dtype=torch.bool).tril(past)
        attention = inner(scores.masked_fill(~causal, -torch.inf).softmax(-1))
        mixed = r((attention @ v).transpose(1, 2).reshape(b, t, WIDTH))
        x = inner(x + inner(mixed @ w["out"].T))
        h = r(torch.nn.functional.rms_norm(x, (WIDTH,)))
        up, down = w["up"].T, w["down"].T
        mlp = r(torch.nn.functional.gelu(inner(h @ up))) @ down
        if stack.experts:
            other = r(torch.nn.functional.gelu(inner(h @ w["up2"].T))) @ w["down2"].T
            mlp = torch.where(h @ w["router"].T > 0, mlp, other)
        x = inner(x + inner(mlp))
    logits = r(torch.nn.functional.rms_norm(x, (WIDTH,))) @ r(weights["head"]).T
    return logits if stack.head is None else logits.to(stack.head).float()


def plain(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits


def tempered(temperature: float) -> Sampler:
    return lambda logits, tokens: logits / temperature


def top_p(mass: float) -> Sampler:
    def sampler(logits: Tensor, tokens: Tensor) -> Tensor:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        return logits.masked_fill((before > mass).gather(-1, index.argsort(-1)), -torch.inf)

    return sampler


def top_k(count: int) -> Sampler:
    return lambda logits, tokens: logits.masked_fill(
        logits < logits.topk(count).values[:, -1:], -torch.inf
    )


def min_p(share: float) -> Sampler:
    return lambda logits, tokens: logits.masked_fill(
        logits < logits.amax(-1, keepdim=True) + math.log(share), -torch.inf
    )


def repetition_penalty(penalty: float) -> Sampler:
    def sampler(logits: Tensor, tokens: Tensor) -> Tensor:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, True)
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(seen, penalised, logits)

    return sampler


@dataclass(frozen=True)
class Scenario:
    """Who computes what; the defaults are a healthy BF16 stack."""

    engine: Stack = Stack(torch.bfloat16, fused=True)
    trainer: Stack = Stack(torch.bfloat16, fused=False)
    sampler: Sampler = plain
    report: Sampler | None = None  # None: what the sampler drew from
    trainer_temperature: float = 1.0
    engine_weights: Callable[[Weights], Weights] = lambda weights: weights
    prompt_weights: Callable[[Weights], Weights] | None = None  # of every other prompt's cache
    prompt: Callable[[Tensor], Tensor] = lambda prompt: prompt  # as the trainer sees it
    tokens: Callable[[Tensor], Tensor] = lambda tokens: tokens  # as the trainer sees them


@torch.no_grad()
def roll_out(
    scenario: Scenario, *, weights: Weights, sequences: int, length: int, seed: int
) -> LogProbDump:
    """Sample from the engine, score with the trainer; four answers to each prompt."""
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, VOCABULARY, (-(-sequences // 4), PROMPT), generator=g)
    prompts = prompts.repeat_interleave(4, dim=0)[:sequences]
    served = scenario.engine_weights(weights)
    tokens, cache, reported, best = prompts, [], [], []
    if scenario.prompt_weights is not None:
        fresh: list[Tensor] = []
        forward(served, tokens[:, :-1], scenario.engine, fresh)
        forward(scenario.prompt_weights(weights), tokens[:, :-1], scenario.engine, cache)
        stale = (torch.arange(sequences) // 4 % 2 == 0)[:, None, None]
        cache = [torch.where(stale, a, b) for a, b in zip(cache, fresh, strict=True)]
    for _ in range(length):
        logits = forward(served, tokens, scenario.engine, cache)[:, -1]
        drawn_from = scenario.sampler(logits, tokens)
        told = (scenario.report or scenario.sampler)(logits, tokens).log_softmax(-1)
        choice = torch.multinomial(drawn_from.softmax(-1), 1, generator=g)
        tokens = torch.cat([tokens, choice], dim=1)
        reported.append(told.gather(1, choice))
        best.append(told.topk(4))
    seen = torch.cat([scenario.prompt(prompts), scenario.tokens(tokens[:, PROMPT:])], dim=1)
    logits = forward(weights, seen, scenario.trainer)[:, PROMPT - 1 : -1]
    log_p = (logits / scenario.trainer_temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return LogProbDump(
        rollout_log_probs=torch.cat(reported, dim=1),
        old_log_probs=log_p.gather(2, seen[:, PROMPT:, None])[..., 0],
        mask=torch.ones(sequences, length, dtype=torch.bool),
        token_ids=tokens[:, PROMPT:],
        entropy=entropy,
        varentropy=(log_p.exp() * log_p.square()).sum(-1) - entropy.square(),
        group=torch.arange(sequences) // 4,
        top_k_ids=torch.stack([top.indices for top in best], dim=1),
        top_k_log_probs=torch.stack([top.values for top in best], dim=1),
    )


def updated(weights: Weights, rate: float, seed: int, steps: int = 1) -> Weights:
    """The weights after sign-gradient steps of a policy-gradient loss, as Adam's first ones are."""
    stack = Stack(torch.bfloat16, fused=False)
    for step in range(steps):
        batch = roll_out(Scenario(), weights=weights, sequences=32, length=32, seed=seed + step)
        assert batch.token_ids is not None
        leaves = {name: x.clone().requires_grad_() for name, x in weights.items()}
        g = torch.Generator().manual_seed(seed + step)
        advantages = torch.randn(32, 1, generator=g)
        with torch.enable_grad():
            log_p = forward(leaves, batch.token_ids, stack)[:, :-1].log_softmax(-1)
            chosen = log_p.gather(2, batch.token_ids[:, 1:, None])[..., 0]
            gradients = torch.autograd.grad(
                -(advantages * chosen).mean(), list(leaves.values()), allow_unused=True
            )
        weights = {
            name: x if grad is None else x - rate * grad.sign()
            for (name, x), grad in zip(weights.items(), gradients, strict=True)
        }
    return weights


def quantised(bits: int) -> Callable[[Weights], Weights]:
    """Weight rows rounded to an integer grid of their own scale."""

    def quantise(weights: Weights) -> Weights:
        levels = 2 ** (bits - 1) - 1

        def rounded(x: Tensor) -> Tensor:
            scale = x.abs().amax(-1, keepdim=True) / levels
            return (x / scale).round() * scale

        return {n: rounded(x) if n[0].isdigit() and "router" not in n else x
                for n, x in weights.items()}

    return quantise


def replaced(dump: LogProbDump, **changed: Tensor) -> LogProbDump:
    """A dump with other values in some fields."""
    return replace(dump, **changed)
