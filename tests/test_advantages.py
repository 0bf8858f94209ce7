"""Advantages against a group: exact zeros where there is nothing to learn."""

import pytest
import torch
from hypothesis import given, strategies as st

from iscorrect import InputError, group_advantages

ESTIMATORS = ["grpo", "dr-grpo", "rloo"]


@given(
    reward=st.floats(-1e3, 1e3, width=32), size=st.integers(1, 40),
    estimator=st.sampled_from(ESTIMATORS), eps=st.sampled_from([0.0, 1e-6]),
)
def test_a_group_of_equal_rewards_has_no_advantage(reward, size, estimator, eps):
    rewards = torch.full((size,), reward)
    ids = torch.zeros(size, dtype=torch.int64)
    advantages = group_advantages(rewards, ids, estimator=estimator, eps=eps)
    if size == 1 and estimator == "dr-grpo":
        assert advantages.item() == 0
    assert (advantages == 0).all()


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, 1e-6, 123.456])
def test_equal_rewards_beside_another_group_have_no_advantage(reward):
    rewards = torch.tensor([reward] * 7 + [0.0, 1.0])
    ids = torch.tensor([5] * 7 + [2] * 2)
    advantages = group_advantages(rewards, ids)
    assert (advantages[:7] == 0).all()
    torch.testing.assert_close(advantages[7:].abs(), torch.full((2,), 0.5**0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_difference_in_the_last_place_of_float32_is_one(estimator):
    one = torch.tensor(1.0)
    rewards = torch.stack([one, torch.nextafter(one, 2 * one)])
    advantages = group_advantages(rewards, torch.zeros(2, dtype=torch.int64), estimator=estimator)
    assert advantages[0] < 0 < advantages[1]


@pytest.mark.parametrize("eps", [-1.0, "1e-6", True])
def test_what_is_added_to_the_deviation_is_a_number_that_is_not_negative(eps):
    with pytest.raises(InputError, match="`eps`"):
        group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.int64), eps=eps)


def test_a_group_size_in_place_of_ids_is_refused_with_the_ids_to_pass():
    with pytest.raises(InputError, match="group_size"):
        group_advantages(torch.ones(4), 2)
    with pytest.raises(InputError, match="`rewards`"):
        group_advantages([1.0, 2.0], torch.tensor([0, 0]))


@pytest.mark.parametrize("estimator", ["grpo", "dr-grpo", "rloo"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_reward_that_is_not_finite_shows_in_its_group_alone(estimator, broken):
    rewards, groups = torch.tensor([1.0, 0.0, broken, 1.0, 0.0]), torch.tensor([0, 0, 0, 1, 1])
    found = group_advantages(rewards, groups, estimator=estimator)
    assert not found[:3].isfinite().any() and found[3:].isfinite().all()
    kept = group_advantages(rewards, groups, rewards.isfinite(), estimator=estimator)
    assert kept.isfinite().all() and kept[2] == 0


def test_ids_of_groups_are_integers():
    with pytest.raises(InputError, match="group_advantages: `group_ids`"):
        group_advantages(torch.ones(2), torch.tensor([True, False]))
