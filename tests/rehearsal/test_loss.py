"""The losses on rehearsed devices: nothing waits, stays on the host, or needs float64."""

import pytest
import torch
from batches import make_batch
from components import LOSSES

from iscorrect import Layout
from rehearsal import Rehearsal


def run(loss_fn, device, *, packed):
    batch = make_batch(0, rows=4, width=12).to(torch.float32)
    ids = torch.arange(12).expand(4, 12) // 4 if packed else None
    age = batch.ages() if packed else None
    with device:
        layout = Layout(batch.mask, sequence_ids=ids, age=age)
        log_probs = batch.log_probs.clone().requires_grad_()
        loss, metrics = loss_fn(
            log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
            mask=layout, old_log_probs=batch.old_log_probs,
            ref_log_probs=batch.ref_log_probs if loss_fn.reference_kl else None,
        )
        loss.backward()
        before = sum(device.ledger.waits.values())
        metrics.to_floats()
    return before, sum(device.ledger.waits.values()) - before


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_makes_nobody_wait_and_its_metrics_once(name, packed):
    assert run(LOSSES[name], Rehearsal(), packed=packed) == (0, 1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_needs_no_float64(name, packed):
    run(LOSSES[name], Rehearsal("mps:0", float64=False), packed=packed)
