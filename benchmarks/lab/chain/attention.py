"""A policy with attention behind the trainer: what is right depends on tokens it has to look up.

The chain again, with T = 64 and without its contexts: a token is right by the kind of its position
and by whether the token two places back was even, a mistake is for good, and nobody tells the
policy that it has made one. Prefixes cannot be enumerated, so J(π) is the share of right answers
among 256 samples of the policy itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.lab.chain.arms import ARMS
from benchmarks.lab.chain.baselines import Critic, beyond_half, beyond_the_mean
from benchmarks.lab.chain.engines import Engine, plain
from benchmarks.lab.chain.learner import Holder
from benchmarks.lab.chain.policy import HIDDEN, WIDTH, Parameters, normalised

BACK = 2
"""How far back the token lies that says what is right."""
EVALUATED = 64
"""Answers to each prompt that J(π) is estimated from."""


class Puzzle(NamedTuple):
    """What is asked and what is right.

    Attributes:
        kind: int "p t", of each position.
        good: bool "k 2 v", right tokens by kind and by whether the token ``BACK`` places ago, or
            the 0 before the beginning, was even (0) or odd (1).
        nuisance: features that say nothing.
    """

    kind: Tensor
    good: Tensor
    nuisance: int = 24

    @property
    def kinds(self) -> int:
        return len(self.good)

    def features(self, generator: torch.Generator) -> Tensor:
        """Of all positions, with new nuisance; "p t f"."""
        noise = 0.5 * torch.randn(*self.kind.shape, self.nuisance, generator=generator)
        return torch.cat([2.0 * functional.one_hot(self.kind, self.kinds), noise], -1)

    def rewards(self, tokens: Tensor) -> Tensor:
        """1 where every token is right; int "p n t" -> "p n"."""
        earlier = functional.pad(tokens, (BACK, 0))[..., :-BACK] % 2
        kind = self.kind[:, None].expand_as(tokens)
        return self.good[kind, earlier, tokens].all(-1).double()


def puzzle(
    task: int, *, length: int = 64, prompts: int = 4, kinds: int = 8, vocab: int = 8,
    right: int = 4,
) -> Puzzle:
    """A puzzle of this seed."""
    generator = torch.Generator().manual_seed(task)
    rank = torch.rand(kinds, 2, vocab, generator=generator).argsort(-1).argsort(-1)
    return Puzzle(torch.randint(kinds, (prompts, length), generator=generator), rank < right)


def untrained(of: Puzzle, seed: int, outputs: int | None = None) -> Parameters:
    """Weights of one layer of attention with a bias for each distance, and one of MLP.

    Args:
        of: what features and tokens there are.
        seed: of the weights.
        outputs: in the place of the vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab, length = of.good.shape[-1], of.kind.shape[-1]

    def drawn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(rows)

    return {
        "in": drawn(of.kinds + of.nuisance, WIDTH), "token": drawn(vocab, WIDTH),
        "query": drawn(WIDTH, WIDTH), "key": drawn(WIDTH, WIDTH), "value": drawn(WIDTH, WIDTH),
        "out": drawn(WIDTH, WIDTH), "distance": torch.zeros(length),
        "up": drawn(WIDTH, HIDDEN), "down": drawn(HIDDEN, WIDTH),
        "head": drawn(WIDTH, outputs or vocab),
    }


def logits(weights: Mapping[str, Tensor], features: Tensor, tokens: Tensor) -> Tensor:
    """Of every position, given the tokens before it; "b t f" and int "b t" -> "b t v"."""
    before = functional.pad(tokens, (1, 0))[..., :-1]
    x = features @ weights["in"] + weights["token"][before]
    places = torch.arange(tokens.shape[-1])
    distance = places[:, None] - places
    n = normalised(x)
    scores = (n @ weights["query"]) @ (n @ weights["key"]).mT / math.sqrt(WIDTH)
    scores = scores + weights["distance"][distance.clamp(min=0)]
    mixed = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ (n @ weights["value"])
    return _rest(weights, x + mixed @ weights["out"])


def _rest(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    x = x + functional.silu(normalised(x) @ weights["up"]) @ weights["down"]
    return normalised(x) @ weights["head"]


@torch.no_grad()
def sample(
    weights: Mapping[str, Tensor], features: Tensor, generator: torch.Generator
) -> Tensor:
    """Tokens one after the other, keys and values kept; "b t f" -> int "b t"."""
    b, length, _ = features.shape
    keys, values = (torch.zeros(b, length, WIDTH) for _ in range(2))
    embedded, tokens = features @ weights["in"], torch.zeros(b, length, dtype=torch.long)
    draws = torch.rand(b, length, generator=generator)
    last = torch.zeros(b, dtype=torch.long)
    for t in range(length):
        x = embedded[:, t] + weights["token"][last]
        n = normalised(x)
        keys[:, t], values[:, t] = n @ weights["key"], n @ weights["value"]
        scores = (keys[:, : t + 1] @ (n @ weights["query"])[..., None])[..., 0] / math.sqrt(WIDTH)
        share = (scores + weights["distance"][: t + 1].flip(0)).softmax(-1)
        mixed = (share[:, None] @ values[:, : t + 1])[:, 0]
        below = _rest(weights, x + mixed @ weights["out"]).softmax(-1).cumsum(-1)[:, :-1]
        last = (draws[:, t, None] > below).sum(-1)
        tokens[:, t] = last
    return tokens


def answers(
    of: Puzzle, weights: Mapping[str, Tensor], features: Tensor, each: int,
    generator: torch.Generator,
) -> Tensor:
    """``each`` answers to every prompt; int "p n t"."""
    p, t = of.kind.shape
    return sample(weights, features.repeat_interleave(each, 0), generator).view(p, each, t)


@cache
def at_start(task: int) -> tuple[Puzzle, Parameters]:
    """The puzzle, and a policy that solves it half the time."""
    of = puzzle(task)
    return of, warm_start(of, seed=task)


def warm_start(of: Puzzle, *, seed: int, steps: int = 800, reward: float = 0.5) -> Parameters:
    """Imitates right answers, then its logits are scaled until half of them are right."""
    generator = torch.Generator().manual_seed(seed + 1)
    weights = {name: x.requires_grad_() for name, x in untrained(of, seed).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=3e-3)
    kinds, length = of.kinds, of.kind.shape[-1]
    share = of.good.float() / of.good.sum(-1, keepdim=True)
    for step in range(steps):
        kind = torch.randint(kinds, (16, length), generator=generator)
        posed = Puzzle(kind, of.good, of.nuisance)
        tokens = torch.randint(of.good.shape[-1], (16, length), generator=generator)
        want = share[kind, functional.pad(tokens, (BACK, 0))[..., :-BACK] % 2]
        log_probs = logits(weights, posed.features(generator), tokens).log_softmax(-1)
        optimizer.zero_grad()
        (-(want * log_probs).sum(-1).mean()).backward()
        for settings in optimizer.param_groups:
            settings["lr"] = 3e-3 * (1 - step / steps) + 1e-4
        optimizer.step()
    weights = {name: x.detach() for name, x in weights.items()}

    def scaled(scale: float) -> Parameters:
        return {**weights, "head": scale * weights["head"]}

    low, high = 0.2, 8.0
    for _ in range(10):
        middle = math.sqrt(low * high)
        drawn = answers(of, scaled(middle), of.features(generator), 128, generator)
        enough = of.rewards(drawn).mean().item() >= reward
        low, high = (low, middle) if enough else (middle, high)
    return scaled(low)


def learn(
    *, task: int, lag: int, arm: str, rate: float, seed: int, steps: int, each: int, warmup: int,
    clip: float, every: int,
) -> Iterator[float]:
    """J(π) before every so many steps."""
    of, start = at_start(task)
    holder = Holder(start, Engine(plain, behind=lag), optimizer="adam", rate=rate)
    generator = torch.Generator().manual_seed(seed)
    critic = Critic(untrained(of, seed, 1), logits)
    for step in range(steps):
        stale = holder.hold()
        if step % every == 0:
            own = answers(of, holder.weights, of.features(generator), EVALUATED, generator)
            yield of.rewards(own).mean().item()
        features = of.features(generator)
        tokens = answers(of, stale, features, each, generator)
        rewards = of.rewards(tokens)
        wide, flat = features.repeat_interleave(each, 0), tokens.flatten(0, 1)
        advantages = {
            "mean": beyond_the_mean, "half": beyond_half,
            "critic": partial(critic.beyond, (wide, flat)),
        }[ARMS[arm].baseline](rewards)

        def scored(weights: Mapping[str, Tensor]) -> Tensor:
            table = logits(weights, wide, flat).double().log_softmax(-1)  # noqa: B023
            return table.gather(-1, flat[..., None])[..., 0]  # noqa: B023

        with torch.no_grad():
            engine = scored(stale)
        loss, _ = ARMS[arm].loss(
            scored(holder.weights), rollout_log_probs=engine, advantages=advantages,
            old_log_probs=ARMS[arm].old_log_probs(engine, engine),
            mask=torch.ones_like(engine, dtype=torch.bool),
        )
        holder.optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / warmup)
        holder.ascend(-loss, clip)
