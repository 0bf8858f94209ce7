"""A small transformer served by one implementation, scored by another, with faults on request.

The engine decodes token by token from a cache with fused, wide intermediate results; the trainer
scores whole sequences and rounds after every operation. Both hold the same 16-bit weights, so that
what differs between them without a fault is rounding, as on real stacks. Every fault happens where
it would happen in life: in the sampler, in the report, in the weights, or in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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
    weights: Weights, tokens: Tensor, stack: Stack, cache: list[Tensor] | None = None,
    start: int = 0,
) -> Tensor:
    """Logits "b t v" of ``tokens``; with a cache, of the tokens that it does not hold yet.

    Positions count from ``start``, which is where the cache begins.
    """
    r, inner = stack.rounded, stack.inner
    past = 0 if not cache else cache[0].shape[1]
    new = tokens[:, past:]
    at = (start + past + torch.arange(new.shape[1])) % len(weights["position"])
    x = r(weights["embed"])[new] + r(weights["position"])[at]
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


def noisy(size: float) -> Sampler:
    """Logits that are off by other amounts at every token, as of an engine's own kernels."""

    def sampler(logits: Tensor, tokens: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(tokens.shape[1])
        return logits + size * torch.randn(logits.shape, generator=g)

    return sampler


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
    later_weights: Callable[[Weights], Weights] | None = None  # of the engine from ``cut`` on
    cut: int = 0
    trainer_weights: Callable[[Weights], Weights] = lambda weights: weights
    second_weights: Callable[[Weights], Weights] | None = None  # of a second pass, log_probs
    candidates: Sampler | None = None  # None: as reported
    prompt_weights: Callable[[Weights], Weights] | None = None  # of every other prompt's cache
    prompts_affected: int = 2  # one prompt in so many has a cache of prompt_weights
    prompt: Callable[[Tensor], Tensor] = lambda prompt: prompt  # as the trainer sees it
    tokens: Callable[[Tensor], Tensor] = lambda tokens: tokens  # as the trainer sees them


def prompts_of(sequences: int, g: torch.Generator) -> Tensor:
    """A prompt for every four answers; int "b t"."""
    prompts = torch.randint(0, VOCABULARY, (-(-sequences // 4), PROMPT), generator=g)
    return prompts.repeat_interleave(4, dim=0)[:sequences]


@torch.no_grad()
def roll_out(
    scenario: Scenario, *, weights: Weights, sequences: int, length: int, seed: int
) -> LogProbDump:
    """Sample from the engine, score with the trainer; four answers to each prompt."""
    g = torch.Generator().manual_seed(seed)
    prompts = prompts_of(sequences, g)
    served = scenario.engine_weights(weights)
    tokens, cache, reported, best = prompts, [], [], []
    if scenario.prompt_weights is not None:
        fresh: list[Tensor] = []
        forward(served, tokens[:, :-1], scenario.engine, fresh)
        forward(scenario.prompt_weights(weights), tokens[:, :-1], scenario.engine, cache)
        stale = (torch.arange(sequences) // 4 % scenario.prompts_affected == 0)[:, None, None]
        cache = [torch.where(stale, a, b) for a, b in zip(cache, fresh, strict=True)]
    for t in range(length):
        if scenario.later_weights is not None and t == scenario.cut:
            served, cache = scenario.later_weights(weights), []
        logits = forward(served, tokens, scenario.engine, cache)[:, -1]
        drawn_from = scenario.sampler(logits, tokens)
        told = (scenario.report or scenario.sampler)(logits, tokens).log_softmax(-1)
        choice = torch.multinomial(drawn_from.softmax(-1), 1, generator=g)
        tokens = torch.cat([tokens, choice], dim=1)
        reported.append(told.gather(1, choice))
        listed = told if scenario.candidates is None else (
            scenario.candidates(logits, tokens[:, :-1]).log_softmax(-1)
        )
        best.append(listed.topk(4))
    seen = torch.cat([scenario.prompt(prompts), scenario.tokens(tokens[:, PROMPT:])], dim=1)
    chosen = seen[:, PROMPT:, None]

    def scored(w: Weights) -> Tensor:
        logits = forward(w, seen, scenario.trainer)[:, PROMPT - 1 : -1]
        return (logits / scenario.trainer_temperature).log_softmax(-1)

    log_p = scored(scenario.trainer_weights(weights))
    second = None
    if scenario.second_weights is not None:
        second = scored(scenario.second_weights(weights)).gather(2, chosen)[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return LogProbDump(
        rollout_log_probs=torch.cat(reported, dim=1),
        old_log_probs=log_p.gather(2, chosen)[..., 0],
        log_probs=second,
        mask=torch.ones(sequences, length, dtype=torch.bool),
        token_ids=tokens[:, PROMPT:],
        entropy=entropy,
        varentropy=(log_p.exp() * log_p.square()).sum(-1) - entropy.square(),
        group=torch.arange(sequences) // 4,
        top_k_ids=torch.stack([top.indices for top in best], dim=1),
        top_k_log_probs=torch.stack([top.values for top in best], dim=1),
    )


@torch.no_grad()
def scored_after(weights: Weights, before: Tensor, tokens: Tensor, *, start: int) -> Tensor:
    """The trainer's log-probs of tokens "b t" whose context begins with other tokens "b s"."""
    stack = Stack(torch.bfloat16, fused=False)
    cache: list[Tensor] = []
    forward(weights, before, stack, cache, start)
    both = torch.cat([before, tokens], dim=1)
    log_p = forward(weights, both, stack, cache, start).log_softmax(-1)
    return log_p[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]


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


def low_rank(rank: int, size: float) -> Callable[[Weights], Weights]:
    """Weights without an adapter: attention less a product of two thin matrices."""

    def bare(weights: Weights) -> Weights:
        g = torch.Generator().manual_seed(11)
        return {
            name: x - size * (torch.randn(len(x), rank, generator=g)
                              @ torch.randn(rank, x.shape[1], generator=g)) / math.sqrt(
                                  rank * x.shape[1])
            if name.endswith("qkv") else x for name, x in weights.items()
        }

    return bare


def stretched(known: int, factor: float) -> Callable[[Weights], Weights]:
    """Positions beyond those known pressed together, as a scaled rotary embedding does."""

    def stretch(weights: Weights) -> Weights:
        table = weights["position"]
        at = torch.arange(len(table)).float()
        at = torch.where(at < known, at, known + (at - known) / factor)
        low, part = at.long(), (at - at.floor())[:, None]
        high = (low + 1).clamp(max=len(table) - 1)
        return {**weights, "position": (1 - part) * table[low] + part * table[high]}

    return stretch


def scaled_head(factor: float) -> Callable[[Weights], Weights]:
    """Another scale of the logits in the configuration."""
    return lambda weights: {**weights, "head": factor * weights["head"]}


def attention_scaled(factor: float) -> Callable[[Weights], Weights]:
    """Queries times a factor: another attention scale in the configuration."""

    def scale(weights: Weights) -> Weights:
        rows = torch.ones(3 * WIDTH, 1)
        rows[:WIDTH] = factor
        return {n: x * rows if n.endswith("qkv") else x for n, x in weights.items()}

    return scale
