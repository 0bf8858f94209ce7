"""Metrics for trainers that average what a loss returns: over micro-batches and ranks, or tokens.

An average of means weights every micro-batch alike, however few its tokens. Averages of sums and
of counts keep their quotient, so sums, counts and maxima are what such a trainer is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from iscorrect.layout import masked
from iscorrect.loss.divergences import k3
from iscorrect.loss.metrics import Metrics
from iscorrect.loss.ratios import difference, is_log_prob
from iscorrect.ranks import accumulator

PREFIX = "iscorrect/"


def sums(metrics: Metrics) -> dict[str, Tensor]:
    """Sums and counts, "" each, under "iscorrect/…": what may be averaged.

    Args:
        metrics: of a micro-batch.
    """
    return {PREFIX + name: x.to(accumulator(x.device)) for name, x in metrics.sums.items()}


def maxima(metrics: Metrics) -> dict[str, Tensor]:
    """Maxima, "" each, under "iscorrect/…_max", for trainers that take maxima of such names.

    Args:
        metrics: of a micro-batch.
    """
    named = metrics.maxima.items()
    return {f"{PREFIX}{name}_max": x.to(accumulator(x.device)) for name, x in named}


def floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    """All of them on the host, in one transfer."""
    if not values:
        return {}
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def from_averages(logged: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """The metrics of all micro-batches and ranks, from what the trainer has logged.

    Exact where the trainer weighs all of them alike: one that averages within mini-batches first,
    where every mini-batch has as many micro-batches.

    Only "batch/tokens" and "batch/sequences" are averages: of a micro-batch. Metrics that rest on
    maxima are there where the trainer logs maxima.

    Args:
        logged: one step; other names are ignored.
        prefix: what the trainer puts before every name.

    >>> from iscorrect.layout import Layout
    >>> from iscorrect.loss.metrics import policy_metrics
    >>> of = lambda x: policy_metrics(torch.tensor([x]), Layout(torch.ones(1, len(x)).bool()), None)
    >>> parts = [floats(sums(of([0.9]))), floats(sums(of([0.0, 0.0])))]
    >>> logged = {name: sum(part[name] for part in parts) / 2 for name in parts[0]}
    >>> round(from_averages(logged)["policy/kl_k1"], 4)
    -0.3
    """
    start = prefix + PREFIX
    ours = {
        name.removeprefix(start): torch.tensor(x, dtype=torch.float64)
        for name, x in logged.items() if name.startswith(start)
    }
    # counts below 1, as averages may be, would be read as 1
    added = {name: x * SCALE for name, x in ours.items() if not name.endswith("_max")}
    most = {name.removesuffix("_max"): x for name, x in ours.items() if name.endswith("_max")}
    unknown = dict.fromkeys(MAXIMA, torch.tensor(torch.nan, dtype=torch.float64))
    read = Metrics(added, unknown | most).to_floats()
    counts = {name: read[name] / SCALE for name in COUNTS if name in read}
    return {name: x for name, x in (read | counts).items() if not math.isnan(x)}


SCALE = 2.0**40
"""Large enough to lift any average count above 1; a power of two, so that nothing is rounded."""

COUNTS = ("batch/tokens", "batch/sequences")
"""Metrics that are no quotient."""

MAXIMA = ("abs", "log_ratio", "negative_log_ratio", "weight")
"""Names of the maxima that the metrics of a correction hold."""


def token_metrics(
    *, old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, weights: Tensor, keep: Tensor
) -> dict[str, Tensor]:
    """Values of every token, for trainers that reduce them exactly; "b t" each, 0 outside the mask.

    A token without a log-ratio counts in "is/nonfinite" and is 0 in "mismatch/…".

    Args:
        old_log_probs: "b t", log π_old, nats.
        rollout_log_probs: "b t", log μ, nats.
        mask: bool "b t".
        weights: "b t", of a correction.
        keep: bool "b t", of a correction.
    """
    finite = mask & is_log_prob(old_log_probs) & is_log_prob(rollout_log_probs)
    d = masked(difference(old_log_probs, rollout_log_probs), finite)
    return {
        "is/weight": weights, "is/rejected": (mask & ~keep).to(d.dtype),
        "is/nonfinite": (mask & ~finite).to(d.dtype), "mismatch/kl_k1": -d,
        "mismatch/kl_k3": k3(d),
        "mismatch/log_prob_diff": d.abs(),
    }
