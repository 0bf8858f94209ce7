"""The exact bias and variance of a loss's gradient: every batch it could be given is enumerated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from iscorrect.errors import InputError, check_choice, check_number, describe, input_error, is_part
from iscorrect.layout import masked
from iscorrect.loss.advantages import Baseline, group_advantages
from iscorrect.loss.correction import Correction
from iscorrect.testing.tabular import TabularPolicy, check_same_sequences

LossFn = Callable[..., Any]
"""Called as ``loss_fn(log_probs, *, rollout_log_probs, advantages, mask)``, all "b t", and with
``old_log_probs`` where there is an old policy; returns "", or a tuple that begins with it."""

ENUMERABLE = 1 << 16
SAMPLES = 20_000
CHUNK = 1 << 21
BLOCKS = 20
NAMES = (
    "log_probs", "rollout_log_probs", "advantages", "mask", "old_log_probs", "normalizer",
)


@dataclass(frozen=True, eq=False)
class Audit:
    """What the gradient of a loss estimates, and how well; the estimate is −∇loss on one batch.

    Attributes:
        exact: whether all batches were enumerated; otherwise they were sampled.
        outcomes: how many batches were looked at.
        batch: sequences per batch.
        target: "c v", ∇J.
        expected: "c v", E_μ[−∇loss].
        bias: ‖E_μ[−∇loss] − ∇J‖.
        relative_bias: bias / ‖∇J‖.
        cosine: between E_μ[−∇loss] and ∇J; NaN where either is 0.
        scale: of the multiple of ∇J that is nearest to E_μ[−∇loss]; 1 for an unbiased loss, 1/t for
            one that divides by a length t.
        std: root of the trace of the covariance of −∇loss on one batch.
        mean_weight: E w over tokens, w_t = −b (∂loss/∂log π_t) / A_t: what the loss multiplies
            A ∇log π by, seen from outside; for losses that sum over tokens and average over the b
            sequences this is the importance weight. Tokens with A = 0 are left out.
        second_moment: E w².
        errors: by name of a number above, its standard error; 0 where exact.
    """

    exact: bool
    outcomes: int
    batch: int
    target: Tensor = field(repr=False)
    expected: Tensor = field(repr=False)
    bias: float
    relative_bias: float
    cosine: float
    scale: float
    std: float
    mean_weight: float
    second_moment: float
    errors: Mapping[str, float]

    @property
    def ess(self) -> float:
        """(E w)² / E w²: the share of the sample that the weights leave effective."""
        return self.mean_weight**2 / self.second_moment if self.second_moment else 0.0

    def relative(self, n: int) -> dict[str, float]:
        """The numbers of a table, for the mean of n sequences in units of ‖∇J‖.

        Returns:
            bias, cosine, std, rmse (the root of bias² + std²), mean_weight, ess; and bias_error,
            the standard error of the bias, 0 where it is exact.
        """
        size = float(self.target.norm()) or math.nan  # no gradient has no units
        std = self.std * math.sqrt(self.batch / n)
        return {
            "bias": self.bias / size, "cosine": self.cosine, "std": std / size,
            "rmse": math.sqrt(self.mse(n)) / size, "mean_weight": self.mean_weight,
            "ess": self.ess, "bias_error": self.errors["bias"] / size,
        }

    def mse(self, n: int) -> float:
        """Mean squared error of the average over n sequences in batches of this size."""
        return self.bias**2 + self.std**2 * self.batch / n


def audit(
    loss_fn: LossFn,
    policy: TabularPolicy,
    rollout_policy: TabularPolicy,
    reward: Tensor,
    *,
    batch: int = 1,
    group: Baseline | None = None,
    advantages: Tensor | None = None,
    old_policy: TabularPolicy | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Audit:
    """Bias and variance of −∇loss as an estimate of ∇J, with sequences drawn from another policy.

    Args:
        loss_fn: as :data:`LossFn` says; see :func:`renamed` for one with other names. Without
            randomness of its own, unless batches are sampled.
        policy: π, the one being trained; gradients are taken in its logits.
        rollout_policy: μ, where sequences come from; the loss sees what it reports.
        reward: float64 "n", one per sequence, finite.
        batch: sequences per call of the loss. 1 is enough for losses that average over sequences
            and treat each alone; not for self-normalised weights, group baselines, or denominators
            that count tokens.
        group: how the batch's rewards become advantages (see :func:`group_advantages`), with the
            batch as one group. None: the reward is the advantage.
        advantages: float64 "c v", such as ``policy.advantages(reward)``, in place of the reward.
        old_policy: π_old, passed as ``old_log_probs``. None: the argument is not passed.
        samples: batches to sample, 20 at least. None: up to 65,536 possible batches are
            enumerated, of more 20,000 are sampled.
        seed: of the samples.

    Returns:
        Exact to rounding by enumeration; otherwise with standard errors.

    Raises:
        InputError: policies over different sequences, a reward of another shape, a group of one,
            too few samples; a loss that returns no scalar, or that draws random numbers where
            batches are enumerated.

    >>> from iscorrect import PolicyLoss, sequence_is, token_is
    >>> from iscorrect.testing import TabularPolicy, audit, mismatch
    >>> policy = TabularPolicy.random(2, 3)
    >>> rollout = mismatch.noise(policy, 0.2)
    >>> reward = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> loss_fn = PolicyLoss(correction=sequence_is(), aggregation="seq-mean-token-sum")
    >>> audit(loss_fn, policy, rollout, reward).bias < 1e-15
    True
    >>> loss_fn = PolicyLoss(correction=token_is(), aggregation="seq-mean-token-sum")
    >>> audit(loss_fn, policy, rollout, reward).relative_bias > 0.05
    True
    """
    loss_fn = checked_loss("audit", loss_fn)
    _check_policies(policy=policy, rollout_policy=rollout_policy, old_policy=old_policy)
    _check(policy, reward, batch, group, advantages, samples)
    columns = {
        "log_probs": policy.log_probs,
        "rollout_log_probs": rollout_policy.reported_log_probs,
        "advantages": repeat(reward, "n -> n t", t=policy.length)
        if advantages is None
        else policy.sequences.gather(advantages),
        "mask": policy.sequences.mask,
    }
    if old_policy is not None:
        columns["old_log_probs"] = old_policy.log_probs
    draws = _draws(rollout_policy, batch, samples, seed)
    moments = None
    numbers_per_batch = max(policy.logits.numel(), batch * policy.length)
    for part in draws.chunks(max(1, CHUNK // numbers_per_batch)):
        tensors = {name: column[part.rows] for name, column in columns.items()}
        if group is not None:
            tensors["advantages"] = _against_group(reward[part.rows], group, policy.length)
        slopes = -masked(_derivatives(loss_fn, tensors, draws.exact), tensors["mask"])
        gradients = _in_logits(slopes, part.rows, policy)
        seen = _moments(part, gradients, slopes, tensors)
        moments = seen if moments is None else moments + seen
    assert moments is not None
    target = policy.policy_gradient(reward)
    numbers = moments.total().numbers(target)
    errors = dict.fromkeys(numbers, 0.0) if draws.exact else moments.errors(target, draws.size)
    return Audit(
        exact=draws.exact, outcomes=draws.size, batch=batch, target=target,
        expected=moments.total().expected().view_as(target), errors=errors, **numbers,
    )


def renamed(loss_fn: LossFn, **names: str) -> LossFn:
    """A loss that calls its arguments by other names, as one that :func:`audit` can call.

    Args:
        loss_fn: takes all its tensors by keyword.
        names: its name for each of ``log_probs``, ``rollout_log_probs``, ``advantages``, ``mask``,
            ``old_log_probs`` and ``normalizer``; those not mentioned are not passed.

    Raises:
        InputError: a name that is none of these; or, when called, one that the caller does not
            pass.

    >>> def theirs(logp, adv, response_mask):
    ...     return -(logp * adv * response_mask).sum()
    >>> ours = renamed(theirs, log_probs="logp", advantages="adv", mask="response_mask")
    >>> one = torch.ones(1, 2)
    >>> ours(one, rollout_log_probs=one, advantages=one, mask=one.bool())
    tensor(-2.)
    """
    for ours in names:
        check_choice("renamed", "names", ours, NAMES)

    def call(log_probs: Tensor, **tensors: Tensor) -> Any:
        tensors["log_probs"] = log_probs
        for ours in names.keys() - tensors.keys():
            raise input_error(
                "renamed", ours, expected="among the arguments that are passed",
                got=", ".join(tensors), fix=f"leave out {ours}={names[ours]!r}, or pass what"
                " brings it: old_policy= of audit, or old=True of a check",
            )
        return loss_fn(**{theirs: tensors[ours] for ours, theirs in names.items()})

    return call


def checked_loss(
    caller: str, loss_fn: LossFn, argument: str = "loss_fn"
) -> Callable[..., Tensor]:
    """A loss that returns its scalar alone.

    Args:
        caller: what messages begin with.
        loss_fn: see :data:`LossFn`.
        argument: its name.

    Raises:
        InputError: it cannot be called on tensors; or, when called, it returns no scalar.
    """
    if not is_part(loss_fn) or isinstance(loss_fn, Correction):
        raise input_error(
            caller, argument, expected="a function on tensors, or a loss such as a PolicyLoss",
            got=f"the class {loss_fn.__name__}" if isinstance(loss_fn, type)
            else describe(loss_fn),
            fix="pass PolicyLoss(correction=token_tis()), or a function of your own",
        )

    def scalar(log_probs: Tensor, **tensors: Any) -> Tensor:
        result = loss_fn(log_probs, **tensors)
        first = result[0] if isinstance(result, tuple) and result else result
        if isinstance(first, Tensor) and first.ndim == 0 and first.is_floating_point():
            return first
        raise input_error(
            caller, argument,
            expected="a loss that returns a floating scalar tensor, or a tuple that begins with"
            " one",
            got=describe(result) if first is result
            else f"one that returns a tuple that begins with {describe(first)}",
            fix="return the loss as a tensor, reduced and not .item(), or (loss, metrics)",
        )

    return scalar


class _Draws(NamedTuple):
    """Batches of sequences with the chance of each."""

    rows: Tensor  # int "k b"
    chances: Tensor  # "k"
    blocks: Tensor  # int "k", for the jackknife
    exact: bool

    @property
    def size(self) -> int:
        return len(self.rows)

    def chunks(self, size: int) -> Iterator[_Draws]:
        for start in range(0, self.size, size):
            part = slice(start, start + size)
            yield _Draws(self.rows[part], self.chances[part], self.blocks[part], self.exact)


def _draws(policy: TabularPolicy, batch: int, samples: int | None, seed: int) -> _Draws:
    # A sequence that is never drawn has no gradient to average, and its log-probs may be -inf.
    support = policy.probabilities.nonzero().squeeze(-1)
    size = len(support) ** batch
    if samples is None and size <= ENUMERABLE:
        rows = torch.cartesian_prod(*[support] * batch).view(size, batch)
        return _Draws(rows, policy.probabilities[rows].prod(-1), torch.zeros(size).long(), True)
    size = SAMPLES if samples is None else samples
    rows = rearrange(policy.sample(size * batch, seed=seed), "(k b) -> k b", b=batch)
    chances = torch.full((size,), 1 / size, dtype=torch.float64)
    return _Draws(rows, chances, torch.arange(size) % BLOCKS, False)


def _derivatives(
    loss_fn: Callable[..., Tensor], tensors: Mapping[str, Tensor], exact: bool
) -> Tensor:
    """∂loss/∂log π of each batch; tensors "k b t" -> "k b t"."""
    names = [name for name in tensors if name != "log_probs"]

    def loss(log_probs: Tensor, *others: Tensor) -> Tensor:
        return loss_fn(log_probs, **dict(zip(names, others, strict=True)))

    columns = [tensors[name] for name in ("log_probs", *names)]
    try:  # on copies, for a loss may change its inputs
        derivatives: Tensor = torch.func.vmap(torch.func.grad(loss))(*[x.clone() for x in columns])
        return derivatives
    except RuntimeError as error:
        if exact and "random operation" in str(error):
            raise _random() from error
    # Losses that read values, as with `.item()`, cannot be batched.
    rows = zip(*[x.clone() for x in columns], strict=True)
    before = torch.get_rng_state()
    derivatives = torch.stack([_derivative(loss, *row) for row in rows])
    if exact and not torch.equal(before, torch.get_rng_state()):
        raise _random()
    return derivatives


def _random() -> InputError:
    return input_error(
        "audit", "loss_fn", expected="without randomness of its own where batches are enumerated",
        got="one that draws random numbers",
        fix="turn its dropout or noise off, or pass samples=20_000 to audit",
    )


def _derivative(loss: Callable[..., Tensor], log_probs: Tensor, *others: Tensor) -> Tensor:
    leaf = log_probs.clone().requires_grad_()
    value = loss(leaf, *others)
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(value, leaf, materialize_grads=True)[0]


def _in_logits(slopes: Tensor, rows: Tensor, policy: TabularPolicy) -> Tensor:
    """Derivatives in log-probs "k b t" as derivatives in the policy's logits "k (c v)"."""
    contexts, vocab = policy.logits.shape
    tokens = policy.sequences.contexts * vocab + policy.sequences.tokens
    table = slopes.new_zeros(len(rows), contexts * vocab)
    table.scatter_add_(1, rearrange(tokens[rows], "k b t -> k (b t)"), slopes.flatten(1))
    table = rearrange(table, "k (c v) -> k c v", v=vocab)
    # ∂ log π(a|c) / ∂ z(c, v) = 1{v = a} − π(v|c)
    table = table - table.sum(-1, keepdim=True) * policy.table.exp()
    return rearrange(table, "k c v -> k (c v)")


def _against_group(rewards: Tensor, group: Baseline, length: int) -> Tensor:
    k, b = rewards.shape
    ids = repeat(torch.arange(k), "k -> (k b)", b=b)
    advantages = group_advantages(rewards.flatten(), ids, estimator=group)
    return repeat(advantages, "(k b) -> k b t", b=b, t=length)


@dataclass(frozen=True)
class _Moments:
    """Sums over batches, each times the chance of its batch, apart for each block."""

    chance: Tensor  # "j"
    gradient: Tensor  # "j g"
    gradient_squared: Tensor  # "j"
    tokens: Tensor  # "j"
    weight: Tensor  # "j"
    weight_squared: Tensor  # "j"

    def _each(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(*[a + b for a, b in zip(self._each(), other._each(), strict=True)])

    def total(self) -> _Moments:
        return _Moments(*[x.sum(0) for x in self._each()])

    def without(self, block: int) -> _Moments:
        return _Moments(*[x.sum(0) - x[block] for x in self._each()])

    def expected(self) -> Tensor:
        return self.gradient / self.chance

    def numbers(self, target: Tensor) -> dict[str, float]:
        mean, target = self.expected(), target.flatten()
        bias = (mean - target).norm()
        variance = self.gradient_squared / self.chance - mean.square().sum()
        numbers = {
            "bias": bias,
            "relative_bias": bias / target.norm(),
            "cosine": mean @ target / (mean.norm() * target.norm()),
            "scale": mean @ target / target.square().sum(),
            "std": variance.clamp(min=0).sqrt(),
            "mean_weight": self.weight / self.tokens,
            "second_moment": self.weight_squared / self.tokens,
        }
        return {name: float(number) for name, number in numbers.items()}

    def errors(self, target: Tensor, size: int) -> dict[str, float]:
        """Standard errors by the jackknife over blocks.

        Those of the bias are the root mean square of the sampling error of its vector: where the
        true bias is 0, the estimated one is about as large.
        """
        without = [self.without(block).numbers(target) for block in range(BLOCKS)]
        numbers = torch.tensor([list(x.values()) for x in without], dtype=torch.float64)
        spread = numbers.var(0, correction=0) * (BLOCKS - 1)
        errors: dict[str, float] = dict(zip(without[0], spread.sqrt().tolist(), strict=True))
        errors["bias"] = self.total().numbers(target)["std"] / size**0.5
        errors["relative_bias"] = float(errors["bias"] / target.norm())  # NaN where it is 0
        return errors


def _moments(
    draws: _Draws, gradients: Tensor, slopes: Tensor, tensors: Mapping[str, Tensor]
) -> _Moments:
    advantages = tensors["advantages"]
    seen = tensors["mask"] & (advantages != 0)
    weights = masked(slopes.shape[1] * slopes / torch.where(seen, advantages, 1), seen)

    def summed(x: Tensor) -> Tensor:
        sums = x.new_zeros(1 if draws.exact else BLOCKS, *x.shape[1:])
        return sums.index_add(0, draws.blocks, einsum(draws.chances, x, "k, k ... -> k ..."))

    return _Moments(
        chance=summed(torch.ones_like(draws.chances)),
        gradient=summed(gradients),
        gradient_squared=summed(gradients.square().sum(-1)),
        tokens=summed(seen.sum((1, 2)).double()),
        weight=summed(weights.sum((1, 2))),
        weight_squared=summed(weights.square().sum((1, 2))),
    )


def _check_policies(**policies: TabularPolicy | None) -> None:
    for name, policy in policies.items():
        optional = name == "old_policy"
        if not isinstance(policy, TabularPolicy) and not (policy is None and optional):
            raise input_error(
                "audit", name, expected="a TabularPolicy" + (", or None" if optional else ""),
                got=describe(policy), fix="pass TabularPolicy(logits, length)",
            )
    check_same_sequences("audit", *[policy for policy in policies.values() if policy is not None])


def _check(
    policy: TabularPolicy,
    reward: Tensor,
    batch: int,
    group: Baseline | None,
    advantages: Tensor | None,
    samples: int | None,
) -> None:
    shape = policy.probabilities.shape
    if not _is_shaped(reward, shape) or reward.dtype != torch.float64:
        raise input_error(
            "audit", "reward", expected=f"float64 {tuple(shape)}",
            got=describe(reward), fix="give every row of policy.sequences a reward",
        )
    check_number(
        "audit", "batch", batch, "at least 2 for a group", least=1 if group is None else 2,
        whole=True, fix="pass batch=2",
    )
    check_number(
        "audit", "samples", samples, "how many are drawn", least=BLOCKS, whole=True, optional=True,
        fix="pass samples=20_000, or None to enumerate what can be enumerated",
    )
    if advantages is not None and (
        group is not None or not _is_shaped(advantages, policy.logits.shape)
    ):
        raise input_error(
            "audit", "advantages",
            expected=f"`c v` {tuple(policy.logits.shape)}, and None where there is a group",
            got=describe(advantages), fix="pass policy.advantages(reward), or group alone",
        )
    _check_finite("reward", reward)
    _check_finite("advantages", advantages)


def _is_shaped(x: object, shape: torch.Size) -> bool:
    return isinstance(x, Tensor) and x.shape == shape


def _check_finite(name: str, x: Tensor | None) -> None:
    if x is None or x.isfinite().all():
        return
    where = (~x.isfinite()).nonzero()[0].tolist()
    raise input_error(
        "audit", name, expected="finite", got=f"{float(x[tuple(where)])} at {where}",
        fix="give a finite number to every sequence, those that are never drawn too",
    )
