"""Objectives, the terms beside them, aggregation, and group advantages."""

import numpy as np
import pytest
import torch
from batches import batches, make_batch
from hypothesis import given, strategies as st

import iscorrect as ic
from iscorrect import Layout


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
