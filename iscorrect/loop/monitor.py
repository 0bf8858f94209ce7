"""Whether a metric of a run leaves the noise of its own past."""

from __future__ import annotations

import logging
import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

from iscorrect.errors import check_choice, check_number, describe, input_error
from iscorrect.loss.metrics import Metrics

Bad = Literal["rise", "fall"]
Kind = Literal["jump", "drift", "not finite"]
Notify = Callable[["Alarm"], object]

WATCHED: Mapping[str, Bad] = {
    "mismatch/kl_k3": "rise", "mismatch/log_prob_diff/mean": "rise", "mismatch/ess/sequence": "fall"
}

FEWEST, MOST = 6, 256
"""Steps of a baseline: a third of the steps so far, within these."""

WINDOW = 128
"""Steps before the present one that the sum may reach back."""

SCALE, SCALE_STEPS = 0.3, 12
"""The scale of a logarithm's noise before anything is known, and how many steps that counts for."""

MEMORY, MEMORY_STEPS = 0.4, 12
"""The correlation of the noise with that of the step before, likewise."""

ROUNDING = 1e-6
"""What a metric that is never negative may lie below zero."""

SLACK, LARGEST, THRESHOLD = 1.25, 3.5, 10.0


@dataclass(frozen=True)
class Alarm:
    """A metric that left the noise of its own past.

    Attributes:
        metric: its name.
        step: at which it was seen.
        kind: "jump", at its new level from the beginning; "drift", by and by; "not finite", NaN or
            infinite.
        since: the step from which on it was beyond its past, as far as can be told.
        before: its median in the baseline, NaN where there was none.
        now: its median since then; of a drift, in the later half of it.

    >>> print(Alarm("mismatch/kl_k3", 120, "jump", 116, 4e-4, 2e-3))
    step 120: mismatch/kl_k3 is 2.0e-03 since step 116, 4.0e-04 before (jump)
    """

    metric: str
    step: int
    kind: Kind
    since: int
    before: float
    now: float

    def __str__(self) -> str:
        if self.kind == "not finite":
            return f"step {self.step}: {self.metric} is {self.now}"
        return (
            f"step {self.step}: {self.metric} is {self.now:.1e} since step {self.since},"
            f" {self.before:.1e} before ({self.kind})"
        )


class Monitor:
    """Tells jumps and drifts of a run's metrics from their noise, step by step.

        x = log y, −log y where a fall is bad
        m, s   mean and scale of x over the baseline, the first third of the steps
        κ      (1 + φ)/(1 − φ), φ the correlation of the noise with that of the step before
        S      max_j Σ_{i ≥ j} (min((x_i − m)/s, 3.5 κ) − 1.25), over at most 128 steps
        alarm where S > 10 κ

    A cumulative sum (CUSUM) whose baseline is the run itself, so that it needs no threshold of the
    metric. Noise that remembers makes long excursions, so the sum has to be larger by κ; no single
    step is enough for an alarm, so that heavy tails are none. As long as the run has told little,
    s is held near 0.3 and φ near 0.4. φ comes from the differences of successive steps, which
    a slow drift leaves alone; where S is too small for an alarm, it is tried again with those
    before j and those since j less their medians, which a steep drift leaves alone too.

    Nothing is said in the first six steps. After an alarm the metric's past begins anew.
    A zero counts as half the least positive value, and so does what rounding took below zero, by
    less than 10⁻⁶. NaN and infinities are no part of the past; of many alike in a row the first is
    an alarm. Where no token was measured (``batch/tokens`` is 0, or ``is/nonfinite`` 1), the zeros
    of ``mismatch/…`` are none of its values and are left out.

    Args:
        watch: names of metrics that are never negative, and whether their "rise" or "fall" is bad.
        notify: called with every alarm: :func:`to_logging`, :func:`to_wandb`,
            :func:`to_tensorboard`, or any callable; what it raises becomes a warning.

    Raises:
        InputError: no mapping or an empty one, another word than "rise" or "fall", or a ``notify``
            that is no sequence of callables.

    References:
        Page, "Continuous inspection schemes" (1954); Hawkins, "Self-starting CUSUM charts" (1987).

    >>> monitor = Monitor({"mismatch/kl_k3": "rise"}, notify=[print])
    >>> for step in range(60):
    ...     alarms = monitor.update(step, {"mismatch/kl_k3": 4e-4 if step < 50 else 4e-3})
    step 53: mismatch/kl_k3 is 4.0e-03 since step 50, 4.0e-04 before (jump)
    """

    def __init__(
        self, watch: Mapping[str, Bad] = WATCHED, *, notify: Sequence[Notify] = ()
    ) -> None:
        if not isinstance(watch, Mapping) or not watch:
            raise input_error(
                "Monitor", "watch", expected="a dict of at least one metric",
                got="none" if isinstance(watch, Mapping) else describe(watch),
                fix="pass watch={'mismatch/kl_k3': 'rise'}, or leave it out",
            )
        if not isinstance(notify, Sequence) or not all(map(callable, notify)):
            raise input_error(
                "Monitor", "notify", expected="a sequence of callables", got=repr(notify),
                fix="pass notify=[print], or leave it out",
            )
        for name, bad in watch.items():
            check_choice("Monitor", f"watch[{name!r}]", bad, get_args(Bad))
        self.watch, self.notify = dict(watch), tuple(notify)
        self._past: dict[str, list[tuple[int, float]]] = {name: [] for name in watch}
        self._not_finite: dict[str, str] = {}

    def update(self, step: int, metrics: Metrics | Mapping[str, float | Tensor]) -> list[Alarm]:
        """Take in the metrics of a step.

        Args:
            step: of the training run.
            metrics: by flat name, of all micro-batches and ranks; others than those watched are
                ignored, and one that is missing or None is taken as not measured at this step.

        Returns:
            The alarms of this step.

        Raises:
            InputError: a watched metric is negative, or no number; ``metrics`` is no mapping.
        """
        if not isinstance(metrics, Mapping):
            raise input_error(
                "Monitor", "metrics", expected="Metrics, or a dict of numbers",
                got=describe(metrics), fix="pass the second thing that the loss returns",
            )
        unmeasured = "mismatch/" if _nothing_measured(metrics) else ()
        watched = {
            name: _number(name, metrics[name]) for name in self.watch
            if metrics.get(name) is not None and not name.startswith(unmeasured)
        }
        found = [self._take(step, name, y) for name, y in watched.items()]
        alarms = [alarm for alarm in found if alarm is not None]
        for alarm, notify in product(alarms, self.notify):
            try:
                notify(alarm)
            except Exception as error:  # a broken pager must not end the run, nor keep others still
                warnings.warn(f"Monitor: {notify!r} raised {error!r} at: {alarm}", stacklevel=2)
        return alarms

    def _take(self, step: int, name: str, y: float) -> Alarm | None:
        said = self._not_finite.pop(name, None)
        if not math.isfinite(y):
            self._not_finite[name] = str(y)
            return None if said == str(y) else Alarm(name, step, "not finite", step, math.nan, y)
        past = self._past[name]
        past.append((step, y))
        seen = excursion(np.array([y for _, y in past]), self.watch[name])
        if seen is None:
            return None
        since, _ = past[-seen.steps]
        past.clear()
        return Alarm(name, step, seen.kind, since, seen.before, seen.now)


class Excursion(NamedTuple):
    """The last steps of a series that left its past.

    Attributes:
        kind: "jump" or "drift".
        steps: how many they are.
        before: the median of the baseline.
        now: that of these steps; of a drift, of the later half of them.
    """

    kind: Kind
    steps: int
    before: float
    now: float


def excursion(y: np.ndarray[Any, np.dtype[np.float64]], bad: Bad) -> Excursion | None:
    """Whether a series has left its past in its last steps, by the equations of :class:`Monitor`.

    Args:
        y: values "n" ≥ 0 of a metric, step by step.
        bad: whether its "rise" or its "fall" is looked for.

    >>> excursion(np.array([1.0] * 20 + [8.0] * 4), "rise").steps
    4
    """
    positive = y[y > 0]
    if len(y) <= FEWEST or not len(positive):
        return None
    x = np.log(np.maximum(y, positive.min() / 2)) * (1 if bad == "rise" else -1)
    past = x[: min(max(len(x) // 3, FEWEST), MOST)]
    n, mean = len(past), past.mean()
    spread = SCALE_STEPS * SCALE**2 + ((past - mean) ** 2).sum()
    scale = math.sqrt(spread / (SCALE_STEPS + n - 1) * (1 + 1 / n))  # that of a value less the mean
    z = (x[n:][-WINDOW:] - mean) / scale
    differences = np.diff(x[-MOST:])
    steps, over = _furthest(z, _memory(differences))
    if over <= 0 and steps > 2:  # a steep drift goes one way, as noise that remembers does
        differences[:-steps] -= np.median(differences[:-steps])
        differences[-steps:] -= np.median(differences[-steps:])
        steps, over = _furthest(z, _memory(differences))
    if over <= 0:
        return None
    z = z[-steps:]
    half = steps // 2
    drifts = half > 2 and z[half:].mean() - z[:half].mean() > z.mean() / 4
    return Excursion(
        "drift" if drifts else "jump", steps, float(np.median(y[:n])),
        float(np.median(y[-steps:][half if drifts else 0 :])),
    )


def _furthest(z: np.ndarray[Any, np.dtype[np.float64]], memory: float) -> tuple[int, float]:
    """The number of last steps whose sum S is largest, and by how much it is over 10 κ."""
    kappa = (1 + memory) / (1 - memory)
    sums = (np.minimum(z, LARGEST * kappa) - SLACK)[::-1].cumsum()
    return int(sums.argmax()) + 1, float(sums.max() - THRESHOLD * kappa)


def _memory(differences: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """The correlation φ of noise with that of the step before, from its differences.

    Of a stationary noise of first order they correlate by −(1 − φ)/2. A jump is one of them that is
    large, and is held at three times their scale.
    """
    limit = 3 * 1.48 * np.median(np.abs(differences))
    d = differences.clip(-limit, limit)
    squares = float((d * d).sum())
    n = len(d) if squares > 0 else 0
    found = 1 + 2 * float((d[1:] * d[:-1]).sum()) / squares if squares > 0 else 0.0
    held = (n * min(max(found, 0.0), 1.0) + MEMORY_STEPS * MEMORY) / (n + MEMORY_STEPS)
    return min(held, 0.97)


def _nothing_measured(metrics: Mapping[str, Any]) -> bool:
    """Whether metrics of a loss are those of a batch in which no token had both log-probs."""
    return bool(metrics.get("batch/tokens") == 0 or metrics.get("is/nonfinite") == 1)


def _number(name: str, y: object) -> float:
    one = isinstance(y, Tensor | np.ndarray | np.generic) and math.prod(y.shape) == 1
    value: Any = y.item() if one else y  # type: ignore[attr-defined]
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            return number
        if -ROUNDING < number < 0:
            return 0.0
        value = number
    check_number("Monitor", name, value, "a metric that is never negative", least=0)
    return float(value)


def to_logging(logger: logging.Logger) -> Notify:
    """Alarms as warnings of a logger of Python's."""
    return lambda alarm: logger.warning("%s", alarm)


def to_wandb(run: Any) -> Notify:
    """Alarms as alerts of a run of Weights & Biases: by mail or Slack, as its user has set.

    Args:
        run: what ``wandb.init`` returns.
    """
    return lambda alarm: run.alert(title=f"{alarm.metric}: {alarm.kind}", text=str(alarm))


def to_tensorboard(writer: Any) -> Notify:
    """Alarms as texts of TensorBoard.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
    """
    return lambda alarm: writer.add_text("iscorrect/alarm", str(alarm), alarm.step)
