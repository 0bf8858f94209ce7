"""What the strategies draw is what they promise, and every drawn loss keeps the library's rules."""

import math

import pytest
import torch
from hypothesis import Phase, find, given, settings

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
def test_padded_batches_have_a_token_in_every_row_and_zeros_on_the_right(batch):
    mask = batch.layout.mask
    assert mask.any(-1).all()
    behind = mask.flip(-1).cumsum(-1).flip(-1) == 0
    assert not behind[:, 0].any()
    assert (batch.advantages == batch.advantages[:, :1]).all()


BRANCHES = {
    "a ratio above every usual cap": lambda d, u, a, i: (d > math.log(5)).any(),
    "a ratio below every usual floor": lambda d, u, a, i: (d < math.log(0.2)).any(),
    "a ratio between": lambda d, u, a, i: ((d != 0) & (d.abs() < math.log(2))).any(),
    "a sequence above the cap of whose tokens none is": lambda d, u, a, i: (
        (i.layout.sequence_total(d) > math.log(2)) & (i.layout.sequence_max(d) < math.log(2))
    ).any(),
    "clipped above with a positive advantage": lambda d, u, a, i: ((u > 0.25) & (a > 0)).any(),
    "clipped below with a negative advantage": lambda d, u, a, i: ((u < -0.25) & (a < 0)).any(),
    "beyond the clip, where the minimum is the ratio's": lambda d, u, a, i: (
        (u.abs() > 0.25) & (u * a < 0)
    ).any(),
    "moved but not clipped": lambda d, u, a, i: ((u != 0) & (u.abs() < 0.18)).any(),
    "two signs in a batch": lambda d, u, a, i: (a > 0).any() & (a < 0).any(),
    "no advantage": lambda d, u, a, i: (a == 0).all(),
    "sequences of two lengths": lambda d, u, a, i: (
        i.layout.sequence_count(d.dtype)[i.layout.mask].unique().numel() > 1
    ),
    "log-probs that bfloat16 cannot hold": lambda d, u, a, i: (
        i.old_log_probs != i.old_log_probs.bfloat16()
    ).any(),
    "a hole with numbers in it": lambda d, u, a, i: (
        ~i.layout.mask & (i.rollout_log_probs != 0) & (i.advantages != 0)
    ).any(),
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [padded_batches(), batches()], ids=["padded", "any"])
def test_every_branch_of_a_loss_is_reached_many_times_in_three_hundred_examples(strategy):
    reached = dict.fromkeys(BRANCHES, 0)

    @settings(max_examples=300, derandomize=True, phases=[Phase.generate])
    @given(strategy)
    def count(inputs):
        mask = inputs.layout.mask
        d = torch.where(mask, inputs.old_log_probs - inputs.rollout_log_probs, 0)
        u = torch.where(mask, inputs.log_probs - inputs.old_log_probs, 0)
        a = torch.where(mask, inputs.advantages, 0)
        for name, holds in BRANCHES.items():
            reached[name] += bool(holds(d, u, a, inputs))

    count()
    print(reached)
    assert {name for name, times in reached.items() if times < 5} == set()


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
