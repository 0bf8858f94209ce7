"""What a trainer averages over micro-batches and ranks still gives the metrics of the batch."""

import itertools
import math

import pytest
import torch
from batches import make_batch

from iscorrect import Layout, PolicyLoss, PPOClip, parse
from iscorrect.adapters.averages import COUNTS, floats, from_averages, maxima, sums

CORRECTIONS = ["token-tis:cap=1.1", "sequence-mis:high=3", "geometric-rs", "uncorrected"]


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("cuts", [[8], [1, 3, 4], [2, 2, 2, 2], [1] * 8])
def test_averages_give_every_metric_of_the_whole_batch(correction, cuts):
    batch = make_batch(3, rows=8, width=9, scale=0.3)
    loss_fn = PolicyLoss(correction=parse(correction), objective=PPOClip())

    def metrics_of(x):
        return loss_fn(
            x.log_probs, old_log_probs=x.old_log_probs, rollout_log_probs=x.rollout_log_probs,
            advantages=x.advantages, mask=Layout(x.mask, age=x.mask.long()),
        ).metrics

    ends = torch.tensor([0, *cuts]).cumsum(0).tolist()
    parts = [metrics_of(batch.rows(slice(*pair))) for pair in itertools.pairwise(ends)]
    logged = {}
    for part in parts:
        for name, x in floats(sums(part)).items():
            logged[name] = logged.get(name, 0.0) + x / len(parts)
        for name, x in floats(maxima(part)).items():
            logged[name] = max(logged.get(name, -math.inf), x)
    whole = metrics_of(batch).to_floats()
    expected = {
        name: x / len(parts) if name in COUNTS else x
        for name, x in whole.items() if not math.isnan(x)
    }
    assert from_averages(logged) == pytest.approx(expected, rel=1e-9)
