"""Caps that depend on the data, against brute force."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, strategies as st

import iscorrect as ic


def ratios(seed, n, spread):
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(np.exp(spread * rng.standard_normal((1, n))))
    return values, torch.from_numpy(rng.random((1, n)) < 0.8)


draws = dict(seed=st.integers(0, 999), n=st.integers(1, 30), spread=st.sampled_from([0.01, 1, 5]))


class Capped:
    """A bound that remembers the cap it was given."""

    def __init__(self, limit):
        self.limit = limit

    def __call__(self, ratio, evidence):
        self.cap = self.limit(ratio, evidence).item()
        return ratio.clamp(max=self.cap)


def cap_of(limit, values, mask):
    bound = Capped(limit)
    ic.Correction(bound=bound)(
        old_log_probs=values.log() - 9, rollout_log_probs=torch.full_like(values, -9.0), mask=mask
    )
    return bound.cap


@given(**draws)
def test_ionides_cap_is_root_n_times_the_mean(seed, n, spread):
    values, units = ratios(seed, n, spread)
    counted = values[units].numpy()
    expected = np.sqrt(len(counted)) * counted.mean() if len(counted) else 0
    assert cap_of(ic.IonidesCap(), values, units) == pytest.approx(expected, rel=1e-12)


@given(**draws)
def test_the_mse_optimal_cap_takes_chi_squared_from_the_batch(seed, n, spread):
    values, units = ratios(seed, n, spread)
    counted = values[units].numpy()
    chi2 = ((counted - 1) ** 2).mean() if len(counted) else 0
    expected = (max(len(counted), 1) * (1 + chi2) ** 2 / 8) ** (1 / 3)
    assert cap_of(ic.MSEOptimalCap(), values, units) == pytest.approx(expected, rel=1e-9)


@given(n=st.integers(1, 5000), chi2=st.floats(0, 100))
def test_the_mse_optimal_cap_minimises_the_bound(n, chi2):
    cap = ic.mse_optimal_cap(torch.tensor(float(n)), torch.tensor(chi2, dtype=torch.float64)).item()

    def bound(c):
        return (1 + chi2) ** 2 / (16 * c**2) + c / n

    assert bound(cap) <= min(bound(cap * 1.01), bound(cap / 1.01))


@given(**draws, target=st.floats(0.05, 1))
def test_the_ess_cap_is_the_largest_that_keeps_the_target(seed, n, spread, target):
    values, units = ratios(seed, n, spread)
    counted = values[units].numpy()
    cap = ic.ess_cap(values, units, target).item()
    if not len(counted):
        assert cap == 0
        return
    smallest = counted.min()
    assert oracle.ess(np.minimum(counted, cap)) >= target - 1e-9 or cap <= smallest * (1 + 1e-9)
    if cap < counted.max() * (1 - 1e-9):
        assert oracle.ess(np.minimum(counted, cap * 1.001)) < target + 1e-6


@pytest.mark.parametrize(
    ("limit", "largest"), [(ic.IonidesCap(), 1e4), (ic.MSEOptimalCap(), 9.0), (ic.ESSCap(0.7), 9.0)]
)
def test_a_data_dependent_cap_bounds_weights_and_masks_alike(limit, largest):
    values, _ = ratios(1, 20, 1.0)
    values[0, 0] = largest
    mask = torch.ones_like(values, dtype=torch.bool)
    cap = cap_of(limit, values, mask)
    batch = dict(old_log_probs=values.log() - 9, rollout_log_probs=values.new_full((1, 20), -9.0))
    truncated = ic.Correction(bound=ic.Truncate(limit))(**batch, mask=mask)
    masked = ic.Correction(bound=ic.Mask(high=limit))(**batch, mask=mask)
    torch.testing.assert_close(truncated.weights, values.clamp(max=cap))
    torch.testing.assert_close(masked.weights, torch.where(values <= cap, values, 0))
    assert 0 < truncated.metrics["is/bounded"] < 1


def test_sequence_level_caps_count_sequences_not_tokens():
    log_ratio = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    weights = ic.Correction(level="sequence", bound=ic.Truncate(ic.IonidesCap()))(
        old_log_probs=log_ratio - 3, rollout_log_probs=torch.full((2, 4), -3.0), mask=mask
    ).weights
    cap = 2**0.5 * (np.e + 1) / 2
    assert weights[0].tolist() == pytest.approx([min(np.e, cap)] * 4, rel=1e-6)


@pytest.mark.parametrize("target", [0, -1, 1.5])
def test_an_ess_target_is_a_fraction(target):
    with pytest.raises(ic.InputError, match=r"ESSCap: `target` must be in \(0, 1\]"):
        ic.ESSCap(target)
