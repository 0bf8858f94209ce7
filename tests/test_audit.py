"""The audit against sums written out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import dropout

from iscorrect import (
    PRESETS,
    InputError,
    PolicyLoss,
    group_advantages,
    sequence_is,
    token_is,
    token_tis,
    uncorrected,
)
from iscorrect.testing import TabularPolicy, audit, chi2, mismatch, renamed


@pytest.fixture
def policy():
    return TabularPolicy.random(3, 3, eos=0)


@pytest.fixture
def engine(policy):
    return mismatch.noise(policy, 0.3)


@pytest.fixture
def reward(policy):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(len(policy.probabilities), generator=generator, dtype=torch.float64)


def loss_of(correction, aggregation="seq-mean-token-sum"):
    return PolicyLoss(correction=correction, aggregation=aggregation)


def gradient_of(loss_fn, policy, engine, rows, advantages):
    """-∇loss in the logits by autograd through log_softmax, for one batch."""
    logits = policy.logits.clone().requires_grad_()
    live = TabularPolicy(logits, policy.length, policy.eos)
    mask = policy.sequences.mask[rows]
    loss = loss_fn(
        live.log_probs[rows], rollout_log_probs=engine.reported_log_probs[rows],
        advantages=advantages[:, None].expand(mask.shape), mask=mask,
    )
    loss = loss[0] if isinstance(loss, tuple) else loss
    return -torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum"])
def test_enumeration_of_single_sequences_is_the_sum_by_hand(
    policy, engine, reward, name, aggregation
):
    loss_fn = loss_of(PRESETS[name](), aggregation)
    found = audit(loss_fn, policy, engine, reward)
    chances = engine.probabilities
    gradients = torch.stack([
        gradient_of(loss_fn, policy, engine, [i], reward[[i]]) for i in range(len(chances))
    ])
    mean = torch.einsum("n,ncv->cv", chances, gradients)
    variance = torch.einsum("n,ncv->", chances, (gradients - mean).square())
    torch.testing.assert_close(found.expected, mean, atol=1e-14, rtol=1e-10)
    assert found.std**2 == pytest.approx(variance.item(), rel=1e-9, abs=1e-14)
    target = policy.policy_gradient(reward)
    bias = (mean - target).norm().item()
    assert found.bias == pytest.approx(bias, abs=1e-14)
    assert found.relative_bias == pytest.approx(bias / target.norm().item(), abs=1e-13)
    if mean.any():
        cosine = torch.nn.functional.cosine_similarity(mean.flatten(), target.flatten(), dim=0)
        assert found.cosine == pytest.approx(cosine.item())
    assert found.exact
    assert set(found.errors.values()) == {0.0}


@pytest.mark.parametrize("group", [None, "grpo", "dr-grpo", "rloo"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_enumeration_of_whole_batches_is_the_sum_by_hand(group, aggregation):
    policy = TabularPolicy.random(2, 2, eos=1)
    engine = mismatch.noise(policy, 0.2)
    reward = torch.tensor([0.1, 0.9, 0.4]).double()
    loss_fn = loss_of(token_tis(1.1), aggregation)
    found = audit(loss_fn, policy, engine, reward, batch=3, group=group)
    mean = torch.zeros_like(policy.logits)
    square = 0.0
    for rows in itertools.product(range(3), repeat=3):
        advantages = reward[list(rows)]
        if group is not None:
            ids = torch.zeros(3, dtype=torch.int64)
            advantages = group_advantages(advantages, ids, estimator=group)
        chance = engine.probabilities[list(rows)].prod()
        gradient = gradient_of(loss_fn, policy, engine, list(rows), advantages)
        mean += chance * gradient
        square += chance * gradient.square().sum()
    torch.testing.assert_close(found.expected, mean, atol=1e-15, rtol=1e-12)
    assert found.std**2 == pytest.approx((square - mean.square().sum()).item())
    assert found.outcomes == 27


def test_mse_is_squared_bias_plus_variance_of_the_average(policy, engine, reward):
    loss_fn = loss_of(token_tis(1.1))
    one = audit(loss_fn, policy, engine, reward)
    two = audit(loss_fn, policy, engine, reward, batch=2)
    # A loss that averages over sequences has on two of them the same bias and half the variance.
    assert two.bias == pytest.approx(one.bias)
    assert two.std**2 == pytest.approx(one.std**2 / 2)
    assert two.mse(64) == pytest.approx(one.mse(64))
    assert one.mse(64) == pytest.approx(one.bias**2 + one.std**2 / 64)


@pytest.mark.slow
def test_sampling_agrees_with_enumeration_within_its_standard_errors(policy, engine, reward):
    loss_fn = loss_of(token_tis(1.1))
    exact = audit(loss_fn, policy, engine, reward, batch=2, group="rloo")
    sampled = audit(loss_fn, policy, engine, reward, batch=2, group="rloo", samples=20_000)
    assert not sampled.exact
    assert sampled.outcomes == 20_000
    for name, error in sampled.errors.items():
        assert 0 < error < 0.1 * max(1, abs(getattr(exact, name)))
        assert abs(getattr(sampled, name) - getattr(exact, name)) < 5 * error
    assert (sampled.expected - exact.expected).norm() < 5 * sampled.errors["bias"]


@pytest.mark.slow
def test_too_many_batches_are_sampled(policy, engine, reward):
    assert len(policy.probabilities) ** 6 > 1 << 16
    assert not audit(loss_of(token_is()), policy, engine, reward, batch=6, samples=None).exact


def test_weights_are_seen_from_outside():
    policy = TabularPolicy.random(3, 3)
    engine = mismatch.noise(policy, 0.3)
    reward = policy.sequences.tokens.sum(-1).double() + 1
    found = audit(loss_of(sequence_is()), policy, engine, reward)
    assert found.mean_weight == pytest.approx(1)
    assert found.second_moment == pytest.approx(1 + chi2(policy, engine).item())
    assert found.ess == pytest.approx(1 / (1 + chi2(policy, engine).item()))
    assert audit(loss_of(uncorrected()), policy, engine, reward).ess == pytest.approx(1)


def test_losses_that_read_values_are_audited_all_the_same(policy, engine, reward):
    loss_fn = loss_of(token_tis(1.1))

    def reading(log_probs, **tensors):
        loss = loss_fn(log_probs, **tensors).loss
        return loss if loss.item() < 1e9 else 0 * loss

    a, b = (audit(f, policy, engine, reward) for f in (loss_fn, reading))
    torch.testing.assert_close(a.expected, b.expected)
    assert a.std == pytest.approx(b.std)


def test_a_loss_without_gradient_estimates_nothing(policy, engine, reward):
    found = audit(lambda log_probs, **_: (log_probs.detach().sum(),), policy, engine, reward)
    assert found.bias == pytest.approx(policy.policy_gradient(reward).norm().item())
    assert found.std == 0
    assert found.ess == 0


def test_sequences_that_are_never_drawn_are_never_shown(policy, reward):
    engine = mismatch.top_k(policy, 1)
    shown = []

    def loss_fn(log_probs, *, rollout_log_probs, mask, **_):
        shown.append(rollout_log_probs.detach())
        return (log_probs * mask).sum() + 0 * log_probs.sum().item()

    audit(loss_fn, policy, engine, reward)
    assert all(x.isfinite().all() for x in shown[1:])


def test_renamed_passes_what_is_named_and_nothing_else(policy, engine, reward):
    def theirs(*, new, behaviour, returns, response_mask):
        ratio = (new.detach() - behaviour).exp()
        return -(ratio * new * returns * response_mask).sum(-1).mean()

    ours = renamed(
        theirs, log_probs="new", rollout_log_probs="behaviour", advantages="returns",
        mask="response_mask",
    )
    a = audit(ours, policy, engine, reward)
    b = audit(loss_of(token_is()), policy, engine, reward)
    torch.testing.assert_close(a.expected, b.expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reward": torch.zeros(3)}, ("audit", "`reward`", "float64 (15,)", "float32 (3,)")),
        ({"batch": 0}, ("audit", "`batch`", "got 0")),
        ({"samples": 3}, ("audit", "`samples`", ">= 20", "got 3")),
        ({"group": "rloo"}, ("audit", "`batch`", "at least 2", "got 1")),
        ({"advantages": torch.zeros(2)}, ("audit", "`advantages`", "`c v`", "(2,)")),
        ({"policy": TabularPolicy.random(3, 2)}, ("audit", "`policies`", "length=2")),
        ({"reward": [0.0] * 15}, ("audit", "`reward`", "float64 (15,)", "got list")),
        ({"reward": torch.full((15,), math.nan).double()}, ("`reward`", "finite", "nan at [0]")),
        ({"batch": 2.0}, ("audit", "`batch`", "a whole number", "got 2.0")),
        ({"batch": "2"}, ("audit", "`batch`", "got '2'")),
        ({"samples": 1e3}, ("audit", "`samples`", "a whole number", "got 1000.0")),
        ({"policy": torch.zeros(7, 3)}, ("audit", "`policy`", "a TabularPolicy", "float32")),
        ({"rollout_policy": None}, ("audit", "`rollout_policy`", "got NoneType")),
        ({"old_policy": torch.zeros(7, 3)}, ("`old_policy`", "a TabularPolicy, or None")),
        ({"advantages": np.zeros((7, 3))}, ("audit", "`advantages`", "`c v`", "got ndarray")),
        ({"advantages": torch.full((7, 3), math.inf).double()}, ("`advantages`", "inf at [0, 0]")),
        ({"loss_fn": None}, ("audit", "`loss_fn`", "got NoneType")),
        ({"loss_fn": PolicyLoss}, ("audit", "`loss_fn`", "got the class PolicyLoss")),
        ({"loss_fn": token_is()}, ("audit", "`loss_fn`", "got Correction", "PolicyLoss(")),
    ],
)
def test_messages_name_caller_argument_and_value(policy, engine, reward, arguments, words):
    given = {"policy": policy, "rollout_policy": engine, "reward": reward} | arguments
    with pytest.raises(InputError) as error:
        audit(**({"loss_fn": loss_of(token_is())} | given))
    for word in (*words, "Fix: "):
        assert word in str(error.value)


def test_renamed_refuses_a_name_that_no_caller_has_and_one_that_this_caller_lacks(
    policy, engine, reward
):
    def theirs(new, old):
        return (new - old).sum()

    with pytest.raises(InputError, match=r"renamed: `names` .*did you mean 'log_probs'"):
        renamed(theirs, log_prob="new")
    ours = renamed(theirs, log_probs="new", old_log_probs="old")
    assert audit(ours, policy, engine, reward, old_policy=engine).exact
    with pytest.raises(InputError, match=r"renamed: `old_log_probs` must be among .*old_policy="):
        audit(ours, policy, engine, reward)


@pytest.mark.parametrize("reads", [False, True])
def test_a_loss_with_randomness_of_its_own_is_sampled_and_never_called_exact(
    policy, engine, reward, reads
):
    def noisy(log_probs, **tensors):
        loss = loss_of(token_is())(dropout(log_probs), **tensors).loss
        if reads:
            loss.item()
        return loss

    with pytest.raises(InputError, match=r"audit: `loss_fn` must be without randomness .*samples="):
        audit(noisy, policy, engine, reward)
    found = audit(noisy, policy, engine, reward, samples=200)
    assert not found.exact and found.errors["bias"] > 0


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda x: {"loss": x.sum()}, "got dict"),
        (lambda x: [x.sum()], "got list"),
        (lambda x: 0.0, "got float"),
        (lambda x: None, "got NoneType"),
        (lambda x: -x, r"got float64 \(1, 3\)"),
        (lambda x: (x, {}), r"a tuple that begins with float64 \(1, 3\)"),
    ],
)
def test_a_loss_that_returns_no_scalar_is_told_what_to_return(policy, engine, reward, result, got):
    with pytest.raises(InputError, match=f"audit: `loss_fn` must be a loss .*{got}.* Fix: return"):
        audit(lambda log_probs, **_: result(log_probs), policy, engine, reward)


@pytest.mark.parametrize("reads", [False, True])
def test_a_loss_that_changes_its_inputs_is_audited_once(reads):
    def exact(log_probs, *, rollout_log_probs, advantages, mask):
        d = (log_probs - rollout_log_probs).masked_fill(~mask, 0)
        weight = d.sum(-1, keepdim=True).detach().exp()
        return -(weight * advantages * log_probs * mask).sum(-1).mean()

    def doubles(log_probs, *, advantages, **given):
        advantages.mul_(2)
        loss = exact(log_probs, advantages=advantages, **given) / 2
        if reads:
            loss.item()
        return loss

    policy = TabularPolicy.random(2, 3)
    reward = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = audit(doubles, policy, mismatch.noise(policy, 0.2), reward)
    assert found.bias < 1e-14
    assert (found.scale, found.mean_weight) == pytest.approx((1, 1))


def test_a_gradient_of_zero_has_no_units():
    policy = TabularPolicy.random(2, 3)
    loss = PolicyLoss(aggregation="seq-mean-token-sum")
    found = audit(loss, policy, policy, torch.zeros(8).double(), samples=100)
    assert found.bias == 0 and math.isnan(found.relative(8)["bias"])
