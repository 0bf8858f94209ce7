"""Normalizers and metrics over data-parallel ranks, with real processes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import make_batch

import iscorrect as ic
from iscorrect import PolicyLoss

RANKS = 2


def share(rank):
    return slice(0, 1) if rank == 0 else slice(1, 4)


def on_rank(rank, rendezvous, aggregation, gradients, results):
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    part = make_batch(3, rows=4, width=6).rows(share(rank))
    normalizer = ic.global_normalizer(part.mask, aggregation, gradients=gradients)
    log_probs = part.log_probs.clone().requires_grad_()
    loss, metrics = loss_fn(aggregation)(
        log_probs, rollout_log_probs=part.rollout_log_probs, advantages=part.advantages,
        mask=part.mask, old_log_probs=part.old_log_probs, normalizer=normalizer,
    )
    loss.backward()
    results[rank] = (loss.item(), log_probs.grad.numpy(), metrics.all_reduced().to_floats())
    dist.destroy_process_group()


def loss_fn(aggregation):
    return PolicyLoss(
        correction=ic.sequence_tis(), objective=ic.PPOClip(), aggregation=aggregation
    )


@pytest.mark.parametrize(
    ("aggregation", "gradients"),
    [("token-mean", "averaged"), ("seq-mean-token-mean", "summed")],
)
def test_ranks_of_unequal_size_give_the_loss_and_metrics_of_the_whole_batch(
    tmp_path, aggregation, gradients
):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(
            on_rank, (f"file://{tmp_path}/store", aggregation, gradients, results), nprocs=RANKS
        )
        results = dict(results)
    batch = make_batch(3, rows=4, width=6)
    reference = PolicyLoss(**vars(loss_fn(aggregation)))
    log_probs = batch.log_probs.clone().requires_grad_()
    whole, metrics = reference(
        log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=batch.mask, old_log_probs=batch.old_log_probs,
    )
    whole.backward()
    scale = 1 / RANKS if gradients == "averaged" else 1
    assert sum(loss for loss, _, _ in results.values()) * scale == pytest.approx(whole.item())
    for rank, (_, gradient, merged) in results.items():
        torch.testing.assert_close(torch.from_numpy(gradient) * scale, log_probs.grad[share(rank)])
        assert merged == pytest.approx(metrics.to_floats(), rel=1e-12, abs=1e-15)
