"""Pareto smoothing against the public implementation in arviz-stats."""

import numpy as np
import pytest
import torch
from batches import make_batch

import iscorrect as ic

array_stats = pytest.importorskip("arviz_stats.base").array_stats

SAMPLES = {
    "log-normal": lambda rng, n: 1.5 * rng.standard_normal(n),
    "pareto": lambda rng, n: 0.8 * rng.exponential(size=n),
    "bounded": lambda rng, n: np.log(rng.random(n)),
    "narrow": lambda rng, n: 1e-3 * rng.standard_normal(n),
}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("n", [30, 101, 1000, 5000])
@pytest.mark.parametrize("seed", range(3))
def test_index_and_smoothed_tail_agree_with_arviz(kind, n, seed):
    log_weights = SAMPLES[kind](np.random.default_rng(seed), n)
    expected, k = array_stats.psislw(-log_weights)
    tail = ic.pareto_tail(torch.from_numpy(log_weights), torch.ones(n, dtype=torch.bool))
    assert tail.k.item() == pytest.approx(float(k), rel=1e-6)

    smoothed = log_weights.copy()
    members = tail.members.numpy()
    smoothed[tail.positions.numpy()[members]] = tail.smoothed.numpy()[members]
    # arviz normalises its weights; ours keep their scale.
    shift = np.median(smoothed - expected)
    np.testing.assert_allclose(smoothed - shift, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_outside_the_sample_do_not_matter(dtype):
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.standard_normal(500)).to(dtype)
    units = torch.from_numpy(rng.random(500) < 0.5)
    padded = torch.where(units, values, torch.nan)
    alone = values[units]
    expected = ic.pareto_tail(alone, torch.ones_like(alone, dtype=torch.bool))
    assert ic.pareto_tail(padded, units).k.item() == pytest.approx(expected.k.item(), rel=1e-9)


@pytest.mark.parametrize("n", [0, 1, 4, 20])
def test_a_tail_too_short_to_fit_has_index_infinity_and_changes_nothing(n):
    tail = ic.pareto_tail(torch.randn(n), torch.ones(n, dtype=torch.bool))
    assert tail.k == torch.inf
    assert not tail.members.any()


def test_equal_weights_have_no_tail():
    tail = ic.pareto_tail(torch.zeros(1000), torch.ones(1000, dtype=torch.bool))
    assert tail.k == torch.inf
    assert not tail.members.any()


def test_weights_that_vanish_beside_the_largest_are_no_part_of_the_tail():
    found = []
    for depth in (800, 10_000):
        log_weights = -depth - torch.arange(1000, dtype=torch.float64)
        log_weights[:20] = -torch.arange(20, dtype=torch.float64)
        tail = ic.pareto_tail(log_weights, torch.ones(1000, dtype=torch.bool))
        assert tail.members.sum() == 20
        found.append(tail.k)
    assert found[0] == found[1] < torch.inf


@pytest.mark.parametrize("level", ["token", "sequence", "segment"])
def test_smoothed_weights_keep_order_scale_and_the_rest(level):
    batch = make_batch(0, rows=200, width=12, scale=0.5)
    layout = ic.Layout(batch.mask, segment_ids=torch.arange(12).expand(200, 12) // 6)
    kwargs = dict(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs, mask=layout
    )
    raw = ic.Correction(level=level)(**kwargs).weights
    smooth, keep, metrics = ic.pareto_is(level)(**kwargs)
    changed = (smooth != raw) & keep
    assert 0 < changed.sum() < keep.sum()
    assert smooth.max() <= raw.max() * (1 + 1e-12)
    rest = keep & ~changed & (raw < raw.max())  # the largest weight may stay the largest
    assert raw[changed].min() >= raw[rest].max()
    order = raw[keep].argsort()
    assert (smooth[keep][order].diff() >= -1e-9).all()
    assert 0 < metrics["is/bounded"] < 0.25


def test_every_token_of_a_sequence_takes_its_smoothed_weight():
    batch = make_batch(1, rows=100, width=8, scale=0.5)
    weights = ic.pareto_is("sequence")(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.mask,
    ).weights
    for row, mask in zip(weights, batch.mask, strict=True):
        assert row[mask].unique().numel() <= 1
