"""The long chain: thousands of tokens, and every expectation over them a finite sum.

A context is a prompt, a position and a state, OK or ERR. Some tokens of a context lead to OK and
the others to ERR; which ones, its kind says. So a policy that is evaluated on all contexts is known
on all sequences, and visits and values are recursions over positions. Policies see features of the
context, part of which are drawn anew at every step, and share their parameters between contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

OK, ERR = 0, 1
Baseline = Literal["mean", "half", "critic"]
"""What is taken from a reward: the mean of its prompt's, half of it, or what a critic expects at
each token's context."""


@dataclass(frozen=True)
class World:
    """A task on the chain. Its sequences start in OK.

    Attributes:
        length: tokens of a sequence, T.
        task: which tokens are right, a seed.
        mended: in ERR one token leads back to OK. Otherwise a mistake is for good.
        dense: every token that leads to OK earns 1/T. Otherwise 1 is earned at the end, if in OK.
        prompts: which differ in the kinds of their positions.
        vocab: tokens.
        right: tokens of a context that keep OK.
        kinds: of contexts; what is right is learnt by kind.
        nuisance: features that say nothing, drawn anew at every step.
    """

    length: int = 256
    task: int = 0
    mended: bool = False
    dense: bool = False
    prompts: int = 4
    vocab: int = 8
    right: int = 4
    kinds: int = 16
    nuisance: int = 24

    @property
    def width(self) -> int:
        """Features of a context."""
        return self.kinds + self.nuisance + 2

    @property
    def pay(self) -> float:
        """What a token that leads to OK earns by itself."""
        return 1 / self.length if self.dense else 0.0

    @cached_property
    def kind(self) -> Tensor:
        """Of each position of each prompt; int "p t"."""
        generator = torch.Generator().manual_seed(self.task)
        return torch.randint(self.kinds, (self.prompts, self.length), generator=generator)

    @cached_property
    def of_kind(self) -> Tensor:
        """Which tokens lead to OK, by state and kind; bool "s k v"."""
        generator = torch.Generator().manual_seed(self.task + 1000)
        rank = torch.rand(self.kinds, self.vocab, generator=generator).argsort(-1).argsort(-1)
        return torch.stack([rank < self.right, (rank == self.right) & self.mended])

    @cached_property
    def good(self) -> Tensor:
        """Which tokens lead to OK; bool "s p t v"."""
        return self.of_kind[:, self.kind]

    def features(self, generator: torch.Generator) -> Tensor:
        """Of all contexts, with new nuisance; "s p t f"."""
        kind = self.kind.expand(2, -1, -1)
        state = torch.tensor([OK, ERR])[:, None, None].expand_as(kind)
        return features_of(self, kind, state, generator)


WORLDS: dict[str, Callable[..., World]] = {
    "chain": World, "mended": partial(World, mended=True), "dense": partial(World, dense=True),
}
"""Worlds by name; each differs from the first in one thing."""


def features_of(
    world: World, kind: Tensor, state: Tensor, generator: torch.Generator
) -> Tensor:
    """Features of contexts of these kinds and states; "… f"."""
    nuisance = 0.5 * torch.randn(*kind.shape, world.nuisance, generator=generator)
    return torch.cat(
        [2.0 * functional.one_hot(kind, world.kinds), nuisance, functional.one_hot(state, 2)], -1
    )


def recursion(slope: Tensor, offset: Tensor, first: float) -> Tensor:
    """All x of x_{t+1} = a_t x_t + c_t, by doubling; "… t" -> "… t+1".

    >>> recursion(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0]), 1.0)
    tensor([1., 3., 9.])
    """
    a, c, shift = slope, offset, 1
    while shift < slope.shape[-1]:
        before_a = functional.pad(a[..., :-shift], (shift, 0), value=1.0)
        before_c = functional.pad(c[..., :-shift], (shift, 0))
        a, c, shift = a * before_a, a * before_c + c, 2 * shift
    return functional.pad(a * first + c, (1, 0), value=first)


class Outlook(NamedTuple):
    """What a policy does in a world.

    Attributes:
        visits: "s p t", the chance to pass each context.
        values: "s p t v", what is still to be earned after a token.
        earned: "s p t", the reward earned before a context times the chance to pass it.
        reward: "p", J.
    """

    visits: Tensor
    values: Tensor
    earned: Tensor
    reward: Tensor


class Ahead(NamedTuple):
    """What is left to be earned, and by which recursion.

    Attributes:
        keeps: "p t", how much likelier a token leads to OK from OK than from ERR.
        mends: "p t", the chance that it does from ERR.
        gain: "p t", what is to be earned by a token that leads to OK beyond one that does not.
        lost: "p t+1", what is to be earned from ERR.
        reward: "p", J.
    """

    keeps: Tensor
    mends: Tensor
    gain: Tensor
    lost: Tensor
    reward: Tensor


def ahead(world: World, probabilities: Tensor) -> Ahead:
    """Backward over the positions; float64 "s p t v"."""
    stays, mends = (probabilities * world.good).sum(-1)
    keeps, pay = stays - mends, world.pay
    more = recursion(keeps.flip(-1), pay * keeps.flip(-1), 0.0 if world.dense else 1.0).flip(-1)
    gain = pay + more[..., 1:]
    lost = functional.pad((mends * gain).flip(-1).cumsum(-1).flip(-1), (0, 1))
    return Ahead(keeps, mends, gain, lost, more[..., 0] + lost[..., 0])


def outlook(world: World, probabilities: Tensor) -> Outlook:
    """Visits forward and values backward, exact to rounding.

    Args:
        world: with its rewards.
        probabilities: float64 "s p t v".
    """
    keeps, mends, gain, lost, reward = ahead(world, probabilities)
    ok, pay = recursion(keeps, mends, 1.0), world.pay
    values = world.good * gain[..., None] + lost[..., 1:, None]
    total = functional.pad(pay * ok[..., 1:].cumsum(-1), (1, 0))
    in_ok = recursion(keeps, mends * total[..., :-1] + pay * ok[..., 1:], 0.0)
    return Outlook(
        torch.stack([ok, 1 - ok])[..., :-1], values,
        torch.stack([in_ok, total - in_ok])[..., :-1], reward,
    )


class Credit(NamedTuple):
    """Expected advantages R − b of tokens, times the chance to draw them.

    Attributes:
        positive: "s p t v", of E (R − b)₊.
        negative: "s p t v", of E (b − R)₊. Where rewards are dense the two are not told apart:
            ``positive`` is E (R − b), and this is 0.
    """

    positive: Tensor
    negative: Tensor


def credit(world: World, probabilities: Tensor, baseline: Baseline = "mean") -> Credit:
    """What a sampler with these probabilities credits each token with.

    Args:
        world: with its rewards.
        probabilities: float64 "s p t v".
        baseline: b is the sampler's J ("mean"), half of it ("half"), or the reward that it has to
            expect at the context ("critic").
    """
    seen = outlook(world, probabilities)
    chance, mean = seen.visits[..., None], seen.reward[:, None, None]
    expected = (probabilities * seen.values).sum(-1, keepdim=True)
    earned = seen.earned[..., None]
    if world.dense:
        # of the reward that a critic expects at a context, what is earned before is a part
        b = {"mean": chance * mean, "half": chance * mean / 2,
             "critic": chance * expected + earned}[baseline]
        advantage = chance * seen.values + earned - b
        return Credit(probabilities * advantage, torch.zeros_like(advantage))
    b = {"mean": mean, "half": mean / 2, "critic": expected}[baseline]
    positive = probabilities * chance * seen.values * (1 - b)
    return Credit(positive, probabilities * chance * (1 - seen.values) * b)


def divergence(world: World, rollout: Tensor, policy: Tensor) -> Tensor:
    """KL(μ‖π) of whole sequences, nats; log-probs float64 "s p t v" -> "p"."""
    chances = rollout.exp()
    each = torch.where(chances > 0, chances * (rollout - policy), 0).sum(-1)
    return (outlook(world, chances).visits * each).sum((0, 2))


class Samples(NamedTuple):
    """Sequences that were drawn.

    Attributes:
        places: int "(p n) t", where each token lies in a table "s p t v" laid out in one row.
        reward: float64 "p n".
    """

    places: Tensor
    reward: Tensor


def passed(from_ok: Tensor, from_err: Tensor) -> Tensor:
    """Whether a sequence is in OK after each token, by doubling; bool "p t n".

    Args:
        from_ok: whether the token that it would draw in OK leads to OK.
        from_err: the same of ERR.
    """
    shift = 1
    while shift < from_ok.shape[1]:
        # where the span before leads, from OK and from ERR
        ok = functional.pad(from_ok[:, :-shift], (0, 0, shift, 0), value=True)
        err = functional.pad(from_err[:, :-shift], (0, 0, shift, 0), value=False)
        from_ok, from_err = from_ok.where(ok, from_err), from_ok.where(err, from_err)
        shift *= 2
    return from_ok


def sample(
    world: World, probabilities: Tensor, answers: int, generator: torch.Generator
) -> Samples:
    """Draw ``answers`` sequences for each prompt from float64 "s p t v"."""
    p, t, v = world.prompts, world.length, world.vocab
    below = probabilities.cumsum(-1)[..., None, :-1]
    draw = torch.rand(p, t, answers, 1, generator=generator, dtype=torch.float64)
    tokens = (draw > below).sum(-1)  # in either state: s p t n
    after = passed(*world.good.gather(-1, tokens))
    ok = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)
    token = torch.where(ok, tokens[OK], tokens[ERR])
    prompt, position = torch.arange(p)[:, None, None], torch.arange(t)[:, None]
    places = (((~ok).long() * p + prompt) * t + position) * v + token
    reward = after.double().mean(1) if world.dense else after[:, -1].double()
    return Samples(places.transpose(1, 2).reshape(p * answers, t), reward)
