"""Theorems about importance-weighted policy gradients, each exact by enumeration.

π is the policy being trained, μ where sequences come from, W = π(y)/μ(y), s = ∇log π(y), f = R s,
K = max ‖f‖, and ∇J the gradient of E_π R. An estimator of the library is audited as the loss that
it is; what else a theorem speaks of is a finite sum over the sequences.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from einops import einsum, rearrange
from hypothesis import assume, given, strategies as st

from iscorrect import (
    Clip,
    ConfidenceCap,
    Correction,
    Layout,
    Mask,
    PolicyLoss,
    PPOClip,
    Support,
    Truncate,
    at_level,
    binary_kl,
    k1,
    k2,
    k3,
    log_probs_from_logits,
    mse_optimal_cap,
    ratio,
    score_centering,
    sequence_is,
    sequence_mis,
    sequence_tis,
    token_is,
    token_tis,
    uncorrected,
)
from iscorrect.testing import TabularPolicy, audit, chi2, kl, mismatch, total_variation
from iscorrect.testing.strategies import Case, cases, policies

CLOSE = {"atol": 1e-11, "rtol": 1e-9}
CAPS = st.sampled_from([0.8, 1.05, 1.5, 2.0, 3.0, 5.0])
SLACK = 1e-12

close = partial(torch.testing.assert_close, **CLOSE)


def loss_of(correction, **options):
    return PolicyLoss(correction=correction, **{"aggregation": "seq-mean-token-sum"} | options)


def expected(case, correction, **options):
    """E_μ of −∇loss."""
    return audit(loss_of(correction), *case, **options).expected


def scores(policy):
    """∇log π of each sequence in the logits, "n c v", by autograd."""
    logits = policy.logits.clone().requires_grad_()
    live = TabularPolicy(logits, policy.length, policy.eos).log_probs.sum(-1)
    return torch.stack([torch.autograd.grad(x, logits, retain_graph=True)[0] for x in live])


def token_scores(policy):
    """∇log π of each token in the logits, "n t c v"."""
    n, t = policy.sequences.mask.shape
    hot = torch.zeros(n, t, *policy.logits.shape, dtype=torch.float64)
    i, j = torch.meshgrid(torch.arange(n), torch.arange(t), indexing="ij")
    contexts, tokens = policy.sequences.contexts, policy.sequences.tokens
    hot[i, j, contexts] = -policy.table.exp()[contexts]
    hot[i, j, contexts, tokens] += 1
    return hot * policy.sequences.mask[..., None, None]


def expectation(policy, values):
    """Σ_y p(y) x(y); "n ..." -> "..."."""
    return torch.tensordot(policy.probabilities, values, dims=1)


def sequence_ratios(policy, rollout):
    """W of each sequence, "n", by the library's ratio of a level."""
    layout = Layout(policy.sequences.mask)
    return ratio(at_level(policy.log_probs - rollout.log_probs, layout, "sequence"))[:, 0]


def by_sequence(values, weights):
    """One number for each sequence times its gradient; "n c v", "n" -> "n c v"."""
    return einsum(values, weights, "n c v, n -> n c v")


def weighted_scores(case):
    """f = R s of each sequence, "n c v", and K."""
    f = by_sequence(scores(case.policy), case.reward)
    return f, f.flatten(1).norm(dim=1).max()


def token_divergence(a, b):
    """KL(a‖b) of each context, "c"."""
    return (a.table.exp() * (a.table - b.table)).sum(-1)


def token_variation(policy, rollout):
    """TV of each context, "c"."""
    return (policy.table.exp() - rollout.table.exp()).abs().sum(-1) / 2


@pytest.fixture
def example():
    """A case in which nothing happens to vanish."""
    policy = TabularPolicy.random(3, 3)
    reward = torch.rand(27, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Case(policy, mismatch.noise(policy, 0.4), reward)


# What each estimator estimates.


@given(policies())
def test_t1_the_score_has_mean_zero_also_after_every_prefix(policy):
    close(expectation(policy, scores(policy)), torch.zeros_like(policy.logits))
    each = token_scores(policy)
    for t in range(policy.length):
        close(expectation(policy, each[:, t]), torch.zeros_like(policy.logits))


@given(cases(eos=0))
def test_t2_sequence_importance_sampling_is_unbiased(case):
    close(expected(case, sequence_is()), case.policy.policy_gradient(case.reward))


@given(cases(), st.integers(-8, 8))
def test_t2b_it_stays_unbiased_with_any_constant_baseline(case, baseline):
    moved = case._replace(reward=case.reward - baseline / 4)
    close(expected(moved, sequence_is()), case.policy.policy_gradient(case.reward))


@given(cases(vocab=3))
def test_t2c_without_full_support_it_estimates_the_gradient_on_the_support_alone(case):
    case = case._replace(rollout_policy=mismatch.top_k(case.policy, 2))
    f, _ = weighted_scores(case)
    seen = (case.rollout_policy.probabilities > 0).double()
    close(expected(case, sequence_is()), expectation(case.policy, by_sequence(f, seen)))


@given(cases())
def test_t3_prefix_importance_sampling_is_exact_with_the_advantages_of_the_trained_policy(case):
    correction = Correction(level="prefix")
    advantages = case.policy.advantages(case.reward)
    close(
        expected(case, correction, advantages=advantages),
        case.policy.policy_gradient(case.reward),
    )


def test_t3b_prefix_importance_sampling_is_biased_with_the_reward(example):
    assert audit(loss_of(Correction(level="prefix")), *example).relative_bias > 1e-3


@given(cases())
def test_t3c_there_it_estimates_the_gradient_with_the_values_of_the_rollout_policy(case):
    values = case.policy.sequences.gather(case.rollout_policy.action_values(case.reward))
    each = einsum(token_scores(case.policy), values, "n t c v, n t -> n c v")
    close(expected(case, Correction(level="prefix")), expectation(case.policy, each))


@given(cases(eos=0))
def test_t4_token_importance_sampling_is_the_gradient_of_the_surrogate(case):
    policy, rollout, reward = case
    logits = policy.logits.clone().requires_grad_()
    live = TabularPolicy(logits, policy.length, policy.eos)
    advantages = policy.sequences.gather(rollout.advantages(reward))
    ratios = (live.log_probs - rollout.log_probs).exp()
    surrogate = expectation(rollout, (ratios * advantages).sum(-1))
    gradient = torch.autograd.grad(surrogate, logits)[0]
    close(expected(case, token_is()), gradient)
    close(expected(case, token_is(), advantages=rollout.advantages(reward)), gradient)


def test_t4b_token_importance_sampling_is_biased_beyond_one_token(example):
    assert audit(loss_of(token_is()), *example).relative_bias > 1e-3


@given(cases(length=1))
def test_t4c_token_importance_sampling_is_exact_for_one_token(case):
    close(expected(case, token_is()), case.policy.policy_gradient(case.reward))


@given(cases())
def test_t4d_its_bias_grows_at_most_with_the_square_of_the_length(case):
    each, _ = ratios_of(case)
    gaps = case.rollout_policy.probabilities @ (sequence_ratios(*case[:2])[:, None] - each).abs()
    largest = (case.reward[:, None] * token_scores(case.policy).flatten(2).norm(dim=2)).max()
    bias = audit(loss_of(token_is()), *case).bias
    assert bias <= largest * gaps.sum() + SLACK
    steps = case.policy.length
    assert (gaps <= 2 * (steps - 1) * token_variation(*case[:2]).max() + SLACK).all()


def through_the_ratio(correction):
    """The loss −bound(W) R, differentiated through the bound."""

    def loss_fn(log_probs, *, rollout_log_probs, advantages, mask):
        layout = Layout(mask)
        rho = ratio(at_level(log_probs - rollout_log_probs, layout, "sequence"))
        bounded = rho if correction.bound is None else correction.bound(rho, None)
        return -(bounded * advantages)[:, 0].mean()

    return loss_fn


@given(cases())
def test_t11_differentiating_through_the_ratio_is_importance_sampling(case):
    found = audit(through_the_ratio(sequence_is()), *case).expected
    close(found, expected(case, sequence_is()))


@given(cases(), CAPS)
def test_t11b_differentiating_through_the_truncation_is_masking(case, cap):
    # At the cap itself the derivative of the minimum is anybody's choice.
    assume(((sequence_ratios(*case[:2]) - cap).abs() > 1e-9).all())
    found = audit(through_the_ratio(sequence_tis(cap)), *case).expected
    close(found, expected(case, sequence_mis(high=cap)))


def test_t11c_and_not_truncation(example):
    found = audit(through_the_ratio(sequence_tis(1.2)), *example).expected
    assert (found - expected(example, sequence_tis(1.2))).norm() > 1e-3 * found.norm()


@given(cases(vocab=2, length=2), policies(vocab=2, length=2))
def test_t25_the_weight_of_the_engine_times_the_ratio_of_the_update_is_the_whole_ratio(case, old):
    objective = PPOClip(low=None, high=None, level="sequence")
    # The objective puts the sequence's ratio on each of its tokens, so their mean is taken.
    loss_fn = loss_of(sequence_is(), objective=objective, aggregation="seq-mean-token-mean")
    found = audit(loss_fn, *case, old_policy=old).expected
    close(found, case.policy.policy_gradient(case.reward))


def test_t25b_a_ppo_ratio_on_the_rollout_policy_counts_the_mismatch_twice(example):
    policy, rollout, _ = example
    old = mismatch.noise(policy, 0.2, seed=5)
    objective = PPOClip(low=None, high=None, level="sequence")

    def loss_fn(log_probs, *, rollout_log_probs, old_log_probs, advantages, mask):
        layout = Layout(mask)
        weight = ratio(at_level(old_log_probs - rollout_log_probs, layout, "sequence"))
        terms = objective(log_probs, rollout_log_probs, advantages, layout)
        return (weight * terms.loss)[:, 0].mean()

    found = audit(loss_fn, *example, old_policy=old)
    f, _ = weighted_scores(example)
    twice = sequence_ratios(old, rollout) * sequence_ratios(policy, rollout)
    close(found.expected, expectation(rollout, by_sequence(f, twice)))
    assert found.relative_bias > 1e-3


@given(cases(vocab=2, length=2), policies(vocab=2, length=2), CAPS)
def test_t25c_before_the_first_update_the_weight_rests_on_the_engine_alone(case, other, cap):
    for objective in (PPOClip(), PPOClip(low=None, high=None)):
        loss_fn = loss_of(token_tis(cap), objective=objective)
        found = audit(loss_fn, *case, old_policy=case.policy).expected
        close(found, expected(case, token_tis(cap)))


@pytest.mark.slow
@given(cases(vocab=2, length=2))
def test_t20_the_mean_of_a_group_as_baseline_scales_the_gradient_by_one_minus_one_over_its_size(
    case,
):
    gradient = case.policy.policy_gradient(case.reward)
    for size in (2, 3):
        found = expected(case, sequence_is(), batch=size, group="dr-grpo")
        close(found, (1 - 1 / size) * gradient)


@pytest.mark.slow
@given(cases(vocab=2, length=2))
def test_t20b_the_mean_of_the_others_as_baseline_is_exact(case):
    for size in (2, 3):
        found = expected(case, sequence_is(), batch=size, group="rloo")
        close(found, case.policy.policy_gradient(case.reward))


@given(cases(), CAPS, st.integers(-8, 8))
def test_t10_under_truncation_a_baseline_moves_the_bias_by_what_was_cut_off(case, cap, baseline):
    moved = case._replace(reward=case.reward - baseline / 4)
    cut = (sequence_ratios(*case[:2]) - cap).clamp(min=0)
    leak = expectation(case.rollout_policy, by_sequence(scores(case.policy), cut))
    difference = expected(moved, sequence_tis(cap)) - expected(case, sequence_tis(cap))
    close(difference, baseline / 4 * leak)


@given(cases(), CAPS, st.integers(-8, 8))
def test_t10b_under_masking_a_baseline_moves_the_bias_by_what_was_masked(case, cap, baseline):
    moved = case._replace(reward=case.reward - baseline / 4)
    rho = sequence_ratios(*case[:2])
    correction = sequence_mis(low=1 / 5, high=cap)
    masked = torch.where((rho <= cap) & (rho >= 1 / 5), 0, rho)
    leak = expectation(case.rollout_policy, by_sequence(scores(case.policy), masked))
    difference = expected(moved, correction) - expected(case, correction)
    close(difference, baseline / 4 * leak)


def centred(logits, rollout_log_probs, advantages, cap):
    """E_q of the gradient of −A w log p + centring over the whole vocabulary, for one context."""
    logits = logits.clone().requires_grad_()
    p, q = logits.log_softmax(-1), rollout_log_probs
    weights = token_tis(cap)(
        old_log_probs=p.detach(), rollout_log_probs=q, mask=torch.ones(len(q), dtype=torch.bool)
    ).weights
    head, rollout_head = (rearrange(x, "v -> 1 1 v") for x in (p, q))
    chances = q.exp()
    plain = -(chances * advantages * weights * p).sum()
    extra = score_centering(head, rollout_head, (chances @ advantages).view(1, 1), cap=cap).sum()
    gradient = torch.autograd.grad(plain + extra, logits)[0]
    return -gradient, weights, torch.eye(len(q)).double() - p.detach().exp()


@given(cases(vocab=3, length=1), CAPS, st.integers(0, 1000))
def test_t19_score_centring_leaves_the_covariance_of_advantage_and_weighted_score(case, cap, seed):
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(3, generator=generator, dtype=torch.float64)
    q = case.rollout_policy.table[0]
    found, weights, score = centred(case.policy.logits[0], q, advantages, cap)
    chances = q.exp()
    weighted = weights[:, None] * score
    covariance = (chances * (advantages - chances @ advantages)) @ weighted
    close(found, covariance)


@given(cases(vocab=3, length=1))
def test_t19b_without_truncation_it_is_importance_sampling_with_a_mean_baseline(case):
    advantages = case.reward
    q = case.rollout_policy.table[0]
    found, _, score = centred(case.policy.logits[0], q, advantages, cap=1e6)
    p = case.policy.table[0].exp()
    close(found, (p * (advantages - q.exp() @ advantages)) @ score)
    found, _, score = centred(case.policy.logits[0], case.policy.table[0], advantages, cap=2.0)
    close(found, (p * advantages) @ score)


@given(st.integers(0, 10_000), st.sampled_from([0.8, 1.1, 2.0]))
def test_t19c_centring_on_the_head_is_exact_where_the_tail_has_one_ratio(seed, cap):
    rng = np.random.default_rng(seed)
    q = torch.from_numpy(rng.dirichlet(np.ones(6)))
    p = q.clone()
    p[:2] *= torch.from_numpy(rng.uniform(0.6, 1.2, 2))
    assume(p[:2].sum() < 0.99)
    p[2:] *= (1 - p[:2].sum()) / p[2:].sum()
    one = torch.ones(1, 1).double()
    logits = p.log().requires_grad_()

    def gradient(size):
        log_p = logits.log_softmax(-1)[:size]
        loss = score_centering(log_p.view(1, 1, -1), q[:size].log().view(1, 1, -1), one, cap=cap)
        return torch.autograd.grad(loss.sum(), logits)[0]

    close(gradient(2), gradient(6))


# Bounds on the bias.


@given(cases(eos=0))
def test_t5_the_variation_of_sequences_is_at_most_that_of_tokens_where_the_rollout_goes(case):
    each = token_variation(*case[:2])
    along = case.rollout_policy.visits() @ each
    assert total_variation(*case[:2]) <= along + SLACK
    assert along <= case.policy.length * each.max() + SLACK


@given(cases())
def test_t5b_the_uncorrected_bias_is_at_most_twice_the_variation(case):
    found = audit(loss_of(uncorrected()), *case)
    _, largest = weighted_scores(case)
    assert found.bias <= 2 * largest * total_variation(*case[:2]) + SLACK


@given(cases(), CAPS)
def test_t7_the_bias_of_truncation_is_what_was_cut_off(case, cap):
    f, largest = weighted_scores(case)
    cut = (sequence_ratios(*case[:2]) - cap).clamp(min=0)
    mass = case.rollout_policy.probabilities @ cut
    found = audit(loss_of(sequence_tis(cap)), *case)
    close(found.expected - found.target, -expectation(case.rollout_policy, by_sequence(f, cut)))
    assert found.bias <= largest * mass + SLACK


@given(cases(), CAPS)
def test_t7b_what_was_cut_off_is_at_most_a_quarter_of_the_second_moment_over_the_cap(case, cap):
    divergence, variation = chi2(*case[:2]), total_variation(*case[:2])
    mass = case.rollout_policy.probabilities @ (sequence_ratios(*case[:2]) - cap).clamp(min=0)
    assert mass <= (1 + divergence) / (4 * cap) + SLACK
    if cap > 1:
        assert mass <= divergence / (4 * (cap - 1)) + SLACK
    if cap >= 1:
        assert mass <= variation + SLACK


@pytest.mark.parametrize("cap", [1.5, 2.0, 4.0])
def test_t7c_and_no_smaller_constant_will_do(cap):
    # A policy with W in {0, 2C} puts all of (W - C)+ where x²/(4C) touches it.
    chance = 1 / (2 * cap)
    rollout = TabularPolicy(torch.tensor([[chance, 1 - chance]]).double().log(), 1)
    policy = TabularPolicy(torch.tensor([[1 - 1e-12, 1e-12]]).double().log(), 1)
    mass = rollout.probabilities @ (sequence_ratios(policy, rollout) - cap).clamp(min=0)
    bound = (1 + chi2(policy, rollout)) / (4 * cap)
    assert mass.item() == pytest.approx(bound.item(), rel=1e-9)


@given(cases(), CAPS)
def test_t7e_truncation_is_exact_on_another_policy_times_the_mean_weight(case, cap):
    f, _ = weighted_scores(case)
    kept = torch.minimum(case.policy.probabilities, cap * case.rollout_policy.probabilities)
    mass = kept.sum()
    close(expected(case, sequence_tis(cap)), mass * torch.tensordot(kept / mass, f, dims=1))
    cut = (sequence_ratios(*case[:2]) - cap).clamp(min=0)
    close(1 - mass, case.rollout_policy.probabilities @ cut)
    # With a reward that never vanishes the audit sees the weight of every sequence.
    positive = case._replace(reward=case.reward + 1)
    assert audit(loss_of(sequence_tis(cap)), *positive).mean_weight == pytest.approx(mass.item())


@given(cases(), CAPS)
def test_t9_the_bias_of_masking_is_what_was_masked(case, cap):
    f, largest = weighted_scores(case)
    gone = (sequence_ratios(*case[:2]) > cap).double()
    chance = case.policy.probabilities @ gone
    found = audit(loss_of(sequence_mis(high=cap)), *case)
    close(found.expected - found.target, -expectation(case.policy, by_sequence(f, gone)))
    assert found.bias <= largest * chance + SLACK
    assert chance <= (1 + chi2(*case[:2])) / cap + SLACK


@given(cases(), st.sampled_from([1.05, 1.5, 3.0]))
def test_t9f_what_was_masked_vanishes_with_the_mismatch(case, cap):
    chance = case.policy.probabilities @ (sequence_ratios(*case[:2]) > cap).double()
    assert chance <= cap * chi2(*case[:2]) / (cap - 1) ** 2 + SLACK


@given(cases(), CAPS)
def test_t9b_at_the_same_cap_truncation_has_the_smaller_bound(case, cap):
    rho = sequence_ratios(*case[:2])
    cut = case.rollout_policy.probabilities @ (rho - cap).clamp(min=0)
    assert cut <= case.policy.probabilities @ (rho > cap).double() + SLACK


def test_t9c_but_not_always_the_smaller_bias():
    # Masked sequences of opposite rewards cancel in part; truncation lets go of the second.
    p = torch.tensor([[0.1, 0.05, 0.85]]).double()
    q = torch.tensor([[0.001, 0.05 / 1.2, 0.999 - 0.05 / 1.2]]).double()
    case = Case(
        TabularPolicy(p.log(), 1), TabularPolicy(q.log(), 1), torch.tensor([1.0, -1.0, 0]).double()
    )
    truncated = audit(loss_of(sequence_tis(1.1)), *case).bias
    assert truncated > 1.02 * audit(loss_of(sequence_mis(high=1.1)), *case).bias


@given(cases(), CAPS)
def test_t9d_self_normalised_masking_is_exact_on_what_is_kept(case, cap):
    f, _ = weighted_scores(case)
    kept = (sequence_ratios(*case[:2]) <= cap).double()
    assume(kept.any())
    found = expected(case, sequence_mis(high=cap))
    share = case.policy.probabilities @ kept
    positive = case._replace(reward=torch.ones_like(case.reward))
    weight = audit(loss_of(sequence_mis(high=cap)), *positive).mean_weight
    close(found / weight, expectation(case.policy, by_sequence(f, kept)) / share)


@given(cases(), st.sampled_from([0.5, 0.9]), st.sampled_from([1.1, 2.0]))
def test_t9e_the_bias_of_two_sided_masking_is_what_lies_outside_the_band(case, low, high):
    f, _ = weighted_scores(case)
    rho = sequence_ratios(*case[:2])
    outside = ((rho < low) | (rho > high)).double()
    found = audit(loss_of(sequence_mis(low=low, high=high)), *case)
    close(found.expected - found.target, -expectation(case.policy, by_sequence(f, outside)))


def mean_of_weights(case, size):
    """w̄ of every batch "k", its estimate of E_π R, and its chance, for self-normalised weights."""
    rho = sequence_ratios(*case[:2])
    rows = torch.cartesian_prod(*[torch.arange(len(rho))] * size).view(-1, size)
    normalised = Correction(level="sequence", normalize=True)
    logp, logm = (p.log_probs[rows] for p in case[:2])

    def estimate(ours, theirs, reward):
        mask = torch.ones_like(ours, dtype=torch.bool)
        weights = normalised(old_log_probs=ours, rollout_log_probs=theirs, mask=mask).weights
        return (weights[:, 0] * reward).mean()

    estimates = torch.func.vmap(estimate)(logp, logm, case.reward[rows])
    return rho[rows].mean(-1), estimates, case.rollout_policy.probabilities[rows].prod(-1)


@given(cases(vocab=2), st.sampled_from([2, 3]))
def test_t12_the_bias_of_self_normalised_weights_is_minus_their_covariance_with_their_mean(
    case, size
):
    means, estimates, chances = mean_of_weights(case, size)
    average = chances @ estimates
    bias = average - case.policy.expected_reward(case.reward)
    covariance = chances @ (estimates * means) - average * (chances @ means)
    close(bias, -covariance)
    spread = (chances @ (estimates - average).square()).sqrt()
    assert bias.abs() <= spread * (chi2(*case[:2]) / size).sqrt() + SLACK


def test_t12b_to_first_order_it_falls_with_the_size_of_the_batch():
    policy = TabularPolicy.random(3, 1)
    small = Case(policy, mismatch.noise(policy, 0.1), torch.tensor([0.0, 0.3, 1.0]).double())
    rho = sequence_ratios(*small[:2])
    target = small.policy.expected_reward(small.reward)
    slope = -(small.rollout_policy.probabilities @ (rho.square() * (small.reward - target)))

    def error(size):
        _, estimates, chances = mean_of_weights(small, size)
        return (size * (chances @ estimates - target) - slope).abs()

    # What the first order leaves halves as the batch doubles.
    assert error(8) < 0.6 * error(4) < 0.36 * error(2)
    assert error(8) < 0.1 * slope.abs()


def widest(rollout, gradients):
    """√λ of E_μ Σ_t g_t g_tᵀ, from "n t g"."""
    second = einsum(rollout.probabilities, gradients, gradients, "n, n t g, n t h -> g h")
    return torch.linalg.eigvalsh(second)[-1].clamp(min=0).sqrt()


@pytest.mark.slow
@given(cases(eos=0), CAPS)
def test_t26_the_bias_is_at_most_the_error_of_the_weight_times_the_widest_spread(case, cap):
    f, _ = weighted_scores(case)
    rho = sequence_ratios(*case[:2])
    spread = widest(case.rollout_policy, f.flatten(1)[:, None])
    weights = {
        uncorrected(): torch.ones_like(rho), sequence_tis(cap): rho.clamp(max=cap),
        sequence_mis(high=cap): torch.where(rho <= cap, rho, 0),
    }
    for correction, weight in weights.items():
        error = (case.rollout_policy.probabilities @ (rho - weight).square()).sqrt()
        assert audit(loss_of(correction), *case).bias <= error * spread + SLACK
    close(case.rollout_policy.probabilities @ (rho - 1).square(), chi2(*case[:2]))


@given(cases(), CAPS)
def test_t26b_also_where_each_token_has_a_weight_of_its_own(case, cap):
    gradients = case.reward[:, None, None] * token_scores(case.policy).flatten(2)
    spread = widest(case.rollout_policy, gradients)
    each, _ = ratios_of(case)
    errors = sequence_ratios(*case[:2])[:, None] - each.clamp(max=cap)
    error = (case.rollout_policy.probabilities @ errors.square().sum(-1)).sqrt()
    assert audit(loss_of(token_tis(cap)), *case).bias <= error * spread + SLACK


# Second moments.


@given(cases(eos=0))
def test_t6_chi_squared_is_the_variance_of_the_weight_and_bounds_the_variation(case):
    divergence = chi2(*case[:2])
    rho = sequence_ratios(*case[:2])
    close(divergence, case.rollout_policy.probabilities @ (rho - 1).square())
    assert total_variation(*case[:2]) <= divergence.clamp(min=0).sqrt() / 2 + SLACK
    assert kl(*case[:2]) <= divergence.log1p() + SLACK


@given(cases())
def test_t6b_chi_squared_of_a_sequence_grows_at_most_as_a_power_of_its_length(case):
    p, q = case.policy.table.exp(), case.rollout_policy.table.exp()
    each = (p.square() / q).sum(-1) - 1
    bound = (1 + each.max()) ** case.policy.length
    assert 1 + chi2(*case[:2]) <= bound * (1 + 1e-12)


@given(cases(length=1), st.integers(2, 3))
def test_t6c_and_exactly_so_for_identical_tokens(case, length):
    one = case.policy.logits.shape[1]
    rows = sum(one**t for t in range(length))
    repeated = [TabularPolicy(p.logits.expand(rows, one).clone(), length) for p in case[:2]]
    close(1 + chi2(*repeated), (1 + chi2(*case[:2])) ** length)


@given(cases(eos=0))
def test_t6d_the_divergence_of_sequences_adds_up_over_the_contexts_that_are_visited(case):
    policy, rollout, _ = case
    whole = kl(rollout, policy)
    close(whole, rollout.visits() @ token_divergence(rollout, policy))
    layout = Layout(policy.sequences.mask)
    log_ratio = at_level(policy.log_probs - rollout.log_probs, layout, "sequence")[:, 0]
    close(rollout.probabilities @ log_ratio, -whole)


@given(cases())
def test_t6e_the_effective_sample_size_is_one_over_one_plus_chi_squared(case):
    positive = case._replace(reward=case.reward + 1)
    found = audit(loss_of(sequence_is()), *positive)
    assert found.ess == pytest.approx(1 / (1 + chi2(*case[:2]).item()))


@given(cases(), CAPS)
def test_t8_the_second_moment_of_truncated_and_masked_weights_is_at_most_the_cap(case, cap):
    positive = case._replace(reward=case.reward + 1)
    for correction in (sequence_tis(cap), sequence_mis(high=cap)):
        moment = audit(loss_of(correction), *positive).second_moment
        assert moment <= min(cap, 1 + chi2(*case[:2]).item()) + SLACK


@given(cases(), CAPS)
def test_t8b_so_the_variance_is_at_most_the_cap_times_the_largest_square(case, cap):
    _, largest = weighted_scores(case)
    for correction in (sequence_tis(cap), sequence_mis(high=cap)):
        assert audit(loss_of(correction), *case).std ** 2 <= cap * largest**2 + SLACK


@given(cases(), st.sampled_from([8, 64, 512]))
def test_t8c_the_optimal_cap_minimises_a_bound_that_holds(case, n):
    divergence = chi2(*case[:2])
    _, largest = weighted_scores(case)

    def bound(cap):
        return largest**2 * ((1 + divergence) ** 2 / (16 * cap**2) + cap / n)

    best = mse_optimal_cap(torch.tensor(float(n), dtype=torch.float64), divergence)
    assert all(bound(best) <= bound(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))
    assert audit(loss_of(sequence_tis(best.item())), *case).mse(n) <= bound(best) + SLACK


# Estimators of the divergence.


@given(cases(eos=0))
def test_t13_k1_and_k3_have_the_divergence_as_their_mean_and_k3_is_never_negative(case):
    policy, rollout, _ = case
    layout = Layout(policy.sequences.mask)
    log_ratio = at_level(policy.log_probs - rollout.log_probs, layout, "sequence")[:, 0]
    whole = kl(rollout, policy)
    close(rollout.probabilities @ k1(log_ratio), whole)
    close(rollout.probabilities @ k3(log_ratio), whole)
    assert (k3(log_ratio) >= 0).all()
    close(k3(log_ratio) - k1(log_ratio), ratio(log_ratio) - 1)


def test_t13b_k2_is_off_by_the_third_order(example):
    policy, rollout, _ = example
    change = rollout.logits - policy.logits

    def error(size):
        near = TabularPolicy(policy.logits + size * change, policy.length)
        log_ratio = policy.log_probs.sum(-1) - near.log_probs.sum(-1)
        return (near.probabilities @ k2(log_ratio) - kl(near, policy)).abs().item()

    assert error(1.0) > 1e-4
    assert math.log2(error(0.02) / error(0.01)) == pytest.approx(3, abs=0.1)


@given(cases())
def test_t13c_the_weighted_k1_of_the_inverse_ratio_estimates_the_other_direction(case):
    policy, rollout, _ = case
    log_ratio = policy.log_probs.sum(-1) - rollout.log_probs.sum(-1)
    # ρ k3(−log ρ) = 1 − ρ + ρ log ρ
    close(rollout.probabilities @ (ratio(log_ratio) * k3(-log_ratio)), kl(policy, rollout))


@given(policies(vocab=3), st.sampled_from([0.5, 0.8, 0.95]))
def test_t13d_on_a_truncated_support_k3_and_k1_differ_by_the_mass_that_is_missing(policy, mass):
    narrow = mismatch.top_p(policy, mass)
    for p, q in zip(policy.table, narrow.table, strict=True):
        kept = q > -torch.inf
        d = (p - q)[kept]
        difference = q[kept].exp() @ (k3(d) - k1(d))
        close(difference, p[kept].exp().sum() - 1)


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1))
def test_t14_k3_of_two_changes_is_not_the_sum_of_both(changes):
    engine, update = torch.tensor(changes, dtype=torch.float64).unbind(-1)
    both = k3(engine) + k3(update) + engine.expm1() * update.expm1()
    close(k3(engine + update), both)


# Ratios of prefixes.


def ratios_of(case):
    """Token ratios and prefix ratios, "n t"."""
    layout = Layout(case.policy.sequences.mask)
    log_ratio = case.policy.log_probs - case.rollout_policy.log_probs
    return ratio(log_ratio), ratio(at_level(log_ratio, layout, "prefix"))


@given(cases(eos=0))
def test_t15_the_sequence_ratio_less_one_telescopes_from_either_end(case):
    each, prefix = ratios_of(case)
    before = torch.cat([torch.ones_like(prefix[:, :1]), prefix[:, :-1]], dim=1)
    after = prefix[:, -1:] / prefix
    whole = sequence_ratios(*case[:2])
    close(((each - 1) * before).sum(-1), whole - 1)
    close(((each - 1) * after).sum(-1), whole - 1)


@given(cases())
def test_t15c_the_mean_distance_of_the_ratio_from_one_is_twice_the_variation(case):
    q = case.rollout_policy.table
    distance = (q.exp() * (case.policy.table - q).expm1().abs()).sum(-1)
    close(distance, 2 * token_variation(*case[:2]))


@given(cases(eos=0))
def test_t24_the_prefix_ratio_has_mean_one_at_every_step(case):
    _, prefix = ratios_of(case)
    close(case.rollout_policy.probabilities @ prefix, torch.ones(case.policy.length).double())


@given(cases(vocab=2, length=3))
def test_t24b_and_is_a_martingale_after_every_prefix(case):
    policy, rollout, _ = case
    _, prefix = ratios_of(case)
    contexts = policy.sequences.contexts
    for t in range(1, policy.length):
        for context in contexts[:, t].unique():
            passing = contexts[:, t] == context
            chances = rollout.probabilities[passing] / rollout.probabilities[passing].sum()
            close(chances @ prefix[passing, t], prefix[passing, t - 1][0])


# Trust regions: R in [0, 1], the surrogate against the reward itself.


@given(cases())
def test_t16_the_surrogate_is_within_the_trust_region_bounds(case):
    policy, rollout, reward = case
    length = policy.length
    advantages = policy.sequences.gather(rollout.advantages(reward))
    each, _ = ratios_of(case)
    surrogate = rollout.probabilities @ (each * advantages).sum(-1)
    gain = policy.expected_reward(reward) - rollout.expected_reward(reward)
    error = (gain - surrogate).abs()

    widest = token_variation(policy, rollout).max()
    farthest = token_divergence(rollout, policy).max().clamp(min=0)
    whole = kl(rollout, policy).clamp(min=0)
    depth = torch.zeros(len(policy.logits), dtype=torch.int64)
    depth[policy.sequences.contexts.flatten()] = torch.arange(length).repeat(len(reward))
    gaps = (policy.visits() - rollout.visits()).abs()
    shifts = torch.stack([gaps[depth == t].sum() / 2 for t in range(length)])
    steps = torch.arange(length).double()

    # How far the states of step t can have moved, and how much an advantage can change there.
    limits = [steps * widest, (steps * farthest / 2).sqrt(), (whole / 2).sqrt().expand(length)]
    for limit in limits:
        assert (shifts <= limit.clamp(max=1) + SLACK).all()
    change = 2 * min(1.0, widest.item(), (farthest / 2).sqrt().item())
    assert error <= (2 * change * shifts).sum() + SLACK
    assert error <= length * (length - 1) * farthest + SLACK
    assert error <= 4 / 3 * length**1.5 * farthest + SLACK
    assert error <= 2 * length * (farthest * whole).sqrt() + SLACK


def test_t16b_no_function_of_the_sequence_divergence_bounds_that_of_a_token():
    # Two policies that part only where the rollout hardly ever goes.
    far = []
    for rarity in (2.0, 8.0, 14.0):
        rollout = TabularPolicy(torch.tensor([[rarity, 0.0], [0.0, 0.0], [0.0, 0.0]]).double(), 2)
        policy = mismatch.fault(rollout, 3.0, context=2)
        far.append((kl(rollout, policy).item(), token_divergence(rollout, policy).max().item()))
    whole, token = zip(*far, strict=True)
    assert whole[0] > 100 * whole[1] > 1e4 * whole[2]
    assert token[0] == pytest.approx(token[2])


# Divergences of single tokens.


@given(cases(vocab=3))
def test_t17_divergences_of_token_against_the_rest_are_lower_bounds_never_certificates(case):
    p, q = case.policy.table, case.rollout_policy.table
    widest, farthest = token_variation(*case[:2]), token_divergence(*case[:2])
    assert ((p.exp() - q.exp()).abs() <= widest[:, None] + SLACK).all()
    assert (binary_kl(p, q) <= farthest[:, None] + SLACK).all()


def test_t17b_they_can_be_zero_where_the_policies_differ():
    p = torch.tensor([0.5, 0.4, 0.1]).double().log()
    q = torch.tensor([0.5, 0.1, 0.4]).double().log()
    assert binary_kl(p, q)[0] == 0
    assert (p.exp() * (p - q)).sum() > 0.4


@given(cases())
def test_t18_a_ratio_moves_with_the_doubt_about_its_token(case):
    p, q = case.policy.table, case.rollout_policy.table
    shift = torch.logit(p.exp()) - torch.logit(q.exp())
    close((p - q).exp(), p.exp() + (-p.expm1()) * shift.exp())


@given(cases())
def test_t18b_so_the_confidence_cap_bounds_the_shift_of_the_logit(case):
    # ρ ≤ 1 + λ(1 − p) exactly where exp(shift) ≤ 1 + λ.
    p, q = case.policy.table, case.rollout_policy.table
    slope = 0.5
    shift = torch.logit(p.exp()) - torch.logit(q.exp())
    assume(((shift.exp() - 1 - slope).abs() > 1e-9).all())
    weights = Correction(bound=ConfidenceCap(slope, 0.0))(
        old_log_probs=p, rollout_log_probs=q, mask=torch.ones_like(p).bool()
    ).weights
    capped = (weights - (p - q).exp()).abs() > 1e-12
    assert torch.equal(capped, shift.exp() > 1 + slope)


# Sampling configurations.


@given(policies())
def test_t21_surprisal_less_entropy_is_zero_on_average_under_the_policy_itself(policy):
    entropy = -(policy.table.exp() * policy.table).sum(-1)
    gap = -policy.log_probs - entropy[policy.sequences.contexts]
    close(policy.probabilities @ gap, torch.zeros(policy.length).double())


def test_t21b_under_another_temperature_its_size_tells_the_temperature_to_first_order():
    policy = TabularPolicy.random(3, 4)
    p = policy.table.exp()
    entropy = -(p * policy.table).sum(-1)
    varentropy = (p * policy.table.square()).sum(-1) - entropy.square()
    contexts = policy.sequences.contexts

    def error(value):
        sampler = mismatch.temperature(policy, value)
        gap = expectation(sampler, (-policy.log_probs - entropy[contexts]).sum(-1))
        spread = expectation(sampler, varentropy[contexts].sum(-1))
        return abs(1 / (1 - gap / spread).item() - value)

    assert error(0.9) < 0.01
    assert math.log10(error(0.99) / error(0.999)) == pytest.approx(2, abs=0.1)


@given(policies(length=1), st.sampled_from([0.5, 0.7, 1.5]))
def test_t21c_raw_reports_of_a_tempered_sampler_give_a_mean_ratio_above_one(policy, value):
    sampler = mismatch.temperature(policy, value, report="raw")
    trainer = mismatch.temperature(policy, value)
    reported = trainer.log_probs - sampler.reported_log_probs
    mean = expectation(sampler, ratio(reported).sum(-1))
    close(mean, 1 + chi2(trainer, policy))


@given(policies(vocab=3), st.sampled_from([0.3, 0.5, 0.8, 0.95]))
def test_t22_after_top_p_every_log_ratio_of_a_context_is_the_log_of_its_kept_mass(policy, mass):
    narrow = mismatch.top_p(policy, mass)
    kept = narrow.table > -torch.inf
    held = torch.where(kept, policy.table.exp(), 0).sum(-1)
    log_ratio = policy.table - narrow.table
    close(log_ratio[kept], held.log()[:, None].expand_as(kept)[kept])
    assert (held >= mass - SLACK).all()
    mean = torch.where(kept, narrow.table.exp() * log_ratio.exp(), 0).sum(-1)
    close(mean, held)
    single = kept.sum(-1) == 1
    assert (narrow.table[single].amax(-1) == 0).all()


@given(policies(vocab=3), st.sampled_from([0.5, 0.8]))
def test_t22b_a_trainer_that_normalises_over_the_kept_tokens_agrees_with_the_sampler(policy, mass):
    narrow = mismatch.top_p(policy, mass)
    kept = narrow.table > -torch.inf
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(-1).cumsum(0)])
    support = Support(ids=kept.nonzero()[:, 1], offsets=counts)
    for token in range(3):
        target = torch.full(kept.shape[:1], token)
        close(log_probs_from_logits(policy.logits, target, support=support), narrow.table[:, token])


@given(policies(), st.sampled_from([0.5, 0.7, 1.5]))
def test_t23_a_tempered_sampler_that_reports_what_it_samples_from_has_mean_ratio_one(policy, value):
    sampler = mismatch.temperature(policy, value)
    close(sampler.probabilities @ sequence_ratios(policy, sampler), torch.ones(()).double())


# Limits.


@given(cases())
def test_limits_a_cap_beyond_every_ratio_is_importance_sampling(case):
    close(expected(case, sequence_tis(1e9)), expected(case, sequence_is()))
    close(expected(case, sequence_mis(high=1e9)), expected(case, sequence_is()))


@given(cases())
def test_limits_a_vanishing_cap_is_the_uncorrected_gradient_times_the_cap(case):
    close(expected(case, sequence_tis(1e-6)) / 1e-6, expected(case, uncorrected()))


@pytest.mark.slow
@given(cases(), st.sampled_from([Truncate(1.2), Mask(0.8, 1.2), Clip(0.8, 1.2)]))
def test_limits_equal_policies_make_every_bound_exact(case, bound):
    same = case._replace(rollout_policy=case.policy)
    for level in ("token", "sequence", "geometric", "prefix"):
        correction = Correction(level=level, bound=bound)
        close(expected(same, correction), case.policy.policy_gradient(case.reward))
