"""What the strategies draw is what they promise, and every drawn loss keeps the library's rules."""

import pytest
import torch
from hypothesis import find, given

from iscorrect import Correction, Layout, uncorrected
from iscorrect.testing.strategies import (
    batches,
    cases,
    corrections,
    layouts,
    log_prob_pairs,
    losses,
    padded_batches,
    policies,
)


def evaluate(loss_fn, batch, log_probs=None):
    leaf = (batch.log_probs if log_probs is None else log_probs).clone().requires_grad_()
    loss = loss_fn(
        leaf, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=batch.layout,
    ).loss
    return loss, torch.autograd.grad(loss, leaf)[0]


@given(losses(), batches())
def test_every_loss_is_finite_and_has_no_gradient_outside_the_mask(loss_fn, batch):
    loss, gradient = evaluate(loss_fn, batch)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[~batch.layout.mask].any()


@given(losses(), batches())
def test_what_is_outside_the_mask_changes_no_loss(loss_fn, batch):
    dirty = torch.where(batch.layout.mask, batch.log_probs, torch.nan)
    for a, b in zip(evaluate(loss_fn, batch), evaluate(loss_fn, batch, dirty), strict=True):
        assert torch.equal(a, b)


@given(corrections(), batches())
def test_every_correction_gives_weights_to_what_it_keeps_and_to_nothing_else(correction, batch):
    weights, keep, _ = correction(
        old_log_probs=batch.log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.layout, advantages=batch.advantages,
    )
    assert (weights >= 0).all()
    assert torch.equal(keep, weights > 0)
    assert not (keep & ~batch.layout.mask).any()


@given(batches())
def test_advantages_are_equal_within_a_sequence(batch):
    everywhere = batch.layout.with_mask(torch.ones_like(batch.layout.mask))
    means = everywhere.sequence_mean(batch.advantages)
    torch.testing.assert_close(batch.advantages, means)


@given(log_prob_pairs([2, 3], spread=0.5))
def test_pairs_are_log_probs_and_no_farther_apart_than_asked(pair):
    ours, theirs = pair
    assert (ours <= 0).all()
    assert (theirs <= 0).all()
    assert ((ours - theirs).abs() <= 0.5).all()


@given(padded_batches())
def test_padded_batches_have_a_token_in_every_row_and_padding_on_the_right(batch):
    mask = batch.layout.mask
    assert mask[:, 0].all()
    assert (mask[:, 1:] <= mask[:, :-1]).all()


@given(policies(), cases(eos=1))
def test_policies_are_distributions_and_cases_have_full_support(policy, case):
    torch.testing.assert_close(policy.probabilities.sum(), torch.ones(()).double())
    assert (case.rollout_policy.probabilities > 0).all()
    assert ((case.reward >= 0) & (case.reward <= 1)).all()


@pytest.mark.slow
def test_examples_shrink_to_the_smallest():
    batch = find(padded_batches(), lambda batch: batch.layout.count() >= 2)
    assert batch.layout.mask.numel() == 2
    assert not batch.log_probs.any()
    correction = find(corrections(), lambda _: True)
    assert correction == uncorrected()
    assert find(corrections(), lambda c: c.level == "prefix").reject == ()
    layout = find(layouts(), lambda layout: isinstance(layout, Layout))
    assert layout.mask.shape == (1, 1)
    assert isinstance(find(losses(), lambda _: True).correction, Correction)
