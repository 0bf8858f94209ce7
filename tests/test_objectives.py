"""Objectives, the terms beside them, aggregation, and group advantages."""

import numpy as np
import pytest
import torch
from batches import batches, make_batch
from components import OBJECTIVES
from hypothesis import given, strategies as st

import iscorrect as ic
from iscorrect import Layout, SequenceMeanTokenMean
from iscorrect.loss.objectives import made


def terms(objective, batch):
    mask = batch.mask
    clean = [torch.where(mask, x, 0) for x in (batch.log_probs, batch.old_log_probs)]
    advantages = torch.where(mask, batch.advantages, 0)
    layout = Layout(mask)
    return objective(*clean, advantages, layout)


@given(batch=batches())
def test_dual_clip_bounds_the_ratio_of_negative_examples(batch):
    loss, clipped = terms(ic.PPOClip(low=0.8, high=1.2, dual=1.5), batch)
    r = torch.exp(batch.log_probs - batch.old_log_probs)[batch.mask].numpy()
    a = batch.advantages[batch.mask].numpy()
    surrogate = np.minimum(r * a, np.clip(r, 0.8, 1.2) * a)
    surrogate = np.where(a < 0, np.maximum(surrogate, 1.5 * a), surrogate)
    np.testing.assert_allclose(loss[batch.mask], -surrogate, rtol=1e-12)
    flat = ((a > 0) & (r > 1.2)) | ((a < 0) & ((r < 0.8) | (r > 1.5)))
    np.testing.assert_array_equal(clipped[batch.mask], flat)


def test_clipped_tokens_are_those_without_gradient():
    batch = make_batch(0, rows=4, width=8)
    objective = ic.PPOClip(low=0.95, high=1.05, dual=1.2)
    log_probs = torch.where(batch.mask, batch.log_probs, -1.0).requires_grad_()
    old = torch.where(batch.mask, batch.old_log_probs, -1.0)
    advantages = torch.where(batch.mask, batch.advantages, 0)
    layout = Layout(batch.mask)
    loss, clipped = objective(log_probs, old, advantages, layout)
    loss.sum().backward()
    assert 0 < clipped.sum() < batch.mask.sum()
    assert torch.equal(clipped[batch.mask], log_probs.grad[batch.mask] == 0)


def test_without_clips_ppo_is_importance_sampling_through_the_ratio():
    batch = make_batch(1)
    loss, clipped = terms(ic.PPOClip(low=None, high=None), batch)
    r = torch.exp(batch.log_probs - batch.old_log_probs)[batch.mask]
    torch.testing.assert_close(loss[batch.mask], -r * batch.advantages[batch.mask])
    assert not clipped.any()


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    log_probs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-3.0, -1.0]])
    layout = Layout(torch.ones(1, 2, dtype=torch.bool))
    ic.CISPO(high=2.0)(log_probs, old, torch.ones(1, 2), layout).loss.sum().backward()
    assert log_probs.grad.tolist() == [[-2.0, -1.0]]


def gradient_of(objective, log_probs, old, advantages, layout):
    leaf = log_probs.clone().requires_grad_()
    loss = made(objective, leaf, old, advantages, layout).loss
    layout.total(loss * SequenceMeanTokenMean().coefficients(layout, loss.dtype)).backward()
    return leaf.grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_policy_that_has_not_moved_gets_the_plain_policy_gradient(name):
    """Of the mean over tokens and sequences, which gives a shared ratio 1/T per token."""
    batch = make_batch(5, rows=6, width=8)
    x = torch.where(batch.mask, batch.log_probs, 0)
    a = torch.where(batch.mask, batch.advantages, 0)
    if name in ("sequence-ppo-clip", "prefix-ppo-clip"):
        pytest.skip("each token moves the ratios of others, so that the sum is another")
    layout = Layout(batch.mask)
    plain = gradient_of(ic.Reinforce(), x, x, a, layout)
    torch.testing.assert_close(gradient_of(OBJECTIVES[name], x, x, a, layout), plain)


@pytest.mark.parametrize("objective", [ic.SAPO(), ic.GMPO(low=0.9, high=1.1)])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_objectives_are_those_of_finite_differences(objective, packed):
    batch = make_batch(3, rows=4, width=6)
    ids = torch.arange(6).expand(4, 6) // 3 if packed else None
    layout = Layout(batch.mask, sequence_ids=ids)
    x, old, a = (
        torch.where(batch.mask, t, 0)
        for t in (batch.log_probs, batch.old_log_probs, batch.advantages)
    )
    assert torch.autograd.gradcheck(
        lambda x: objective(x, old, a, layout).loss, x.clone().requires_grad_()
    )


def test_sapo_closes_its_gate_smoothly_on_either_side():
    log_r = torch.linspace(-3, 3, 101, dtype=torch.float64).requires_grad_()
    layout = Layout(torch.ones(101, dtype=torch.bool))
    loss = ic.SAPO(tau_positive=2.0)(log_r, torch.zeros(101), torch.ones(101), layout).loss
    (slope,) = torch.autograd.grad(loss.sum(), log_r)
    share = -slope / log_r.detach().exp()
    gate = torch.sigmoid(2 * (log_r.detach().exp() - 1))
    torch.testing.assert_close(share, 4 * gate * (1 - gate))
    assert share.argmax() == 50
    assert share[50] == 1


def test_gmpo_drops_the_gradient_of_clipped_tokens_and_weighs_the_rest_alike():
    log_probs = torch.tensor([[0.5, 0.1, -2.0]], dtype=torch.float64, requires_grad=True)
    layout = Layout(torch.ones(1, 3, dtype=torch.bool))
    zeros, ones = torch.zeros(1, 3), torch.ones(1, 3)
    loss, clipped = ic.GMPO(high=np.exp(0.4))(log_probs, zeros, ones, layout)
    g = np.exp((0.4 + 0.1 - 2.0) / 3)
    assert loss[0].tolist() == pytest.approx([-g] * 3)
    assert clipped.tolist() == [[True, False, False]]
    loss.sum().backward()
    assert log_probs.grad[0].tolist() == pytest.approx([0, -g, -g])


@pytest.mark.parametrize(("sign", "k", "rate"), [(1, 2.0, 3.0), (-1, 3.0, 2.0)])
def test_vespos_kernel_is_one_at_one_and_largest_at_k_over_lambda(sign, k, rate):
    w = torch.linspace(0.05, 4, 400, dtype=torch.float64)
    layout = Layout(torch.ones(400, 2, dtype=torch.bool))
    log_probs = (w.log() / 2)[:, None].expand(400, 2).clone().requires_grad_()
    a = torch.full((400, 2), float(sign), dtype=torch.float64)
    ic.VESPO()(log_probs, torch.zeros(400, 2), a, layout).loss.sum().backward()
    kernel = -sign * log_probs.grad[:, 0]
    torch.testing.assert_close(kernel, w**k * torch.exp(rate * (1 - w)))
    assert w[kernel.argmax()].item() == pytest.approx(k / rate, abs=0.02)


def test_vespo_forgets_sequences_that_are_out_of_all_proportion():
    log_probs = torch.tensor([[900.0], [-9000.0]], requires_grad=True)
    layout = Layout(torch.ones(2, 1, dtype=torch.bool))
    loss = ic.VESPO()(log_probs, torch.zeros(2, 1), torch.ones(2, 1), layout).loss
    loss.sum().backward()
    assert log_probs.grad.tolist() == [[0.0], [0.0]]


def test_aspo_turns_the_ratio_of_positive_examples_over_and_keeps_the_gradient_at_its_cap():
    log_r = torch.tensor([0.1, -0.5, -9.0, 0.5, 0.5, -0.5], dtype=torch.float64).requires_grad_()
    a = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
    layout = Layout(torch.ones(6, dtype=torch.bool))
    loss, clipped = ic.ASPO(cap=3.0)(log_r, torch.zeros(6), a, layout)
    loss.sum().backward()
    e = np.exp
    assert log_r.grad.tolist() == pytest.approx([-e(-0.1), -e(0.5), -3, 0, e(0.5), 0])
    assert clipped.tolist() == [False, False, True, True, False, True]


def test_a_capped_ratio_keeps_its_value_and_its_gradient():
    log_r = torch.tensor([0.1, 50.0, 9000.0], dtype=torch.float64).requires_grad_()
    layout = Layout(torch.ones(3, dtype=torch.bool))
    loss = ic.PPOClip(low=None, high=None, cap=1e4)(
        log_r, torch.zeros(3), -torch.ones(3), layout
    ).loss
    loss.sum().backward()
    assert loss.tolist() == log_r.grad.tolist() == pytest.approx([np.exp(0.1), 1e4, 1e4])


def test_ipo_has_the_gradient_of_its_capped_ratio_between_two_policies():
    """keep |p − q| ≤ ε, −A min(p/q, C) in value, with the gradient of log p."""
    batch = make_batch(2, rows=5, width=7, scale=1.0)
    loss_fn = ic.PolicyLoss(correction=ic.ipo(limit=0.2, cap=1.5), aggregation="sum")
    x = batch.log_probs.clone().requires_grad_()
    loss_fn(
        x, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages, mask=batch.mask
    ).loss.backward()
    p, q = (t[batch.mask].exp() for t in (batch.log_probs, batch.rollout_log_probs))
    kept = (p - q).abs() <= 0.2
    expected = -batch.advantages[batch.mask] * (p / q).clamp(max=1.5) * kept
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(x.grad[batch.mask], expected)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ic.SAPO(tau_negative=0), "SAPO: `tau_negative` must be a number > 0"),
        (lambda: ic.GMPO(low=0), "GMPO: `low` must be in (0, 1]"),
        (lambda: ic.GMPO(high=0.4), "GMPO: `high` must be a number >= 1"),
        (lambda: ic.VESPO(lambda_positive=-1), "VESPO: `lambda_positive` must be a number >= 0"),
        (lambda: ic.ASPO(low=1.2), "ASPO: `low` must be in [0, 1]"),
        (lambda: ic.ASPO(high=0.2), "ASPO: `high` must be a number >= 1"),
        (lambda: ic.ASPO(cap=0.5), "ASPO: `cap` must be a number >= 1"),
        (lambda: ic.PPOClip(high=1.2, cap=1.1), "PPOClip: `cap` must be a number >= 1.2"),
        (lambda: ic.AgeAbove(limit=-1), "AgeAbove: `limit` must be a number >= 0"),
        (lambda: ic.SecondMomentAbove(limit=-1), "SecondMomentAbove: `limit` must be a number"),
        (lambda: ic.SecondMomentAbove(over="some"), "SecondMomentAbove: `over` must be one of"),
        (
            lambda: ic.ByAge(limit=1, fresh=2.0, stale=ic.Ignore()),
            "ByAge: `fresh` must be a callable (ratio, evidence) -> weights, got 2.0",
        ),
        (
            lambda: ic.DivergenceAbove(limit=1.0, estimator="kl"),
            "DivergenceAbove: `estimator` must be 'k1', 'k2', 'k3', 'binary-kl', 'tv' or a",
        ),
    ],
)
def test_parts_refuse_what_they_cannot_mean(make, named):
    with pytest.raises(ic.InputError) as error:
        make()
    assert str(error.value).startswith(named)


def test_gspo_shares_one_ratio_and_its_gradient_over_the_sequence():
    log_probs = torch.tensor([[-1.0, -2.0, 0.0]], requires_grad=True)
    old = torch.tensor([[-1.1, -1.7, 0.0]])
    layout = Layout(torch.tensor([[True, True, False]]))
    loss = ic.PPOClip(low=None, high=None, level="geometric")(
        log_probs, old, torch.ones(1, 3), layout
    ).loss
    s = np.exp(-0.1)
    assert loss[0, :2].tolist() == pytest.approx([-s, -s])
    layout.total(loss).backward()
    assert log_probs.grad[0].tolist() == pytest.approx([-s, -s, 0])


@pytest.mark.parametrize("cap", [1.0, 1.5, 100.0])
@given(seed=st.integers(0, 999), kept=st.integers(1, 5))
def test_score_centering_makes_the_gradient_a_covariance(cap, seed, kept):
    """E_q[A w s] less E_q A times E_q[w s], for one prefix, over the full vocabulary."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal(5)).requires_grad_()
    q = torch.from_numpy(rng.dirichlet(np.ones(5)))
    rewards = torch.from_numpy(rng.standard_normal(5))
    p = logits.detach().softmax(0)
    if kept < 5:  # the tail's ratio is constant, where the top-k form is exact
        tail = (1 - q[:kept].sum()) / (1 - p[:kept].sum())
        q[kept:] = p[kept:] * tail
    weights = (p / q).clamp(max=cap)
    log_p = logits.log_softmax(0)
    head = log_p[:kept].expand(5, 1, kept)
    rollout_head = q[:kept].log().expand(5, 1, kept)
    extra = ic.score_centering(head, rollout_head, rewards[:, None], cap=cap)
    loss = -(q * rewards * weights * log_p).sum() + (q * extra[:, 0]).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    scores = torch.eye(5, dtype=torch.float64) - p
    mean = (q * rewards).sum()
    expected = -((q * (rewards - mean) * weights)[:, None] * scores).sum(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("what", ["rollout", "advantage", "head"])
def test_score_centering_of_what_is_not_finite_has_no_gradient(what):
    head = torch.tensor([[[0.4, 0.4]] * 2]).log()
    rollout, advantages = torch.tensor([[[0.5, 0.3]] * 2]).log(), torch.ones(1, 2)
    {"rollout": rollout, "advantage": advantages, "head": head}[what][0, 1] = torch.nan
    head.requires_grad_()
    ones = torch.full((1, 2), -1.0)
    loss, _ = ic.PolicyLoss(correction=ic.token_tis())(
        ones, rollout_log_probs=ones, advantages=torch.ones(1),
        mask=torch.tensor([[True, False]]), extra=ic.score_centering(head, rollout, advantages),
    )
    loss.backward()
    assert head.grad[0, 0].abs().sum() == 0 and head.grad[0, 1].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token-mean", lambda rows: np.concatenate(rows).mean()),
        ("seq-mean-token-sum", lambda rows: np.mean([r.sum() for r in rows])),
        ("seq-mean-token-mean", lambda rows: np.mean([r.mean() for r in rows])),
        ("seq-mean-token-sum-norm", lambda rows: np.mean([r.sum() for r in rows]) / 20),
        ("sum", lambda rows: np.concatenate(rows).sum()),
    ],
)
@given(batch=batches())
def test_aggregations_agree_with_their_names(how, expected, batch):
    rows = [s.advantages for s in batch.sequences() if len(s.advantages)]
    horizon = 20 if how.endswith("norm") else None
    value = ic.aggregate(batch.advantages, batch.mask, how, horizon=horizon)
    assert value.item() == pytest.approx(expected(rows) if rows else 0, rel=1e-10, abs=1e-12)


GROUPS = {
    "dr-grpo": lambda r: r - r.mean() if len(r) else r,
    "grpo": lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-6) if len(r) > 1 else 0 * r,
    "rloo": lambda r: (r - r.mean()) * len(r) / (len(r) - 1) if len(r) > 1 else 0 * r,
}


@pytest.mark.parametrize("estimator", GROUPS)
@given(seed=st.integers(0, 999), n=st.integers(0, 12), drop=st.booleans())
def test_group_advantages_agree_with_a_loop_over_prompts(estimator, seed, n, drop):
    rng = np.random.default_rng(seed)
    rewards, ids = rng.standard_normal(n), rng.integers(-3, 3, n)
    keep = rng.random(n) < 0.6 if drop else np.ones(n, dtype=bool)
    expected = np.zeros(n)
    for group in set(ids):
        members = (ids == group) & keep
        expected[members] = GROUPS[estimator](rewards[members])
    actual = ic.group_advantages(
        torch.from_numpy(rewards), torch.from_numpy(ids),
        torch.from_numpy(keep) if drop else None, estimator=estimator,
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_a_rejected_response_does_not_move_its_groups_baseline():
    rewards, ids = torch.tensor([1.0, 0.0, 100.0]), torch.tensor([0, 0, 0])
    kept = ic.group_advantages(
        rewards, ids, torch.tensor([True, True, False]), estimator="dr-grpo"
    )
    assert kept.tolist() == [0.5, -0.5, 0.0]
