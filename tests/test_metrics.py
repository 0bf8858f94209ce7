"""Metrics against plain definitions."""

import re
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from batches import batches, make_batch
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import iscorrect as ic
from iscorrect import Correction, Layout, Metrics, PolicyLoss


def metrics_of(correction, batch):
    return correction(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.mask, advantages=batch.advantages,
    ).metrics


def share(mask):
    return np.mean(mask) if len(mask) else 0.0


@given(batch=batches())
def test_mismatch_metrics_are_means_over_tokens(batch):
    d = np.concatenate([oracle.log_ratio(s) for s in batch.sequences()])
    r = oracle.exp(d)
    expected = {
        "batch/tokens": len(d),
        "mismatch/kl_k1": share(-d),
        "mismatch/kl_k2": share(d**2 / 2),
        "mismatch/kl_k3": share(np.expm1(d) - d),
        "mismatch/log_prob_diff/mean": share(np.abs(d)),
        "mismatch/log_prob_diff/max": np.abs(d).max(initial=0),
        "mismatch/chi2/token": share((r - 1) ** 2),
        "is/ratio/mean": share(r),
        "is/ratio/min": r.min(initial=1),
        "is/ratio/max": r.max(initial=1),
        "is/nonfinite": 0,
    }
    actual = metrics_of(ic.token_tis(), batch).to_floats()
    assert {k: actual[k] for k in expected} == pytest.approx(expected, rel=1e-9, abs=1e-14)


@given(batch=batches(), preset=st.sampled_from(sorted(ic.PRESETS)))
def test_every_correction_tells_what_sequences_add_up_to(batch, preset):
    sequences = [s for s in batch.sequences() if len(s.old)]
    ratios = np.array([oracle.product(s)[0] for s in sequences])
    expected = {
        "batch/sequences": len(sequences),
        "batch/length": share([len(s.old) for s in sequences]),
        "mismatch/kl/sequence": share([
            (np.expm1(oracle.log_ratio(s)) - oracle.log_ratio(s)).sum() for s in sequences
        ]),
        "mismatch/chi2/sequence": share((ratios - 1) ** 2),
        "mismatch/ess/sequence": oracle.ess(ratios),
    }
    actual = metrics_of(ic.PRESETS[preset](), batch).to_floats()
    assert {k: actual[k] for k in expected} == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_tokens_look_healthy_where_sequences_do_not():
    old = 0.02 * torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) - 0.0002 - 1
    metrics = metrics_of(ic.token_tis(), make_batch(0)._replace(
        old_log_probs=old, rollout_log_probs=-torch.ones_like(old),
        mask=torch.ones_like(old, dtype=torch.bool), advantages=old,
    ))
    assert metrics["is/ess"] > 0.99
    assert metrics["mismatch/ess/sequence"] < 0.3
    assert metrics["mismatch/kl/sequence"].item() == pytest.approx(5000 * 2e-4, rel=0.1)


def test_the_effective_share_of_sequences_is_measured_where_every_ratio_is_nearly_nothing():
    log_ratio = torch.tensor([[-90.0], [-90.0], [-91.0]])
    metrics = metrics_of(ic.token_tis(), make_batch(0)._replace(
        old_log_probs=log_ratio - 1, rollout_log_probs=-torch.ones(3, 1),
        mask=torch.ones(3, 1, dtype=torch.bool), advantages=log_ratio,
    ))
    expected = oracle.ess(np.exp([0.0, 0.0, -1.0]))
    assert metrics["mismatch/ess/sequence"].item() == pytest.approx(expected, rel=1e-6)


def test_a_sequence_without_a_ratio_is_left_out_of_what_ratios_say():
    old = torch.tensor([[-1.0, -1.0], [-2.0, torch.nan], [torch.nan, torch.nan]])
    rollout, mask = torch.full((3, 2), -1.5), torch.tensor([[True] * 2, [True] * 2, [False] * 2])
    metrics = ic.token_tis()(old_log_probs=old, rollout_log_probs=rollout, mask=mask).metrics
    values = metrics.to_floats()
    assert values["batch/sequences"] == 2
    assert values["batch/length"] == 2
    assert values["mismatch/chi2/sequence"] == pytest.approx((np.e - 1) ** 2, rel=1e-6)
    assert values["mismatch/ess/sequence"] == 1
    k3 = 2 * (np.expm1(0.5) - 0.5) + np.expm1(-0.5) + 0.5
    assert values["mismatch/kl/sequence"] == pytest.approx(k3 / 2, rel=1e-6)


@pytest.mark.parametrize("bound", [None, ic.Ignore()])
def test_what_no_bound_changes_is_not_in_the_log(bound):
    batch = make_batch(0)
    layout = Layout(batch.mask, age=torch.zeros_like(batch.mask, dtype=torch.long))
    metrics = Correction(bound=bound)(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs, mask=layout
    ).metrics
    assert not [name for name in metrics if "bounded" in name]
    assert metrics["is/weight/mean"].isfinite()


@given(batch=batches(), cap=st.sampled_from([0.9, 1.0, 1.5]))
def test_weight_metrics_count_units_of_the_level(batch, cap):
    for correction, weigh in (
        (ic.token_tis(cap), lambda s: np.minimum(oracle.token_is(s), cap)),
        (
            ic.sequence_mis(high=cap),
            lambda s: oracle.product(s)[:1] * (oracle.product(s)[:1] <= cap),
        ),
    ):
        ratios = np.concatenate([
            oracle.product(s)[:1] if correction.level == "sequence" else oracle.token_is(s)
            for s in batch.sequences()
        ])
        weights = np.concatenate([weigh(s) for s in batch.sequences()])
        kept = weights[weights != 0]
        actual = metrics_of(correction, batch).to_floats()
        expected = {
            "is/weight/mean": share(kept),
            "is/weight/max": weights.max(initial=0),
            "is/kept_weight": share(weights),
            "is/ess": oracle.ess(weights),
            "is/bounded": share(weights != ratios),
            "is/chi2": share((ratios - 1) ** 2),
        }
        assert {k: actual[k] for k in expected} == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_rejection_counts_tokens():
    batch = make_batch(0, rows=4, width=6, scale=1.0)
    _, keep, metrics = ic.icepop()(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.mask,
    )
    rejected = 1 - keep.sum() / batch.mask.sum()
    assert metrics["is/rejected"].item() == pytest.approx(rejected.item())


def test_a_token_rule_leaves_a_sequence_its_weight_while_one_token_is_left():
    old = torch.tensor([[-1.0, -1.0, -1.0]])
    rollout = torch.tensor([[-1.5, -1.0, -1.0]])
    rule = ic.RatioOutside(level="token", low=0.9, high=1.1)
    _, keep, metrics = Correction(level="sequence", reject=(rule,))(
        old_log_probs=old, rollout_log_probs=rollout, mask=torch.ones(1, 3, dtype=torch.bool)
    )
    assert keep.tolist() == [[False, True, True]]
    assert metrics["is/kept_weight"].item() == pytest.approx(np.exp(0.5))
    assert metrics["is/rejected"].item() == pytest.approx(1 / 3)


def test_the_update_is_measured_against_the_old_policy():
    batch = make_batch(1)
    _, metrics = PolicyLoss(objective=ic.PPOClip())(
        batch.log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=batch.mask, old_log_probs=batch.old_log_probs,
    )
    d = (batch.log_probs - batch.old_log_probs)[batch.mask].numpy()
    assert metrics["policy/kl_k1"].item() == pytest.approx(-d.mean())
    assert metrics["policy/kl_k3"].item() == pytest.approx((np.expm1(d) - d).mean())
    r, a = np.exp(d), batch.advantages[batch.mask].numpy()
    clipped = ((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8))
    assert metrics["policy/clipped"].item() == pytest.approx(clipped.mean())


def test_k3_keeps_its_digits_where_good_stacks_live():
    d = torch.tensor([1e-4, -1e-4, 3e-3])
    exact = torch.expm1(d.double()) - d.double()
    torch.testing.assert_close(ic.k3(d).double(), exact, rtol=1e-2, atol=0)
    naive = (d.exp() - d - 1).double()
    assert ((naive - exact).abs() > 0.5 * exact)[:2].all()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_ratios_of_any_size_give_finite_metrics_in_float32(scale):
    batch = make_batch(2, rows=5, width=30, scale=scale).to(torch.float32)
    for preset in ic.PRESETS.values():
        values = metrics_of(preset(), batch).to_floats().values()
        assert np.isfinite(list(values)).all()


def test_merging_keeps_what_one_side_lacks():
    batch = make_batch(3)
    a = metrics_of(ic.token_tis(), batch)
    assert (a + Metrics({}, {})).to_floats() == a.to_floats() == (Metrics({}, {}) + a).to_floats()
    assert Metrics({}, {}).to_floats() == {}
    assert len(Metrics({}, {})) == 0
    with pytest.raises(KeyError):
        a["policy/clipped"]


def test_metrics_print_their_names():
    assert "mismatch/kl_k3" in repr(metrics_of(ic.token_tis(), make_batch(4)))


def test_effective_sample_size_ignores_scale_and_padding():
    weights = torch.tensor([[1e30, 2e30, torch.nan]])
    mask = torch.tensor([[True, True, False]])
    assert ic.effective_sample_size(weights, mask).item() == pytest.approx(0.9)
    assert ic.effective_sample_size(weights, torch.zeros_like(mask)) == 0


@given(seed=st.integers(0, 99))
def test_binary_kl_is_that_of_the_two_outcomes(seed):
    rng = np.random.default_rng(seed)
    p, q = rng.random((2, 20))
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    actual = ic.binary_kl(torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q)))
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def test_binary_kl_of_certain_tokens_is_zero_or_infinite():
    certain, half = torch.tensor([0.0]), torch.tensor([0.5]).log()
    assert ic.binary_kl(certain, certain) == 0
    assert ic.binary_kl(half, certain) == torch.inf
    assert ic.binary_kl(certain, half).item() == pytest.approx(np.log(2))


@given(seed=st.integers(0, 99), exponent=st.integers(-7, 0))
def test_the_distance_of_two_probabilities_keeps_its_digits(seed, exponent):
    rng = np.random.default_rng(seed)
    q = -rng.exponential(1.0, 20).astype(np.float32)
    p = np.minimum(q + np.float32(10.0**exponent) * rng.standard_normal(20, np.float32), 0)
    exact = abs(np.exp(p.astype(float)) - np.exp(q.astype(float)))
    actual = ic.probability_gap(torch.from_numpy(p), torch.from_numpy(q)).numpy()
    np.testing.assert_allclose(actual, exact, rtol=1e-6)


OF_A_REPORT = {"is/bias_mass"}


def make_metrics():
    batch = make_batch(0, rows=4, width=8)
    loss_fn = PolicyLoss(correction=ic.token_tis(), objective=ic.PPOClip())
    return loss_fn(
        batch.log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=batch.mask, old_log_probs=batch.old_log_probs,
    ).metrics


def test_every_metric_that_a_docstring_names_is_one():
    mentioned = set()
    for path in Path(ic.__file__).parent.rglob("*.py"):
        text = path.read_text()
        mentioned |= set(re.findall(r"`((?:is|mismatch|policy|batch)/[a-z0-9_/]+)`", text))
    assert mentioned
    assert mentioned <= set(make_metrics()) | OF_A_REPORT


def test_metrics_are_computed_once_however_they_are_read():
    metrics = make_metrics()

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.n += 1
            return function(*args, **(kwargs or {}))

    with Count() as first:
        dict(metrics)
    with Count() as second:
        again = {**metrics, **dict(metrics.items())}
    assert 0 < first.n < 80
    assert second.n == 0
    assert again["is/ess"] == metrics["is/ess"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ratios_divergences_and_caps_of_16_bits_are_those_of_the_same_numbers(dtype):
    d = torch.linspace(-3, 3, 400).to(dtype)[None]
    units = torch.ones_like(d, dtype=torch.bool)
    for f in (ic.k3, ic.ratio, lambda d: ic.ess_cap(ic.ratio(d).to(d.dtype), units, 0.9)):
        found, exact = f(d), f(d.double())
        assert found.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(found.double(), exact, rtol=1e-2 if exact.ndim == 0 else 1e-6,
                                   atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_effective_sample_of_16_bit_weights_is_summed_in_float32(dtype):
    mask = torch.ones(1, 5000, dtype=torch.bool)
    assert ic.effective_sample_size(torch.ones(1, 5000, dtype=dtype), mask) == 1
    weights = torch.rand(1, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = ic.effective_sample_size(weights.double(), mask)
    torch.testing.assert_close(ic.effective_sample_size(weights, mask).double(), wide)


def test_equal_weights_in_one_long_row_are_a_whole_sample():
    log_ratio = torch.full((2**20,), 0.9).log()
    found = ic.token_is()(
        old_log_probs=log_ratio, rollout_log_probs=torch.zeros_like(log_ratio),
        mask=Layout.from_cu_seqlens(torch.ones(2**20, dtype=torch.bool), torch.tensor([0, 2**20])),
    ).metrics
    assert found["is/ess"].item() == pytest.approx(1, abs=2e-5)
