"""However ranks cut a batch, loss, gradients and metrics are those of the whole."""

import datetime
import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import Batch, make_batch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import iscorrect as ic
from iscorrect import PRESETS, InputError, Layout, PolicyLoss
from iscorrect.aggregate import denominator

OBJECTIVES = [
    ic.Reinforce(), ic.PPOClip(dual=3.0), ic.PPOClip(level="geometric"),
    ic.PPOClip(level="sequence"), ic.PPOClip(level="prefix"), ic.CISPO(),
]
CORRECTIONS = {name: preset() for name, preset in PRESETS.items()} | {
    "normalised": ic.Correction(level="sequence", normalize=True),
    "ionides": ic.Correction(level="sequence", bound=ic.Truncate(ic.IonidesCap())),
    "mse": ic.Correction(bound=ic.Truncate(ic.MSEOptimalCap())),
    "ess": ic.Correction(level="sequence", bound=ic.Mask(high=ic.ESSCap(0.7))),
    "prefix": ic.Correction(level="prefix", bound=ic.Truncate(1.5)),
    "veto": ic.Correction(reject=(ic.Veto(low=0.9),)),
}
AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]


class Grid:
    """This process's place among data-parallel × context-parallel ranks."""

    def __init__(self, dp, cp):
        rank = dist.get_rank()
        self.dp, self.cp = dp, cp
        self.i, self.j = divmod(rank, cp)
        rows = [list(range(k * cp, (k + 1) * cp)) for k in range(dp)]
        groups = [dist.new_group(ranks) for ranks in rows]
        self.sequences = groups[self.i] if cp > 1 else None

    def rows(self, n):
        """Uneven on purpose: the first rank has one row, the last the rest."""
        cuts = [0, *range(1, self.dp), n] if self.dp > 1 else [0, n]
        return list(range(cuts[self.i], cuts[self.i + 1]))

    def columns(self, t, zigzag):
        if not zigzag:
            cuts = [0, *range(1, self.cp), t] if self.cp > 1 else [0, t]
            return list(range(cuts[self.j], cuts[self.j + 1]))
        width = t // (2 * self.cp)
        pieces = [self.j, 2 * self.cp - 1 - self.j]
        return [c for k in pieces for c in range(k * width, (k + 1) * width)]


def cut(batch, rows, columns):
    return Batch(*(x[rows][:, columns] for x in batch))


def evaluate(loss_fn, batch, layout, normalizer):
    log_probs = batch.log_probs.clone().requires_grad_()
    loss, metrics = loss_fn(
        log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=layout, old_log_probs=batch.old_log_probs, ref_log_probs=batch.ref_log_probs,
        normalizer=normalizer,
    )
    loss.backward()
    return loss.detach(), log_probs.grad, metrics


def compare(grid, batch, correction, objective, aggregation, *, zigzag, packed, rtol=1e-10):
    loss_fn = PolicyLoss(
        correction=correction, objective=objective, aggregation=aggregation,
        reference_kl=ic.ReferenceKL(coefficient=0.1),
    )
    whole_normalizer = denominator(Layout(batch.mask), aggregation)
    loss, gradient, metrics = evaluate(loss_fn, batch, batch.mask, whole_normalizer)

    rows, columns = grid.rows(len(batch.mask)), grid.columns(batch.mask.shape[1], zigzag)
    part = cut(batch, rows, columns)
    expected_gradient = gradient[rows][:, columns]
    world = dist.group.WORLD
    options = dict(sequence_group=grid.sequences, zigzag=zigzag, batch_group=world)
    if packed:
        ids = torch.arange(len(rows))[:, None].expand(part.mask.shape).reshape(1, -1)
        part = Batch(*(x.reshape(1, -1) for x in part))
        expected_gradient = expected_gradient.reshape(1, -1)
        options |= dict(sequence_ids=ids, num_sequences=len(rows))
    layout = Layout(part.mask, **options)
    normalizer = ic.global_normalizer(layout, aggregation, gradients="summed")
    assert normalizer == whole_normalizer
    share, share_gradient, share_metrics = evaluate(loss_fn, part, layout, normalizer)
    dist.all_reduce(share)
    where = (correction, objective, aggregation, zigzag, packed)
    torch.testing.assert_close(share, loss, rtol=rtol, atol=rtol, msg=lambda m: f"{where}: {m}")
    scale = expected_gradient.abs().max().item() if expected_gradient.numel() else 0.0
    torch.testing.assert_close(
        share_gradient, expected_gradient, rtol=rtol, atol=rtol * max(scale, 1e-3),
        msg=lambda m: f"{where}: {m}",
    )
    merged, alone = share_metrics.all_reduced().to_floats(), metrics.to_floats()
    assert merged == pytest.approx(alone, rel=rtol, abs=rtol), where


def every_correction(grid):
    batch = make_batch(3, rows=5, width=8, scale=0.3)
    objectives, aggregations = itertools.cycle(OBJECTIVES), itertools.cycle(AGGREGATIONS)
    for correction in CORRECTIONS.values():
        for packed, zigzag in ((False, False), (True, False), (False, True), (True, True)):
            compare(
                grid, batch, correction, next(objectives), next(aggregations), zigzag=zigzag,
                packed=packed,
            )


def every_objective(grid):
    batch = make_batch(4, rows=5, width=8, scale=0.3)
    for objective, aggregation in itertools.product(OBJECTIVES, AGGREGATIONS):
        for packed, zigzag in ((False, True), (True, False)):
            compare(
                grid, batch, ic.sequence_tis(), objective, aggregation, zigzag=zigzag, packed=packed
            )


def drawn_batches(grid):

    # All ranks must draw the same cases, so nothing may depend on the process.
    @seed(0)
    @settings(max_examples=30, deadline=None, database=None, derandomize=False)
    @given(
        number=st.integers(0, 2**32 - 1), rows=st.integers(4, 7),
        scale=st.sampled_from([1e-3, 1.0]),
        correction=st.sampled_from(sorted(CORRECTIONS)), objective=st.sampled_from(OBJECTIVES),
        aggregation=st.sampled_from(AGGREGATIONS), zigzag=st.booleans(), packed=st.booleans(),
    )
    def same(number, rows, scale, correction, objective, aggregation, zigzag, packed):
        compare(
            grid, make_batch(number, rows=rows, width=8, scale=scale), CORRECTIONS[correction],
            objective, aggregation, zigzag=zigzag, packed=packed,
        )

    same()


def float32(grid):
    batch = make_batch(5, rows=5, width=8, scale=0.1)
    compare(
        grid, batch.to(torch.float32), ic.sequence_tis(), ic.PPOClip(level="geometric"),
        "seq-mean-token-mean", zigzag=False, packed=True, rtol=3e-6,
    )


def idle_ranks(grid):
    batch = make_batch(5, rows=5, width=8, scale=0.1)
    first = torch.zeros_like(batch.mask)
    first[0] = True
    nan = torch.full_like(batch.rollout_log_probs, torch.nan)
    nothing_kept = torch.where(first, nan, batch.rollout_log_probs)
    for changed in (
        batch._replace(mask=batch.mask & ~first),
        batch._replace(mask=batch.mask & first),
        batch._replace(mask=torch.zeros_like(batch.mask)),
        batch._replace(rollout_log_probs=nothing_kept),
        batch._replace(rollout_log_probs=nan),
    ):
        for correction in ("pareto-is", "normalised", "ess", "sequence-mis", "prefix"):
            compare(
                grid, changed, CORRECTIONS[correction], ic.PPOClip(level="geometric"),
                "token-mean", zigzag=False, packed=False,
            )


def groups_across_ranks(grid):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(9, generator=generator, dtype=torch.float64)
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0])
    keep = torch.rand(9, generator=generator) < 0.7
    mine = slice(0, 2) if dist.get_rank() == 0 else slice(2, 9)
    for estimator in ("grpo", "dr-grpo", "rloo"):
        whole = ic.group_advantages(rewards, ids, keep, estimator=estimator)
        part = ic.group_advantages(
            rewards[mine], ids[mine], keep[mine], estimator=estimator,
            batch_group=dist.group.WORLD,
        )
        torch.testing.assert_close(part, whole[mine])


def averaged_gradients(grid):
    mask = make_batch(6, rows=3 + dist.get_rank(), width=5).mask
    summed = ic.global_normalizer(mask, gradients="summed")
    averaged = ic.global_normalizer(mask, gradients="averaged")
    assert summed == 2 * averaged
    total = mask.sum()
    dist.all_reduce(total)
    assert summed == total


def disagreeing_ranks(grid):
    with pytest.raises(InputError, match="the same on all ranks of sequence_group, got"):
        mask = torch.ones(2 + dist.get_rank(), 3, dtype=torch.bool)
        Layout(mask, sequence_group=dist.group.WORLD)
    mask, ids = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(InputError, match="`num_sequences` must be given"):
        Layout(mask, sequence_ids=ids, sequence_group=dist.group.WORLD)
    with pytest.raises(InputError, match="segments that ranks cut are not supported"):
        Layout(mask, segment_ids=ids, sequence_group=dist.group.WORLD)


def a_rank_that_stops(grid):
    if dist.get_rank() == 1:
        raise ValueError("out of memory, say")
    layout = Layout(torch.ones(2, 3, dtype=torch.bool), sequence_group=dist.group.WORLD)
    layout.sequence_total(torch.ones(2, 3))


def start(rank, store, world, facts, dp, cp):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=5 if a_rank_that_stops in facts else 60),
    )
    grid = Grid(dp, cp)
    for fact in facts:
        fact(grid)
    dist.destroy_process_group()


def spawn(tmp_path, facts, dp, cp):
    mp.spawn(start, (str(tmp_path / "store"), dp * cp, facts, dp, cp), nprocs=dp * cp)


# Starting processes takes longer than what they do, so each grid is started once.
FACTS = {
    (2, 1): [every_correction, idle_ranks, groups_across_ranks, averaged_gradients,
             disagreeing_ranks],
    (1, 2): [every_correction, every_objective, idle_ranks, float32],
    (2, 2): [every_objective, drawn_batches, idle_ranks],
    (4, 1): [drawn_batches],
    (1, 4): [drawn_batches],
}


@pytest.mark.parametrize(("dp", "cp"), FACTS)
def test_a_batch_cut_over_ranks_gives_what_it_gives_whole(tmp_path, dp, cp):
    spawn(tmp_path, FACTS[dp, cp], dp, cp)


def test_a_rank_that_stops_stops_the_others(tmp_path):
    with pytest.raises(mp.ProcessRaisedException, match=r"out of memory, say|timeout|closed"):
        spawn(tmp_path, [a_rank_that_stops], 2, 1)
