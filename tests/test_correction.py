"""Corrections against the NumPy oracle."""

import numpy as np
import oracle
import pytest
import torch
from batches import batches, make_batch
from hypothesis import given, strategies as st

import iscorrect as ic
from iscorrect import PRESETS, Correction, Layout
from iscorrect.loss.caps import ess_cap


def correct(correction, batch, mask=None):
    return correction(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.mask if mask is None else mask, advantages=batch.advantages,
    )


@pytest.mark.parametrize("name", oracle.PRESETS)
@given(batch=batches())
def test_every_preset_agrees_with_the_oracle(name, batch):
    weights, keep, _ = correct(PRESETS[name](), batch)
    for row, mask, kept, sequence in zip(
        weights, batch.mask, keep, batch.sequences(), strict=True
    ):
        expected = oracle.PRESETS[name](sequence)
        np.testing.assert_allclose(row[mask], expected, rtol=1e-10, atol=0)
        assert not row[~mask].any()
        np.testing.assert_array_equal(kept[mask], expected != 0)
        assert not kept[~mask].any()


@pytest.mark.parametrize("name", oracle.OF_A_BATCH)
@given(batch=batches())
def test_every_preset_of_the_batch_agrees_with_the_oracle(name, batch):
    weights, _, _ = correct(PRESETS[name](), batch)
    expected = oracle.OF_A_BATCH[name](batch.sequences())
    for row, mask, theirs in zip(weights, batch.mask, expected, strict=True):
        np.testing.assert_allclose(row[mask], theirs, rtol=1e-10, atol=0)


def test_the_oracle_covers_every_preset_but_pareto_smoothing():
    assert set(oracle.PRESETS | oracle.OF_A_BATCH) == set(PRESETS) - {"pareto-is"}


@pytest.mark.parametrize("name", ["token-is", "token-tis", "confidence-is", "sequence-tis", "topr"])
@given(batch=batches())
def test_float32_agrees_with_the_oracle_to_its_rounding(name, batch):
    weights, _, _ = correct(PRESETS[name](), batch.to(torch.float32))
    assert weights.dtype == torch.float32
    assert weights.isfinite().all()
    limit = np.exp((np.log(np.finfo(np.float32).max) - 40 * np.log(2)) / 2)
    for row, mask, sequence in zip(weights, batch.mask, batch.sequences(), strict=True):
        d = np.abs(oracle.log_ratio(sequence)).sum() + np.abs(sequence.old).sum()
        expected = np.minimum(oracle.PRESETS[name](sequence), limit)
        np.testing.assert_allclose(row[mask], expected, rtol=1e-6 * (2 + 4 * d), atol=1e-37)


@pytest.mark.parametrize("name", PRESETS)
def test_equal_policies_give_weight_one(name):
    batch = make_batch(1)
    batch = batch._replace(rollout_log_probs=batch.old_log_probs)
    weights, keep, metrics = correct(PRESETS[name](), batch)
    assert torch.equal(weights, batch.mask.double())
    assert torch.equal(keep, batch.mask)
    assert metrics["mismatch/kl_k3"] == 0
    assert metrics["is/ess"] == 1


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_log_probs_are_upcast_before_the_subtraction(name, dtype):
    batch = make_batch(2).to(dtype)
    weights, keep, _ = correct(PRESETS[name](), batch)
    expected, expected_keep, _ = correct(PRESETS[name](), batch.to(torch.float32))
    assert weights.dtype == torch.float32
    assert torch.equal(weights, expected)
    assert torch.equal(keep, expected_keep)


def nan_at(batch, row, position, value=float("nan")):
    rollout = batch.rollout_log_probs.clone()
    rollout[row, position] = value
    return batch._replace(rollout_log_probs=rollout)


def full_batch():
    batch = make_batch(3, rows=2, width=4)
    finite = [torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in batch[:-1]]
    return type(batch)(*finite, torch.ones_like(batch.mask))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("level", "dropped"),
    [
        ("token", [False, True, False, False]),
        ("prefix", [False, True, True, True]),
        ("segment", [True, True, False, False]),
        ("sequence", [True, True, True, True]),
        ("geometric", [True, True, True, True]),
    ],
)
def test_a_value_that_is_not_finite_drops_its_unit_and_is_counted(level, dropped, value):
    batch = nan_at(full_batch(), 0, 1, value)
    turns = torch.tensor([[0, 0, 1, 1]] * 2)
    layout = Layout(batch.mask, segment_ids=turns)
    weights, keep, metrics = correct(Correction(level=level), batch, layout)
    assert (~keep[0]).tolist() == dropped
    assert ((weights[0] == 0) == ~keep[0]).all()
    assert keep[1].all()
    assert metrics["is/nonfinite"] == 1 / 8


def test_neutral_gives_a_value_that_is_not_finite_the_ratio_one():
    batch = full_batch()
    weights, keep, metrics = correct(
        Correction(level="sequence", nonfinite="neutral"), nan_at(batch, 0, 1)
    )
    old = batch.old_log_probs.clone()
    old[0, 1] = batch.rollout_log_probs[0, 1]
    expected = correct(Correction(level="sequence"), batch._replace(old_log_probs=old)).weights
    assert torch.allclose(weights, expected, rtol=1e-12)
    assert keep.all()
    assert metrics["is/nonfinite"] == 1 / 8


def test_raise_names_the_positions_that_are_not_finite():
    correction = Correction(nonfinite="raise")
    found = r"finite under the mask, got NaN, ±inf, or 10⁴ nats and more at \(0, 1\)"
    with pytest.raises(ic.InputError, match=found):
        correct(correction, nan_at(full_batch(), 0, 1))
    assert correct(correction, full_batch()).keep.all()


@given(batch=batches())
def test_normalising_divides_by_the_mean_raw_ratio_so_that_a_cap_stays_a_cap(batch):
    cap = 1.5
    weights, _, _ = correct(Correction(bound=ic.Truncate(cap), normalize=True), batch)
    raw = np.concatenate([oracle.token_is(s) for s in batch.sequences()])
    expected = np.minimum(raw / raw.mean(), cap) if len(raw) else raw
    np.testing.assert_allclose(weights[batch.mask], expected, rtol=1e-10)
    assert (weights <= cap).all()


def test_ratios_that_all_vanish_have_no_mean_to_be_divided_by():
    mask = torch.ones(1, 2, dtype=torch.bool)
    rollout = torch.zeros(1, 2)
    weights, keep, metrics = Correction(normalize=True)(
        old_log_probs=torch.full((1, 2), -900.0), rollout_log_probs=rollout, mask=mask
    )
    assert not weights.any()
    assert not keep.any()
    assert metrics["is/rejected"] == 1


def test_normalised_sequence_weights_average_one_over_sequences_not_tokens():
    batch = make_batch(5, rows=6, width=8, scale=0.3)
    correction = Correction(level="sequence", normalize=True)
    weights = correct(correction, batch).weights
    alive = batch.mask.any(-1)
    assert torch.isclose(weights.amax(-1)[alive].mean(), torch.tensor(1.0, dtype=torch.float64))


@given(batch=batches())
def test_rules_see_the_raw_evidence_whatever_their_order(batch):
    rules = (ic.Veto(low=0.5), ic.DivergenceAbove(limit=0.01), ic.RatioOutside(low=0.9, high=1.1))
    forward = correct(Correction(reject=rules), batch)
    backward = correct(Correction(reject=rules[::-1]), batch)
    assert torch.equal(forward.keep, backward.keep)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "binary-kl", "tv", lambda d: d.abs()])
@pytest.mark.parametrize("over", ["token", "mean", "sum", "max"])
@given(batch=batches())
def test_divergence_rules_agree_with_the_oracle(estimator, over, batch):
    of_ratios = {"k1": lambda d: -d, "k2": oracle.k2, "k3": oracle.k3}
    of_pairs = {
        "binary-kl": lambda s: oracle.held_kl_bin(s.rollout, s.old),
        "tv": lambda s: abs(np.exp(s.old) - np.exp(s.rollout)),
    }
    limit = 0.003
    rule = ic.DivergenceAbove(limit=limit, estimator=estimator, over=over)
    keep = correct(Correction(bound=ic.Ignore(), reject=(rule,)), batch).keep
    for row, mask, s in zip(keep, batch.mask, batch.sequences(), strict=True):
        if not mask.any():
            continue
        if estimator in of_pairs:
            x = of_pairs[estimator](s)
        else:
            x = of_ratios.get(estimator, np.abs)(oracle.log_ratio(s))
        reduced = {"token": x, "mean": x.mean(), "sum": x.sum(), "max": x.max()}[over]
        np.testing.assert_array_equal(row[mask], np.broadcast_to(reduced <= limit, x.shape))


@pytest.mark.parametrize("old", [0.0, -1e-9, -1e-5])
@pytest.mark.parametrize("rollout", [0.0, -1e-9, -1e-5])
def test_a_log_prob_that_was_rounded_to_certainty_rejects_no_sequence(old, rollout):
    rule = ic.DivergenceAbove(limit=1e-4, estimator="binary-kl", over="mean")
    keep = Correction(reject=(rule,))(
        old_log_probs=torch.tensor([[old, -1.0]]),
        rollout_log_probs=torch.tensor([[rollout, -1.0]]),
        mask=torch.ones(1, 2, dtype=torch.bool),
    ).keep
    assert keep.all()


@given(batch=batches(), low=st.floats(0, 1), high=st.floats(1, 4))
def test_a_veto_drops_the_sequence_of_a_single_outlier(batch, low, high):
    keep = correct(Correction(reject=(ic.Veto(low=low, high=high),), bound=ic.Ignore()), batch).keep
    for row, mask, s in zip(keep, batch.mask, batch.sequences(), strict=True):
        r = oracle.token_is(s)
        assert row[mask].all() == (not ((r < low) | (r > high)).any())
        assert row[mask].any() == row[mask].all() or not mask.any()


def test_the_binary_kl_version_of_dppo_drops_by_divergence_and_sign():
    p, q = torch.tensor([[0.5, 0.2, 0.5]]).log(), torch.tensor([[0.2, 0.5, 0.49]]).log()
    rule = ic.ProbabilityShift(limit=0.05, divergence="kl")
    for sign, expected in ((1.0, [False, True, True]), (-1.0, [True, False, True])):
        keep = Correction(reject=(rule,))(
            old_log_probs=p, rollout_log_probs=q, mask=torch.ones(1, 3, dtype=torch.bool),
            advantages=torch.full((1, 3), sign),
        ).keep
        assert keep.tolist() == [expected]


@pytest.mark.parametrize("name", PRESETS)
def test_weights_carry_no_gradient(name):
    batch = make_batch(7)
    current = batch.old_log_probs.clone().requires_grad_()
    with pytest.raises(ic.InputError, match="without gradient"):
        correct(PRESETS[name](), batch._replace(old_log_probs=current))
    weights = correct(PRESETS[name](), batch._replace(old_log_probs=current.detach())).weights
    assert not weights.requires_grad


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0), (3, 4)])
def test_nothing_to_count_gives_no_weight_and_no_nan(name, shape):
    nan = torch.full(shape, torch.nan)
    weights, keep, metrics = PRESETS[name]()(
        old_log_probs=nan, rollout_log_probs=nan, mask=torch.zeros(shape, dtype=torch.bool),
        advantages=nan,
    )
    assert weights.shape == shape
    assert not weights.any()
    assert not keep.any()
    values = metrics.to_floats()
    assert all(np.isfinite(list(values.values())))
    assert values["is/rejected"] == 0


@given(batch=batches())
def test_prefix_ratios_are_running_products(batch):
    weights = correct(Correction(level="prefix"), batch).weights
    for row, mask, s in zip(weights, batch.mask, batch.sequences(), strict=True):
        expected = oracle.exp(np.cumsum(oracle.log_ratio(s)))
        np.testing.assert_allclose(row[mask], expected, rtol=1e-10)


@given(batch=batches(), seed=st.integers(0, 99))
def test_segment_ratios_are_products_over_each_turn(batch, seed):
    turns = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, batch.mask.shape))
    layout = Layout(batch.mask, segment_ids=turns)
    weights = correct(Correction(level="segment"), batch, layout).weights
    d = torch.where(batch.mask, batch.old_log_probs - batch.rollout_log_probs, 0).numpy()
    for i in range(len(d)):
        borders = np.flatnonzero(np.diff(turns[i].numpy())) + 1
        for span in np.split(np.arange(d.shape[1]), borders):
            counted = batch.mask[i, span]
            expected = oracle.exp(d[i, span].sum())
            assert np.allclose(weights[i, span][counted], expected, rtol=1e-10)


RETURNS = {
    "a number a sequence": lambda e: e.layout.sequence_total(e.log_ratio)[:, 0],
    "a number a column": lambda e: e.log_ratio[0],
    "a number": lambda e: e.log_ratio.sum(),
    "swapped axes": lambda e: e.log_ratio.T,
}


@pytest.mark.parametrize("made", RETURNS.values(), ids=RETURNS)
def test_what_a_part_returns_has_the_shape_of_the_mask(made):
    x = torch.tensor([[0.1, 0.1, 0.1], [-0.1, -0.1, -0.1]])
    inputs = {"old_log_probs": x - 1, "rollout_log_probs": torch.full_like(x, -1.0),
              "mask": torch.ones_like(x, dtype=torch.bool)}
    with pytest.raises(ic.InputError, match="what is kept of shape"):
        Correction(reject=(lambda e: made(e) > 0,))(**inputs)
    with pytest.raises(ic.InputError, match="weights of shape"):
        Correction(bound=lambda ratio, e: made(e).exp())(**inputs)


def test_weights_are_float32_whatever_a_bound_returns():
    x = torch.zeros(1, 2)
    found = Correction(bound=lambda ratio, e: ratio.half())(
        old_log_probs=x, rollout_log_probs=x, mask=torch.ones(1, 2, dtype=torch.bool))
    assert found.weights.dtype == torch.float32


@pytest.mark.parametrize("value", ["False", "off", "no", 1, None])
def test_a_flag_is_true_or_false(value):
    with pytest.raises(ic.InputError, match="`normalize` must be True or False"):
        Correction(normalize=value)
    with pytest.raises(ic.InputError, match="`corrected` must be True or False"):
        ic.ReferenceKL(corrected=value)


def test_bounds_and_caps_refuse_what_they_cannot_hold():
    with pytest.raises(ic.InputError, match="Clip: `low`"):
        ic.Clip(None, None)
    with pytest.raises(ic.InputError, match="ByAge: `fresh`"):
        ic.ByAge(limit=1, fresh=ic.Truncate, stale=ic.Mask(0.5, 2.0))
    for target in (0, 2.0):
        with pytest.raises(ic.InputError, match="ess_cap: `target`"):
            ess_cap(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), target)


def test_an_unknown_scope_is_named():
    def part(evidence):
        return evidence.layout.mask

    part.scope = "Token"
    with pytest.raises(ic.InputError, match="did you mean 'token'"):
        _ = Correction(reject=(part,)).scope
