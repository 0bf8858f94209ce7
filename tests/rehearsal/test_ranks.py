"""What ranks send each other lies on the device, as NCCL wants it, and is the same as on a CPU."""

import datetime
import multiprocessing

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import make_batch

import iscorrect as ic
from iscorrect import Layout, PolicyLoss
from rehearsal import Rehearsal

N, V, D = 24, 40, 8
HEADS = 4


def head(group, trained, sequence_parallel):
    """Log-probs and gradients of a head in two shards."""
    generator = torch.Generator().manual_seed(0)
    rank = dist.get_rank()
    hidden = torch.randn(2, N, D, generator=generator)
    weight = torch.randn(2 * V, D, generator=generator).chunk(2)[rank].clone()
    target = torch.randint(2 * V, (2, N), generator=generator)
    advantages = torch.randn(2, N, generator=generator)
    hidden = hidden.chunk(2, 1)[rank].clone() if sequence_parallel else hidden
    hidden.requires_grad_()
    weight.requires_grad_(trained)

    def run():
        log_probs = ic.linear_log_probs(
            hidden, weight, target, chunk_size=10, vocabulary_group=group,
            sequence_parallel=sequence_parallel,
        )
        (log_probs * advantages).sum().backward()
        return [log_probs.detach(), hidden.grad, *([weight.grad] if trained else [])]

    return run


def fused(group, loss_fn, old):
    generator = torch.Generator().manual_seed(1)
    rank = dist.get_rank()
    hidden = torch.randn(2, N, D, generator=generator).requires_grad_()
    weight = torch.randn(2 * V, D, generator=generator).chunk(2)[rank].clone().requires_grad_()
    target = torch.randint(2 * V, (2, N), generator=generator)
    rollout = torch.full((2, N), -5.0)
    advantages = torch.randn(2, N, generator=generator)
    advantages[:, ::4] = 0
    mask = torch.ones(2, N, dtype=torch.bool)

    def run():
        loss, metrics = ic.fused_policy_loss(
            loss_fn, hidden=hidden, weight=weight, target=target, rollout_log_probs=rollout,
            advantages=advantages, mask=mask, old_log_probs=rollout + 0.01 if old else None,
            chunk_size=10, vocabulary_group=group,
        )
        loss.backward()
        return [loss.detach(), hidden.grad, weight.grad, *metrics.values()]

    return run


def shared_sequences(group):
    """Each rank holds half of the tokens of every sequence."""
    batch = make_batch(0, rows=4, width=12).to(torch.float32)
    half = slice(6 * dist.get_rank(), 6 * dist.get_rank() + 6)
    log_probs = batch.log_probs[:, half].clone().requires_grad_()

    def run():
        loss, metrics = PolicyLoss(correction=ic.sequence_tis())(
            log_probs, rollout_log_probs=batch.rollout_log_probs[:, half],
            advantages=batch.advantages[:, half],
            mask=Layout(batch.mask[:, half], sequence_group=group),
        )
        loss.backward()
        return [loss.detach(), log_probs.grad, *metrics.all_reduced(group).values()]

    return run


def whole_batch(group):
    """What looks at the batch on all ranks."""
    batch = make_batch(dist.get_rank(), rows=4, width=12).to(torch.float32)

    def run():
        loss, _ = PolicyLoss(correction=ic.pareto_is())(
            batch.log_probs, rollout_log_probs=batch.rollout_log_probs,
            advantages=batch.advantages, mask=Layout(batch.mask, batch_group=group),
        )
        return [loss, ic.global_normalizer(batch.mask, group=group, gradients="summed")]

    return run


def cases(group):
    for trained in (True, False):
        for sequence_parallel in (True, False):
            yield head(group, trained, sequence_parallel)
    for correction, old in ((ic.token_tis(), False), (ic.sequence_tis(), True)):
        yield fused(group, PolicyLoss(correction=correction), old)
    yield shared_sequences(group)
    yield whole_batch(group)


def start(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    pairs = zip(cases(dist.group.WORLD), cases(dist.group.WORLD), strict=True)
    for i, (on_cpu, on_device) in enumerate(pairs):
        expected = on_cpu()
        with Rehearsal() as gpu:
            found = on_device()
        assert all(x.isfinite().all() for x in expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if i < HEADS:  # ranks wait for each other's facts, and for nothing in any chunk
            assert sum(gpu.ledger.waits.values()) == 1, gpu.ledger.waits
    dist.destroy_process_group()


def test_ranks_send_what_lies_on_the_device(tmp_path):
    multiprocessing.set_forkserver_preload(["iscorrect", "torch.distributed"])
    mp.start_processes(start, (str(tmp_path / "store"),), nprocs=2, start_method="forkserver")
