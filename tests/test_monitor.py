"""The monitor on published curves, on clean noise of several kinds, on changes of known size."""

import logging
import math
from fractions import Fraction
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from batches import make_batch
from curves import HEALTHY, WRONG

import iscorrect as ic
from iscorrect.loop.monitor import to_logging, to_tensorboard, to_wandb

KL = "mismatch/kl_k3"


def alarms_of(values, bad="rise", every=1):
    monitor = ic.Monitor({KL: bad})
    steps = range(0, every * len(values), every)
    return [a for step, y in zip(steps, values, strict=True) for a in monitor.update(step, {KL: y})]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_published_healthy_curve_raises_no_alarm(name):
    assert alarms_of(HEALTHY[name]) == []


@pytest.mark.parametrize("name", WRONG)
def test_a_published_curve_that_went_wrong_does(name):
    first, *_ = alarms_of(WRONG[name])
    assert first.kind == "drift"
    assert first.now > 1.5 * first.before
    baseline = WRONG[name][: first.since]
    assert min(baseline) < first.before < max(baseline)


def remembering(rng, n, phi, draw):
    """Noise of first order whose variance is 1."""
    x = [0.0]
    for e in draw(n + 100):
        x.append(phi * x[-1] + math.sqrt(1 - phi**2) * e)
    return np.array(x[-n:])


def clean_noise(rng, n):
    """Logarithms of metrics that only fluctuate, by name."""
    normal, heavy = rng.standard_normal, lambda n: rng.standard_t(3, n) / math.sqrt(3)
    return {
        "normal": 0.3 * normal(n), "t of 3 degrees": 0.5 * heavy(n),
        "exponential": 0.5 * rng.exponential(size=n),
        "correlation 0.5": 0.3 * remembering(rng, n, 0.5, normal),
        "correlation 0.5, t of 3 degrees": 0.3 * remembering(rng, n, 0.5, heavy),
        "correlation 0.9": 0.1 * remembering(rng, n, 0.9, normal),
    }


@pytest.mark.parametrize("kind", [
    kind if kind == "normal" else pytest.param(kind, marks=pytest.mark.slow)
    for kind in clean_noise(np.random.default_rng(0), 1)
])
def test_a_false_alarm_is_rarer_than_one_in_ten_thousand_clean_steps(kind):
    rng = np.random.default_rng(5)
    count = sum(len(alarms_of(4e-4 * np.exp(clean_noise(rng, 500)[kind]))) for _ in range(40))
    assert count <= 1  # of 20,000 steps


@pytest.mark.parametrize(("size", "steps"), [(2, 10), (3, 6), (10, 6)])
def test_a_jump_is_seen_within_a_few_steps(size, steps):
    rng, seen = np.random.default_rng(0), []
    for _ in range(40):
        noise = np.exp(0.1 * rng.standard_normal(120))
        alarms = alarms_of(1e-3 * noise * np.where(np.arange(120) < 100, 1, size))
        seen.append(alarms[0])
        assert len(alarms) == 1
    assert all(alarm.step >= 100 for alarm in seen)
    assert np.quantile([alarm.step - 99 for alarm in seen], 0.95) <= steps
    assert np.quantile([abs(alarm.since - 100) for alarm in seen], 0.95) <= 1
    assert np.mean([alarm.kind == "jump" for alarm in seen]) > 0.9
    assert np.median([alarm.now / alarm.before for alarm in seen]) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(("factor", "by"), [(1.01, 2.2), (1.02, 2.7)])
def test_a_growth_of_a_per_cent_a_step_is_seen_before_it_is_threefold(factor, by):
    rng, seen = np.random.default_rng(0), []
    for _ in range(40):
        noise = np.exp(0.1 * rng.standard_normal(200))
        seen.append(alarms_of(1e-3 * noise * factor ** np.arange(200))[0])
    assert np.quantile([factor**alarm.step for alarm in seen], 0.95) < by
    assert np.mean([alarm.kind == "drift" for alarm in seen]) > 0.5


@pytest.mark.parametrize("noise", [0, 0.05])
@pytest.mark.parametrize(("factor", "by"), [(1.01, 1.6), (1.05, 2.3), (1.2, 4), (1.5, 8)])
def test_a_growth_after_calm_steps_is_seen_however_steep_it_is(factor, by, noise):
    rng, grown = np.random.default_rng(0), factor ** np.maximum(np.arange(400) - 99, 0)
    for _ in range(5):
        first, *_ = alarms_of(1e-4 * (grown * np.exp(noise * rng.standard_normal(400)))[:170])
        assert first.step >= 100
        assert grown[first.step] < by


@pytest.mark.parametrize(("factor", "by"), [(1.01, 2), (1.05, 4), (1.2, 16), (1.5, 200)])
def test_a_growth_from_the_first_step_without_noise_is_seen(factor, by):
    first, *_ = alarms_of(1e-4 * factor ** np.arange(120))
    assert factor**first.step < by


def test_one_wild_step_is_no_alarm():
    rng = np.random.default_rng(0)
    y = 1e-3 * np.exp(0.1 * rng.standard_normal(100))
    y[60] *= 1000
    assert alarms_of(y) == []


def test_a_fall_is_seen_where_a_fall_is_bad():
    ess = [0.95, 0.94, 0.96] * 20 + [0.2] * 10
    (alarm,) = alarms_of(ess, bad="fall")
    assert alarm.since == 60
    assert (alarm.before, alarm.now) == pytest.approx((0.95, 0.2), rel=0.01)
    assert alarms_of(ess) == []


def test_since_is_a_step_of_the_run_where_not_every_step_is_logged():
    (alarm,) = alarms_of([1e-3] * 30 + [1e-2] * 6, every=10)
    assert alarm.since == 300


def test_after_an_alarm_the_new_level_is_the_past():
    alarms = alarms_of([1e-3] * 30 + [1e-2] * 60 + [1e-1] * 20)
    assert [alarm.since for alarm in alarms] == [30, 90]


def test_the_scale_of_a_metric_does_not_matter():
    y = np.array(WRONG["prime-rl, NIXL"])
    assert [a.step for a in alarms_of(y)] == [a.step for a in alarms_of(1e6 * y)]


def test_metrics_of_a_loss_are_taken_as_they_are():
    batch = make_batch(0)
    _, metrics = ic.PolicyLoss()(
        batch.log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=batch.mask,
    )
    monitor = ic.Monitor()
    assert set(monitor.watch) <= set(metrics)
    assert monitor.update(0, metrics) == monitor.update(1, metrics.to_floats()) == []


def test_what_is_not_finite_is_an_alarm_at_once_and_no_part_of_the_past():
    monitor = ic.Monitor({KL: "rise"})
    for step in range(20):
        monitor.update(step, {KL: 1e-3})
    (alarm,) = monitor.update(20, {KL: torch.tensor(math.nan)})
    assert str(alarm) == "step 20: mismatch/kl_k3 is nan"
    assert [alarm.kind for alarm in monitor.update(21, {KL: math.inf})] == ["not finite"]
    assert monitor.update(22, {KL: 1e-3}) == []


def test_nan_at_every_step_is_one_alarm_and_again_one_after_a_number():
    values = [1e-3] * 3 + [math.nan] * 5 + [1e-3] + [math.nan] * 5
    assert [alarm.step for alarm in alarms_of(values)] == [3, 9]


@pytest.mark.parametrize("nothing", [{"batch/tokens": 0.0}, {"is/nonfinite": 1.0}])
def test_the_zeros_of_a_batch_in_which_nothing_was_measured_are_no_values(nothing):
    monitor = ic.Monitor({KL: "rise", "ess": "fall"})
    for step in range(60):
        measured = step % 2
        metrics = {KL: 1e-3, "batch/tokens": 9.0} if measured else {KL: 0.0, **nothing}
        assert monitor.update(step, metrics | {"ess": 0.9}) == []
    (alarm,) = [a for s in range(60, 70) for a in monitor.update(s, {KL: 1e-2, "ess": 0.9})]
    assert (alarm.before, alarm.now) == (1e-3, 1e-2)


def test_metrics_of_a_loss_without_a_counted_token_are_no_values():
    batch = make_batch(0)
    _, metrics = ic.PolicyLoss()(
        batch.log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=torch.zeros_like(batch.mask),
    )
    monitor = ic.Monitor()
    for step in range(30):
        found = metrics if step > 15 else {"mismatch/ess/sequence": 0.9, KL: 1e-3}
        assert monitor.update(step, found) == []


def test_what_is_said_of_before_and_now_are_medians_of_values_that_occurred():
    (fallen,) = alarms_of([0.9] * 20 + [0.0] * 20, bad="fall")
    assert (fallen.before, fallen.now) == (0.9, 0)
    (risen,) = alarms_of([0.0] * 20 + [1e-3] * 20)
    assert (risen.before, risen.now) == (0, 1e-3)


@pytest.mark.parametrize("number", [
    np.float32, np.float64, np.float16, np.array, lambda y: np.array([y]), Fraction, torch.tensor,
    lambda y: torch.tensor([y]),
])
def test_numbers_of_every_kind_are_taken(number):
    values = [number(1.0)] * 20 + [number(8.0)] * 4
    assert [alarm.since for alarm in alarms_of(values)] == [20]
    assert alarms_of([np.int64(1)] * 20 + [np.int64(8)] * 4)[0].now == 8


def test_what_rounding_took_below_zero_is_zero():
    assert alarms_of([-1e-9, 1e-3] * 20) == alarms_of([0.0, 1e-3] * 20)
    (alarm,) = alarms_of([torch.tensor(-1e-9)] * 20 + [1e-3] * 20)
    assert alarm.before == 0


def test_a_metric_that_is_missing_or_always_zero_says_nothing():
    monitor = ic.Monitor({KL: "rise"})
    assert [monitor.update(step, {"loss": -1.0}) for step in range(9)] == [[]] * 9
    assert alarms_of([0.0] * 50) == []
    assert alarms_of([1e-3, None] * 30) == alarms_of([1e-3] * 30) == []


def test_one_who_cannot_be_told_ends_nothing_and_keeps_no_other_from_it():
    def broken(alarm):
        raise OSError("no net")

    heard = []
    monitor = ic.Monitor({KL: "rise"}, notify=[broken, heard.append])
    with pytest.warns(UserWarning, match="no net"):
        for step in range(60):
            monitor.update(step, {KL: 4e-4 if step < 50 else 4e-3})
    assert len(heard) == 1


@pytest.mark.parametrize(("make", "said"), [
    (lambda: ic.Monitor({}), "at least one metric"),
    (lambda: ic.Monitor({KL: "up"}), "one of 'rise', 'fall'"),
    (lambda: ic.Monitor({"loss": "rise"}).update(0, {"loss": -1.0}), "never negative"),
    (lambda: ic.Monitor().update(0, {KL: "high"}), "never negative"),
    (lambda: ic.Monitor().update(0, {KL: True}), "never negative"),
    (lambda: ic.Monitor().update(0, {KL: torch.ones(2)}), "never negative"),
    (lambda: ic.Monitor().update(0, {KL: np.float32(-2e-6)}), "never negative"),
    (lambda: ic.Monitor().update(0, None), "Metrics, or a dict of numbers"),
    (lambda: ic.Monitor([KL]), "a dict of at least one metric"),
    (lambda: ic.Monitor(None), "at least one metric"),
    (lambda: ic.Monitor(notify=print), "a sequence of callables"),
    (lambda: ic.Monitor(notify=[3]), "a sequence of callables"),
])
def test_what_it_cannot_watch_is_refused(make, said):
    with pytest.raises(ic.InputError, match=said):
        make()


def told(notify):
    monitor = ic.Monitor({KL: "rise"}, notify=[notify])
    for step, y in enumerate([1e-3] * 30 + [1e-2] * 6):
        monitor.update(step, {KL: y})


def test_a_logger_is_told(caplog):
    told(to_logging(logging.getLogger("run")))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "mismatch/kl_k3 is 1.0e-02 since step 30, 1.0e-03 before (jump)" in record.message


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_is_told(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        told(to_tensorboard(writer))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors("iscorrect/alarm/text_summary")
    assert b"since step 30" in event.tensor_proto.string_val[0]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_is_told(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    said = []
    with wandb.init(dir=str(tmp_path), project="test") as run:
        alert = partial(type(run).alert, run)
        monkeypatch.setattr(run, "alert", lambda **given: (said.append(given), alert(**given)))
        told(to_wandb(run))
    assert said == [{
        "title": "mismatch/kl_k3: jump",
        "text": "step 33: mismatch/kl_k3 is 1.0e-02 since step 30, 1.0e-03 before (jump)",
    }]
