"""Lists with one tensor per sample: joined where they fit, refused with their place where not."""

import pytest
import torch
from contracts import samples

from iscorrect import InputError, token_tis
from iscorrect.adapters.ragged import pad_together
from iscorrect.adapters.tinker import corrected_advantages

LENGTHS = [3, 5, 1, 4]


def test_weights_on_the_advantages_give_the_gradient_of_the_weighted_loss():
    old, rollout, masks, advantages = samples(LENGTHS)
    masks = [mask == 1 for mask in masks]
    ready, metrics = corrected_advantages(
        token_tis(cap=1.2), old_log_probs=old, rollout_log_probs=rollout, advantages=advantages,
        masks=masks,
    )
    for x, a, b, advantage, mask in zip(ready, old, rollout, advantages, masks, strict=True):
        weight = (a - b).exp().clamp(max=1.2)
        torch.testing.assert_close(x, torch.where(mask, weight * advantage, 0))
    assert metrics["batch/tokens"] == sum(int(mask.sum()) for mask in masks)


def test_no_samples_have_no_advantages():
    nothing = {name: [] for name in ("old_log_probs", "rollout_log_probs", "advantages")}
    ready, metrics = corrected_advantages(token_tis(), **nothing)
    assert ready == []
    assert metrics["batch/tokens"] == 0


def test_masks_of_other_numbers_and_what_is_no_tensor_are_refused():
    ones = torch.ones(3)
    lists = dict(old_log_probs=[-ones], rollout_log_probs=[-ones], advantages=[ones])
    with pytest.raises(InputError, match="corrected_advantages: `masks` must be of 0 and 1"):
        corrected_advantages(token_tis(), **lists, masks=[ones / 2])
    kept = torch.tensor([1, 0, 1])
    ready, _ = corrected_advantages(token_tis(), **lists, masks=[kept])
    assert ready[0].tolist() == [1, 0, 1]
    for other in (torch.tensor(1.0), [1.0, 1.0, 1.0]):
        with pytest.raises(InputError, match=r"`advantages\[0\]` must be a tensor `t`"):
            corrected_advantages(token_tis(), **lists | {"advantages": [other]})


@pytest.mark.parametrize("longest", [0, 1])
def test_a_sample_with_another_length_is_refused_wherever_it_is(longest):
    whole = [torch.ones(3 + longest), torch.ones(4 - longest)]
    short = [whole[0], whole[1][:-1]]
    place = rf"`b\[1\]` must be {4 - longest} tokens long like a\[1\]"
    with pytest.raises(InputError, match=place):
        pad_together("f", "pass b", a=whole, b=short)
    with pytest.raises(InputError, match=r"`b` must be 2 samples like a, got 1\. Fix: pass b"):
        pad_together("f", "pass b", a=whole, b=whole[:1])
