"""Policies small enough to enumerate: every sequence and its probability, gradients exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.errors import describe, input_error
from iscorrect.layout import masked

ENUMERABLE = 1 << 20


class Sequences(NamedTuple):
    """Every sequence of a vocabulary up to a length, one per row, the shorter ones padded.

    Attributes:
        tokens: int "n t", 0 in the padding.
        contexts: int "n t", the row of the logits that each token was drawn from.
        mask: bool "n t".
        seen: bool "c v", which tokens the prefix of each context holds.
    """

    tokens: Tensor
    contexts: Tensor
    mask: Tensor
    seen: Tensor

    def gather(self, table: Tensor) -> Tensor:
        """What a table "c v" says of each token; "n t", 0 in the padding."""
        return masked(table[self.contexts, self.tokens], self.mask)

    def scatter(self, values: Tensor) -> Tensor:
        """Sum of "n t" over all the places where a token follows a context; "c v"."""
        flat = self.contexts * self.seen.shape[1] + self.tokens
        table = values.new_zeros(self.seen.numel())
        table.index_add_(0, flat.flatten(), masked(values, self.mask).flatten())
        return table.view(self.seen.shape)


@cache
def sequences(vocab: int, length: int, eos: int | None = None) -> Sequences:
    """Every sequence of up to ``length`` tokens, and the contexts that they pass.

    Args:
        vocab: number of tokens.
        length: after so many tokens a sequence ends by itself.
        eos: a token that ends it before; None: all sequences have the full length.

    Returns:
        Contexts are numbered by length and then in the order of tokens; context 0 is empty.

    Raises:
        InputError: there are too many of them, or none.

    >>> sequences(2, 2, eos=1).tokens
    tensor([[1, 0],
            [0, 0],
            [0, 1]])
    """
    if vocab < 1 or length < 1 or vocab**length > ENUMERABLE:
        raise input_error(
            "sequences", "vocab, length",
            expected=f"such that 1 <= vocab ** length <= {ENUMERABLE}", got=f"{vocab} ** {length}",
            fix="choose a smaller vocabulary or length",
        )
    if eos is not None and not 0 <= eos < vocab:
        raise input_error(
            "sequences", "eos", expected=f"None or a token id in [0, {vocab})", got=repr(eos),
            fix=f"pass eos={vocab - 1}",
        )
    contexts: dict[tuple[int, ...], int] = {}
    complete: list[tuple[int, ...]] = []
    prefixes: list[tuple[int, ...]] = [()]
    for _ in range(length):
        longer: list[tuple[int, ...]] = []
        for prefix in prefixes:
            contexts[prefix] = len(contexts)
            for token in range(vocab):
                done = token == eos or len(prefix) == length - 1
                (complete if done else longer).append((*prefix, token))
        prefixes = longer

    def padded(values: list[int]) -> list[int]:
        return values + [0] * (length - len(values))

    seen = torch.zeros(len(contexts), vocab, dtype=torch.bool)
    for prefix, index in contexts.items():
        seen[index, list(prefix)] = True
    return Sequences(
        torch.tensor([padded(list(y)) for y in complete]),
        torch.tensor([padded([contexts[y[:t]] for t in range(len(y))]) for y in complete]),
        torch.tensor([padded([1] * len(y)) for y in complete]).bool(),
        seen,
    )


@dataclass(frozen=True, eq=False)
class TabularPolicy:
    """An autoregressive softmax policy with one row of logits for each prefix.

        π(y) = Π_t softmax(logits[y_{<t}])[y_t]

    All expectations over its sequences are finite sums, taken in float64.

    Args:
        logits: float64 "c v"; −inf excludes a token. See :func:`sequences` for the contexts c.
        length: after so many tokens a sequence ends by itself.
        eos: a token that ends it before.
        reported: float64 "c v", the log-probs that it tells others, nats. None: those it samples
            from.

    Raises:
        InputError: the tables are not float64, or have another number of rows than the contexts.

    >>> policy = TabularPolicy(torch.zeros(3, 2, dtype=torch.float64), length=2)
    >>> policy.probabilities
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    >>> policy.policy_gradient(torch.tensor([1.0, 1.0, 0.0, 0.0]).double())
    tensor([[ 0.2500, -0.2500],
            [ 0.0000,  0.0000],
            [ 0.0000,  0.0000]], dtype=torch.float64)
    """

    logits: Tensor
    length: int
    eos: int | None = None
    reported: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logits.ndim != 2:
            raise input_error(
                "TabularPolicy", "logits", expected="`c v`", got=describe(self.logits),
                fix="pass one row of logits for each prefix, or use TabularPolicy.random",
            )
        shape = tuple(self.sequences.seen.shape)
        for name, table in {"logits": self.logits, "reported": self.reported}.items():
            if table is not None and (table.dtype != torch.float64 or tuple(table.shape) != shape):
                raise input_error(
                    "TabularPolicy", name, expected=f"float64 {shape}, one row for each prefix",
                    got=describe(table), fix="count the contexts of sequences(vocab, length, eos)",
                )

    @classmethod
    def random(
        cls, vocab: int, length: int, *, eos: int | None = None, scale: float = 1.0, seed: int = 0
    ) -> TabularPolicy:
        """A policy with normally distributed logits.

        Args:
            vocab: number of tokens.
            length: of the longest sequence.
            eos: a token that ends a sequence.
            scale: standard deviation of the logits; 0 makes the policy uniform.
            seed: of the draw.

        >>> TabularPolicy.random(3, 5).logits.numel()
        363
        """
        shape = sequences(vocab, length, eos).seen.shape
        generator = torch.Generator().manual_seed(seed)
        logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return cls(logits, length, eos)

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.logits.shape[1]

    @property
    def sequences(self) -> Sequences:
        """All sequences, n of them, whatever their probability."""
        return sequences(self.vocab, self.length, self.eos)

    @cached_property
    def table(self) -> Tensor:
        """Log-probs that it samples from, nats; "c v"."""
        return self.logits.log_softmax(-1)

    @property
    def log_probs(self) -> Tensor:
        """Log-prob of each token of each sequence; "n t", 0 in the padding."""
        return self.sequences.gather(self.table)

    @property
    def reported_log_probs(self) -> Tensor:
        """What it reports of each token; "n t", 0 in the padding."""
        return self.sequences.gather(self.table if self.reported is None else self.reported)

    @cached_property
    def probabilities(self) -> Tensor:
        """Probability of each sequence; "n", sums to 1."""
        return self.log_probs.sum(-1).exp()

    def visits(self) -> Tensor:
        """Probability that a sequence passes each context; "c"."""
        n_t = rearrange(self.probabilities, "n -> n 1").expand(self.sequences.mask.shape)
        return self.sequences.scatter(n_t).sum(-1)

    def expected_reward(self, reward: Tensor) -> Tensor:
        """J = Σ_y π(y) R(y); "".

        Args:
            reward: "n".
        """
        return self.probabilities @ reward

    def action_values(self, reward: Tensor) -> Tensor:
        """Q(c, v) = E[R | context c, then token v]; "c v".

        Args:
            reward: "n".
        """
        until_end = self.log_probs.flip(-1).cumsum(-1).flip(-1)
        rest = torch.cat([until_end[:, 1:], torch.zeros_like(until_end[:, :1])], dim=-1)
        return self.sequences.scatter(rest.exp() * rearrange(reward, "n -> n 1"))

    def advantages(self, reward: Tensor) -> Tensor:
        """A(c, v) = Q(c, v) − Σ_v π(v|c) Q(c, v); "c v".

        Args:
            reward: "n".
        """
        values = self.action_values(reward)
        return values - (self.table.exp() * values).sum(-1, keepdim=True)

    def policy_gradient(self, reward: Tensor) -> Tensor:
        """∇J in the logits; "c v".

            ∂J/∂z(c, v) = d(c) π(v|c) A(c, v),  d(c): the probability of passing c

        Args:
            reward: "n".
        """
        visits = rearrange(self.visits(), "c -> c 1")
        return visits * self.table.exp() * self.advantages(reward)

    def sample(self, size: int, *, seed: int = 0) -> Tensor:
        """Rows of :attr:`sequences`, drawn from the policy; int "size"."""
        generator = torch.Generator().manual_seed(seed)
        return torch.multinomial(self.probabilities, size, replacement=True, generator=generator)


def kl(p: TabularPolicy, q: TabularPolicy) -> Tensor:
    """KL(p‖q) over whole sequences, nats; "", inf where q excludes what p allows.

    >>> policy = TabularPolicy.random(2, 3)
    >>> kl(policy, policy)
    tensor(0., dtype=torch.float64)
    """
    check_same_sequences("kl", p, q)
    log_ratio = p.log_probs.sum(-1) - q.log_probs.sum(-1)
    return torch.where(p.probabilities > 0, p.probabilities * log_ratio, 0).sum()


def chi2(p: TabularPolicy, q: TabularPolicy) -> Tensor:
    """χ²(p‖q) = E_q[(p/q)²] − 1 over whole sequences; "", inf where q excludes what p allows.

    >>> policy = TabularPolicy.random(2, 3)
    >>> chi2(policy, policy)
    tensor(0., dtype=torch.float64)
    """
    check_same_sequences("chi2", p, q)
    difference = p.probabilities - q.probabilities
    return torch.where(difference == 0, 0, difference.square() / q.probabilities).sum()


def total_variation(p: TabularPolicy, q: TabularPolicy) -> Tensor:
    """TV(p, q) = ½ Σ |p − q| over whole sequences; "" in [0, 1].

    >>> policy = TabularPolicy.random(2, 3)
    >>> total_variation(policy, policy)
    tensor(0., dtype=torch.float64)
    """
    check_same_sequences("total_variation", p, q)
    return (p.probabilities - q.probabilities).abs().sum() / 2


def check_same_sequences(caller: str, *policies: TabularPolicy) -> None:
    """Raise unless the policies have their vocabulary, length and end of sequence in common."""
    shapes = [(p.vocab, p.length, p.eos) for p in policies]
    if len(set(shapes)) > 1:
        raise input_error(
            caller, "policies", expected="over the same sequences",
            got=" and ".join(f"vocab={v}, length={t}, eos={e}" for v, t, e in shapes),
            fix="make one from the other with iscorrect.testing.mismatch",
        )
