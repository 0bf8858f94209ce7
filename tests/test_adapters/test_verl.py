"""verl itself, number for number."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from batches import batches, make_batch
from hypothesis import assume, example, given, reject
from hypothesis import strategies as st

from iscorrect import Correction, Ignore
from iscorrect.adapters.dialects import from_verl

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")

bound = st.floats(math.log(1e-3), math.log(1e3)).map(math.exp)
bands = st.tuples(bound, bound).map(lambda ab: f"{min(ab)}_{max(ab)}")


@st.composite
def settings(draw):
    """A valid rollout_correction, with up to four of the eleven rules."""
    options = draw(st.lists(st.sampled_from(sorted(helper.SUPPORTED_ROLLOUT_RS_OPTIONS)),
                            max_size=4, unique=True))
    thresholds = [
        draw(bands if option.endswith("k1") else bound.map(str)) for option in options
    ]
    if options and draw(st.booleans()):
        thresholds = [str(draw(st.floats(1.0, 50.0)))]  # one for all, where x stands for "1/x_x"
    return dict(
        rollout_is=draw(st.sampled_from([None, "token", "sequence"])),
        rollout_is_threshold=draw(bound | bound.map(str) | bands),
        rollout_is_batch_normalize=draw(st.booleans()),
        rollout_rs=",".join(options) or None,
        rollout_rs_threshold=",".join(thresholds) or None,
    )


def finite(batch):
    """verl spreads NaN of the padding into the weights: it gets zeros there."""
    return [torch.where(batch.mask, x, 0) for x in (batch.old_log_probs, batch.rollout_log_probs)]


def verl(batch, config):
    old, rollout = finite(batch)
    weights, mask, metrics = helper.compute_rollout_correction_and_rejection_mask(
        old, rollout, batch.mask.double(), **config
    )
    weights = batch.mask.double() if weights is None else weights.batch["rollout_is_weights"]
    return weights, mask.bool(), metrics


def ours(batch, correction):
    return correction(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.mask,
    )


@given(batches(), settings())
def test_weights_and_masks_are_those_of_verl(batch, config):
    assume(batch.mask.any())
    try:
        weights, mask, _ = verl(batch, config)
    except ZeroDivisionError:  # verl's effective sample size of weights that are all 0
        reject()
    correction = from_verl(**config)
    torch.testing.assert_close(
        ours(batch, correction).weights, weights * mask, rtol=1e-6, atol=1e-8
    )
    rules = Correction(bound=Ignore(), reject=correction.reject)
    assert torch.equal(ours(batch, rules).keep, mask)


@pytest.mark.parametrize("option", sorted(helper.SUPPORTED_ROLLOUT_RS_OPTIONS))
def test_each_rule_alone_rejects_what_verl_rejects(option):
    rejected = 0
    for seed in range(40):
        batch = make_batch(seed, rows=4, width=6, scale=0.4)
        if not batch.mask.any():
            continue
        config = dict(
            rollout_rs=option, rollout_rs_threshold="0.8_1.3" if option.endswith("k1") else 0.1
        )
        _, mask, _ = verl(batch, config)
        assert torch.equal(ours(batch, from_verl(None, **config)).keep, mask)
        rejected += int((batch.mask & ~mask).sum())
    assert rejected > 0


def test_k1_bounds_of_verl_act_on_the_inverse_ratio_and_strict_ones_on_the_ratio():
    ratio = torch.tensor([[0.3, 0.6, 1.0, 1.8, 4.0]], dtype=torch.float64)
    batch = SimpleNamespace(
        old_log_probs=ratio.log(), rollout_log_probs=torch.zeros_like(ratio),
        mask=torch.ones_like(ratio, dtype=torch.bool),
    )
    config = dict(rollout_rs="token_k1", rollout_rs_threshold="0.5_5.0")
    _, mask, _ = verl(batch, config)
    assert mask.tolist() == [[True, True, True, True, False]]
    strict = ours(batch, from_verl(None, strict=True, **config)).keep
    assert strict.tolist() == [[False, True, True, True, True]]


@given(batches(), st.sampled_from(["token", "sequence"]), bound)
@example(make_batch(0, scale=1.0), "token", 1.1)
def test_no_strict_weight_exceeds_its_threshold(batch, level, cap):
    correction = from_verl(level, cap, True, strict=True)
    assert ours(batch, correction).weights.max() <= cap * (1 + 1e-12)


def test_weights_of_verl_exceed_their_threshold_after_normalisation():
    ratio = torch.tensor([[0.01, 0.01, 0.1, 9.0]], dtype=torch.float64)
    batch = SimpleNamespace(
        old_log_probs=ratio.log(), rollout_log_probs=torch.zeros_like(ratio),
        mask=torch.ones_like(ratio, dtype=torch.bool),
    )
    assert ours(batch, from_verl("token", 2.0, True)).weights.max() > 2.0
