"""However ranks cut a batch, loss, gradients and metrics are those of the whole."""

import datetime
import itertools
import multiprocessing
import os
import time
from dataclasses import dataclass, replace

import components
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import Batch, make_batch
from components import CORRECTIONS
from hypothesis import given, seed, settings, strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import iscorrect as ic
import iscorrect.head.reader as reader_module
from iscorrect import InputError, Layout, PolicyLoss, log_probs_from_logits
from iscorrect.loss.aggregate import named_aggregation
from iscorrect.loss.metrics import merge

OBJECTIVES = list(components.OBJECTIVES.values())
AGGREGATIONS = list(components.DIVIDED.values())


def count_of(layout, aggregation):
    """What an aggregation divides by, on one process."""
    return named_aggregation("test", aggregation, None).denominator(layout)


class Grid:
    """This process's place among data- × context- × tensor-parallel ranks."""

    def __init__(self, dp, cp, tp):
        self.dp, self.cp, self.tp = dp, cp, tp
        mesh = init_device_mesh("cpu", (dp, cp, tp), mesh_dim_names=("dp", "cp", "tp"))
        self.i, self.j, self.k = mesh.get_coordinate()
        self.heads = mesh["tp"]
        self.sequences = mesh["cp"].get_group() if cp > 1 else None
        self.vocabulary = mesh["tp"].get_group() if tp > 1 else None
        # ranks that hold the batch between them, once
        self.batch = mesh["dp", "cp"]._flatten("batch").get_group()

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
    whole_normalizer = count_of(Layout(batch.mask), aggregation)
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
        options |= dict(sequence_ids=ids, num_ids=len(rows))
    layout = Layout(part.mask, **options)
    normalizer = ic.global_normalizer(
        layout, aggregation, group=dist.group.WORLD, gradients="summed"
    )
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
    merged, alone = share_metrics.all_reduced(dist.group.WORLD).to_floats(), metrics.to_floats()
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


def ages(grid):
    """A rollout of three versions, some of its sequences of two."""
    batch = make_batch(7, rows=6, width=8, scale=0.3)
    version = torch.tensor([0, 5, 7]).repeat_interleave(2)[:, None].repeat(1, 8)
    version[::2, 5:] = 7
    age = 7 - version
    counts = ("tokens", "finite", "kept", "bounded")
    for level, correction in itertools.product(("token", "sequence"), (
        ic.token_tis(1.1), ic.Correction(reject=(ic.AgeAbove(limit=2),), bound=ic.Truncate(1.1)),
        ic.Correction(bound=ic.ByAge(limit=0, fresh=ic.Truncate(1.2), stale=ic.Mask(0.8, 1.1))),
    )):
        loss_fn = PolicyLoss(
            correction=replace(correction, level=level), reference_kl=ic.ReferenceKL()
        )
        whole = count_of(Layout(batch.mask), "token-mean")
        loss, gradient, metrics = evaluate(loss_fn, batch, Layout(batch.mask, age=age), whole)
        rows = grid.rows(len(age))
        columns = grid.columns(8, zigzag=False)
        part = cut(batch, rows, columns)
        layout = Layout(
            part.mask, age=age[rows][:, columns], sequence_group=grid.sequences,
            batch_group=dist.group.WORLD,
        )
        share, share_gradient, share_metrics = evaluate(loss_fn, part, layout, whole)
        dist.all_reduce(share)
        torch.testing.assert_close(share, loss)
        torch.testing.assert_close(share_gradient, gradient[rows][:, columns])
        merged = share_metrics.all_reduced(dist.group.WORLD)
        for name, value in metrics.sums.items():
            if name.startswith("age/") and name.rpartition("/")[2] in counts:
                assert merged.sums[name] == value, name
        assert all(merged[f"age/{age}/tokens"] > 0 for age in ("0", "2-3", "4-7"))
        alone = metrics.to_floats()
        assert merged.to_floats() == pytest.approx(alone, rel=1e-10, abs=1e-12, nan_ok=True)


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
    summed = ic.global_normalizer(mask, group=dist.group.WORLD, gradients="summed")
    averaged = ic.global_normalizer(mask, group=dist.group.WORLD, gradients="averaged")
    assert summed == 2 * averaged
    total = mask.sum()
    dist.all_reduce(total)
    assert summed == total


def disagreeing_ranks(grid):
    with pytest.raises(InputError, match="the same on all ranks of sequence_group, got"):
        mask = torch.ones(2 + dist.get_rank(), 3, dtype=torch.bool)
        Layout(mask, sequence_group=dist.group.WORLD)
    mask, ids = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(InputError, match="`num_ids` must be given"):
        Layout(mask, sequence_ids=ids, sequence_group=dist.group.WORLD)
    with pytest.raises(InputError, match="segments that ranks cut are not supported"):
        Layout(mask, segment_ids=ids, sequence_group=dist.group.WORLD)


def parts_of_the_whole_batch(grid):
    """A unit lies on one of the ranks that share a sequence; the others would see none."""
    world, x = dist.group.WORLD, torch.tensor([[0.5, -0.2], [0.1, 0.3]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    corrections = [ic.Correction(level="sequence", bound=ic.Truncate(ic.IonidesCap())),
                   ic.Correction(level="sequence", normalize=True)]
    for correct in corrections:
        given = {"old_log_probs": x, "rollout_log_probs": torch.zeros(2, 2)}
        with pytest.raises(InputError, match="a Layout with the batch_group"):
            correct(**given, mask=Layout(mask, sequence_group=world))
        layout = Layout(mask, sequence_group=world, batch_group=world)
        assert correct(**given, mask=layout).keep.all()


def what_is_not_finite_on_one_rank(grid):
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    if dist.get_rank() == 1:
        x[0, 0] = torch.nan
    layout = Layout(mask, sequence_group=dist.group.WORLD)
    where = "places of another rank" if dist.get_rank() == 0 else r"at \(0, 0\)"
    with pytest.raises(InputError, match=where):
        ic.Correction(level="sequence", nonfinite="raise")(
            old_log_probs=x, rollout_log_probs=torch.zeros(1, 2), mask=layout)


def ids_of_any_type(grid):
    world, rank = dist.group.WORLD, dist.get_rank()
    ids = torch.tensor([[[0, 0, 0], [0, 1, 1]], [[0, 0, 1], [1, 1, 1]]])[rank]
    mask = torch.ones(2, 3, dtype=torch.bool)
    for dtype in (torch.int16, torch.uint8, torch.int32, torch.int64):
        layout = Layout(mask, sequence_ids=ids.to(dtype), num_ids=2, sequence_group=world)
        total = layout.sequence_total(torch.ones(2, 3))
        assert (total == 6).all()
        row = layout.rows(1, 2).sequence_total(torch.ones(1, 3))
        assert row.tolist() == [[[1, 5, 5], [5, 5, 5]][rank]]


def segments_that_a_group_of_one_does_not_cut(grid):
    mask, ids = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 0, 1]])
    alone = Layout(mask, segment_ids=ids, sequence_group=grid.heads.get_group())
    assert alone.segment_total(torch.ones(1, 3)).tolist() == [[2, 2, 1]]


def metrics_of_some_kinds(grid):
    none = merge([]).all_reduced(dist.group.WORLD)
    assert len(none) == 0
    sums = ic.Metrics({"tokens": torch.tensor(2.0)}, {}).all_reduced(dist.group.WORLD)
    assert sums.sums["tokens"] == 4 and not sums.maxima


def second_derivatives(grid):
    x = torch.tensor([1.0 + dist.get_rank(), 2.0], dtype=torch.float64, requires_grad=True)
    loss = ic.ranks.sum_over(x, dist.group.WORLD).pow(3).sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    # d/dx_r of the ranks' sum of 2 · 3 (Σ x)²: every rank's loss, and every rank's gradient
    assert second.tolist() == [72, 96]


def a_rank_that_stops(grid):
    if dist.get_rank() == 1:
        raise ValueError("out of memory, say")
    layout = Layout(torch.ones(2, 3, dtype=torch.bool), sequence_group=dist.group.WORLD)
    layout.sequence_total(torch.ones(2, 3))


@dataclass(frozen=True)
class Model:
    """A head, the hidden states before it, and what the engine and others said of the targets."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    batch: Batch
    support: torch.Tensor | None
    options: dict

    @classmethod
    def make(cls, seed, *, rows=5, vocabulary=11, scale=0.3, bias=True, support=False, **options):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        batch = make_batch(seed, rows=rows, width=8, scale=scale)
        hidden, weight = normal(rows, 8, 6), normal(vocabulary, 6)
        target = torch.randint(vocabulary, (rows, 8), generator=generator)
        ids = None
        if support:
            ids = torch.rand(rows, 8, vocabulary, generator=generator).argsort(-1)[..., :4]
            ids[ids == target[..., None]] = -1
            ids[..., 0] = target
        b = normal(vocabulary) if bias else None
        model = cls(hidden, weight, b, target, batch, ids, options)
        shift = model.dense(hidden, weight, b) - batch.log_probs
        names = ("log_probs", "rollout_log_probs", "old_log_probs", "ref_log_probs")
        batch = batch._replace(**{name: getattr(batch, name) + shift for name in names})
        hidden[~batch.mask] = torch.nan
        target[~batch.mask] = -100
        return replace(model, batch=batch)

    def each(self, change):
        """The same head, and other tokens: ``change`` maps "b t ..." to what is wanted of it."""
        return replace(
            self, hidden=change(self.hidden), target=change(self.target),
            batch=Batch(*map(change, self.batch)),
            support=None if self.support is None else change(self.support),
        )

    def to(self, dtype):
        return replace(
            self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype),
            bias=None if self.bias is None else self.bias.to(dtype), batch=self.batch.to(dtype),
        )

    def dense(self, hidden, weight, bias):
        """Log-probs from the logits of every token."""
        logits = hidden @ weight.T + (0 if bias is None else bias)
        if (cap := self.options.get("softcap")) is not None:
            logits = cap * torch.tanh(logits / cap)
        return log_probs_from_logits(
            logits, self.target.clamp(min=0), temperature=self.options.get("temperature", 1.0),
            support=self.support,
        )

    def data(self, loss_fn, old):
        """What a loss takes beside log-probs, mask and normaliser."""
        return {
            "rollout_log_probs": self.batch.rollout_log_probs, "advantages": self.batch.advantages,
            "old_log_probs": self.batch.old_log_probs if old else None,
            "ref_log_probs": self.batch.ref_log_probs if loss_fn.reference_kl else None,
        }

    def whole(self, loss_fn, normalizer, old):
        """Loss, metrics and gradients of the padded batch on one process, in float64."""
        model = self.to(torch.float64)
        mask, leaves = model.batch.mask, [
            None if x is None else x.clone().requires_grad_()
            for x in (model.hidden, model.weight, model.bias)
        ]
        log_probs = model.dense(torch.where(mask[..., None], leaves[0], 0), *leaves[1:])
        loss, metrics = loss_fn(
            log_probs, mask=mask, normalizer=normalizer, **model.data(loss_fn, old)
        )
        loss.backward()
        return loss.detach(), metrics, [None if x is None else x.grad for x in leaves]


def one_row_first(ranks, v):
    return range(1, ranks)


def nothing_first(ranks, v):
    return [0, *range(3, ranks + 1)]


# As Megatron pads and torch shards (ceil-sized, the last shorter or empty), or anyhow.
SHARDS = ["padded", "DTensor", one_row_first, nothing_first]
ROUTES = ["log-probs", "fused"]
HEADS = [
    {"bias": False}, {"softcap": 3.0, "temperature": 0.7}, {"support": True},
    {"support": True, "softcap": 2.0, "bias": False}, {"temperature": 1.3},
]


def shard(grid, model, how):
    """This rank's weight and bias, the arguments that say so, and which rows they are."""
    leaves, v = [x for x in (model.weight, model.bias) if x is not None], len(model.weight)
    options, mine = {}, slice(0, v)
    if grid.tp > 1 and how == "DTensor":
        size = -(-v // grid.tp)
        mine = slice(min(size * grid.k, v), min(size * (grid.k + 1), v))
        leaves = [distribute_tensor(x, grid.heads, [Shard(0)]) for x in leaves]
    elif grid.tp > 1:
        options = {"vocabulary_group": grid.vocabulary}
        if how == "padded":
            size = -(-v // (4 * grid.tp)) * 4
            mine = slice(size * grid.k, size * (grid.k + 1))
            # what lies in the padding does not matter
            padding = leaves[0].new_full((size * grid.tp - v, 6), torch.nan)
            leaves = [torch.cat([x, padding[:, 0] if x.ndim == 1 else padding]) for x in leaves]
            options["vocabulary_size"] = v
        else:
            cuts = [0, *how(grid.tp, v), v]
            mine = slice(cuts[grid.k], cuts[grid.k + 1])
        leaves = [x[mine].clone() for x in leaves]
    weight, *bias = [x.requires_grad_() for x in leaves]
    return weight, bias[0] if bias else None, options, mine


def compare_head(
    grid, model, correction, objective, aggregation, *, zigzag=False, packed=False, how="padded",
    route="fused", micro_batches=1, sequence_parallel=False, old=True, chunk_size=7, rtol=1e-10,
):
    """The head cut over ranks, then the loss, against logits and loss on one process."""
    loss_fn = PolicyLoss(
        correction=correction, objective=objective, aggregation=aggregation,
        reference_kl=ic.ReferenceKL(coefficient=0.1),
    )
    normalizer = count_of(Layout(model.batch.mask), aggregation)
    loss, metrics, (of_hidden, *of_head) = model.whole(loss_fn, normalizer, old)
    rows, columns = grid.rows(len(model.target)), grid.columns(8, zigzag)
    sequence_parallel = sequence_parallel and len(columns) % grid.tp == 0
    weight, bias, options, mine = shard(grid, model, how)
    options |= model.options | {"chunk_size": chunk_size, "sequence_parallel": sequence_parallel}
    if correction.scope == "batch":  # of micro-batches it sees one at a time
        micro_batches = 1

    def piece(x, some):
        x = x[some][:, columns]
        return x.flatten(0, 1)[None] if packed else x

    def part_of_tokens(x):
        return x.chunk(grid.tp, 1)[grid.k] if sequence_parallel else x

    share, seen = torch.zeros((), dtype=torch.float64), []
    for start in range(micro_batches):
        some = rows[start::micro_batches]
        part = model.each(lambda x, some=some: piece(x, some))
        ids = torch.arange(len(some))[:, None].expand(-1, len(columns)).reshape(1, -1)
        numbers = {"sequence_ids": ids, "num_ids": len(some)} if packed else {}
        layout = Layout(
            part.batch.mask, sequence_group=grid.sequences, zigzag=zigzag, batch_group=grid.batch,
            **numbers,
        )
        hidden = part_of_tokens(part.hidden).clone().requires_grad_()
        head = {"bias": bias, "support": part.support, **options}
        data = part.data(loss_fn, old) | {"normalizer": normalizer}
        if route == "log-probs":
            log_probs = ic.linear_log_probs(hidden, weight, part.target, layout=layout, **head)
            loss_here, metrics_here = loss_fn(log_probs, mask=layout, **data)
        else:
            loss_here, metrics_here = ic.fused_policy_loss(
                loss_fn, hidden=hidden, weight=weight, target=part.target, mask=layout,
                **head, **data,
            )
        loss_here.backward()
        share += loss_here.detach()
        seen.append(metrics_here)
        close(hidden.grad, part_of_tokens(piece(of_hidden, some)), rtol, "hidden")
    dist.all_reduce(share, group=grid.batch)
    close(share, loss, rtol, "loss")
    merged = merge(seen).all_reduced(grid.batch).to_floats()
    assert merged == pytest.approx(metrics.to_floats(), rel=rtol, abs=rtol)
    compare_shards(grid, zip((weight, bias), of_head, strict=True), mine, rtol)


def compare_shards(grid, leaves, mine, rtol):
    for leaf, expected in leaves:
        if expected is None:
            continue
        grad = leaf.grad
        if isinstance(leaf, DTensor):
            assert (grad.placements, grad.shape) == ((Shard(0),), leaf.shape)
            grad = grad.to_local()
        grad = grad.clone()
        dist.all_reduce(grad, group=grid.batch)
        real = len(expected[mine])
        close(grad[:real], expected[mine], rtol, "weight", scale=expected.abs().max().item())
        assert (grad[real:] == 0).all()


def close(got, expected, rtol, what, scale=None):
    if scale is None:
        scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        got.double(), expected, rtol=rtol, atol=rtol * max(scale, 1e-3),
        msg=lambda message: f"{what}: {message}",
    )


def every_head(grid, start=0, step=1):
    """Every correction; each objective, aggregation, head, shard and route in turn."""
    for i, correction in enumerate(list(CORRECTIONS.values())[start::step], start):
        compare_head(
            grid, Model.make(i, **HEADS[i % len(HEADS)]), correction,
            OBJECTIVES[i % len(OBJECTIVES)], AGGREGATIONS[i % len(AGGREGATIONS)],
            zigzag=bool(i // 2 % 2), packed=bool(i % 2),
            how=SHARDS[i % len(SHARDS)], route=ROUTES[i % len(ROUTES)],
            micro_batches=1 + i // 3 % 2, sequence_parallel=bool(i // 2 % 2), old=bool(i // 4 % 2),
            chunk_size=3 if i % 3 == 2 else 7,
        )


def every_third_head(grid):
    every_head(grid, list(FACTS).index((grid.dp, grid.cp, grid.tp)) % 3, 3)


def long_sequences(grid):
    """Sequences of more than a chunk: gathered with and without their factor, and read twice."""
    for objective in (ic.Reinforce(), ic.PPOClip(level="geometric")):
        for route, how in zip(ROUTES, SHARDS, strict=False):
            compare_head(
                grid, Model.make(12), ic.sequence_is(), objective, "token-mean", how=how,
                route=route, sequence_parallel=True, old=False, chunk_size=2,
            )


def drawn_heads(grid):

    @seed(0)
    @settings(max_examples=10, deadline=None, database=None, derandomize=False)
    @given(
        number=st.integers(0, 2**32 - 1), rows=st.integers(4, 7), vocabulary=st.integers(2, 11),
        correction=st.sampled_from(sorted(CORRECTIONS)), objective=st.sampled_from(OBJECTIVES),
        aggregation=st.sampled_from(AGGREGATIONS), zigzag=st.booleans(), packed=st.booleans(),
        head=st.sampled_from(HEADS), cuts=st.lists(st.integers(0, 11), min_size=3, max_size=3),
        route=st.sampled_from(ROUTES), micro_batches=st.sampled_from([1, 2]), old=st.booleans(),
        sequence_parallel=st.booleans(), chunk_size=st.integers(3, 40),
    )
    def same(number, rows, vocabulary, correction, objective, aggregation, head, cuts, **options):
        def drawn(ranks, v):
            return sorted(min(cut, v) for cut in cuts[: ranks - 1])

        compare_head(
            grid, Model.make(number, rows=rows, vocabulary=max(4, vocabulary), **head),
            CORRECTIONS[correction], objective, aggregation, how=drawn, **options,
        )

    same()


def float32_heads(grid):
    for how, route in zip(SHARDS, [*ROUTES, *ROUTES], strict=True):
        compare_head(
            grid, Model.make(7, scale=0.1).to(torch.float32), ic.sequence_tis(),
            ic.PPOClip(level="geometric"), "seq-mean-token-mean", how=how, route=route, rtol=3e-6,
            sequence_parallel=route == "fused",
        )


def idle_heads(grid):
    model = Model.make(5, scale=0.1)
    batch = model.batch
    first = torch.zeros_like(batch.mask)
    first[0] = True
    nan = torch.full_like(batch.rollout_log_probs, torch.nan)
    for i, changed in enumerate((
        batch._replace(mask=batch.mask & ~first),
        batch._replace(mask=torch.zeros_like(batch.mask)),
        batch._replace(rollout_log_probs=torch.where(first, nan, batch.rollout_log_probs)),
        batch._replace(rollout_log_probs=nan),
    )):
        compare_head(
            grid, replace(model, batch=changed), ic.sequence_mis(), ic.PPOClip(), "token-mean",
            how=SHARDS[i], route=ROUTES[i % len(ROUTES)], sequence_parallel=True,
        )


def entropy(grid):
    """Of the whole vocabulary, on every rank; no two ranks differ in a bit."""
    model = Model.make(8, softcap=3.0, temperature=0.7)
    hidden, target = model.hidden.nan_to_num(), model.target.clamp(min=0)
    for dtype in (torch.float64, torch.float32):
        whole = ic.linear_log_probs(
            hidden.to(dtype), model.weight.to(dtype), target, bias=model.bias.to(dtype),
            entropy=True, chunk_size=7, **model.options,
        )
        for how in SHARDS:
            weight, bias, options, _ = shard(grid, model.to(dtype), how)
            shared = ic.linear_log_probs(
                hidden.to(dtype), weight, target, bias=bias, entropy=True, chunk_size=7,
                **options, **model.options,
            )
            torch.testing.assert_close(shared, whole)
            stacked = torch.stack([x.detach() for x in shared])
            every = [torch.empty_like(stacked) for _ in range(grid.tp)]
            dist.all_gather(every, stacked, group=grid.vocabulary)
            assert all(torch.equal(x, stacked) for x in every)


def not_finite(grid):
    """NaN in a hidden state takes its own token on every rank, and the loss drops that token."""
    model = Model.make(8)
    place = tuple(model.batch.mask.nonzero()[3].tolist())
    model.hidden[place] = torch.nan
    for how, correction in zip(SHARDS, [ic.token_tis(), ic.sequence_tis()] * 2, strict=True):
        loss_fn, found = PolicyLoss(correction=correction), []
        for weight, bias, options, mine in (
            (model.weight.clone().requires_grad_(), model.bias, {}, slice(None)),
            shard(grid, model, how),
        ):
            hidden = model.hidden.clone().requires_grad_()
            log_probs = ic.linear_log_probs(
                hidden, weight, model.target, bias=bias, layout=model.batch.mask, **options
            )
            assert log_probs.isnan().nonzero().tolist() == [list(place)]
            loss, _ = ic.fused_policy_loss(
                loss_fn, hidden=hidden, weight=weight, bias=bias, target=model.target,
                mask=model.batch.mask, chunk_size=7, **model.data(loss_fn, False), **options,
            )
            loss.backward()
            grad = weight.grad.to_local() if isinstance(weight, DTensor) else weight.grad
            found.append((loss.detach(), hidden.grad, grad, mine))
        (loss, of_hidden, of_weight, _), (shared, hidden_here, weight_here, mine) = found
        close(shared, loss, 1e-10, "loss")
        close(hidden_here, of_hidden, 1e-10, "hidden")
        expected = of_weight[mine]
        close(weight_here[: len(expected)], expected, 1e-10, "weight")
        assert of_weight.isfinite().all() and of_weight.abs().sum() > 0


def all_but_certain(grid):
    """The digits of 1 − p of the target survive the exchange."""
    weight = torch.tensor([[18.0], [0.0], [0.0], [0.0]]).chunk(grid.tp)[grid.k].clone()
    hidden = torch.tensor([[1.0]], requires_grad=True)
    ic.linear_log_probs(
        hidden, weight, torch.tensor([0]), vocabulary_group=grid.vocabulary
    ).backward()
    e = 3 * torch.tensor(-18.0, dtype=torch.float64).exp()
    torch.testing.assert_close(hidden.grad.double()[0, 0], 18 * e / (1 + e), rtol=1e-6, atol=0)


def what_is_sent(grid):
    """Never logits: numbers per token, and a row per token of hidden states and their gradient."""
    model, sent = Model.make(8), []
    hidden, target = model.hidden.nan_to_num(), model.target.clamp(min=0)
    tokens, width = target.numel(), hidden.shape[-1]
    each = [1, 2]  # the largest logit; the target's and the sum of the others
    reduce, broadcast = dist.all_reduce, dist.broadcast

    def counted(call):
        def send(x, *args, **kwargs):
            sent.append(x.numel())
            return call(x, *args, **kwargs)

        return send

    dist.all_reduce, dist.broadcast = counted(reduce), counted(broadcast)
    for sequence_parallel, states in ((False, []), (True, [width])):
        weight, bias, options, _ = shard(grid, model, "padded")
        own = hidden.chunk(grid.tp, 1)[grid.k] if sequence_parallel else hidden
        log_probs = ic.linear_log_probs(
            own.clone().requires_grad_(), weight, target, bias=bias, chunk_size=tokens // 2,
            sequence_parallel=sequence_parallel, **options,
        )
        forward = [tokens // 2 * n for n in [*states, *each] * 2]
        assert sent == forward
        log_probs.sum().backward()
        assert sent[len(forward):] == [tokens] + [
            tokens // 2 * n for n in [*states, width] * 2
        ]
        sent.clear()
    dist.all_reduce, dist.broadcast = reduce, broadcast


def gradients_that_differ(grid):
    """The first rank's is taken: neither a rounding nor a token more can part the ranks."""
    model = Model.make(9)
    hidden, target = model.hidden.nan_to_num(), model.target.clamp(min=0)
    found = []
    for own in (False, True):
        h = hidden.clone().requires_grad_()
        weight, bias, options, _ = shard(grid, model, one_row_first)
        log_probs = ic.linear_log_probs(h, weight, target, bias=bias, chunk_size=3, **options)
        coefficient = torch.ones_like(log_probs)
        coefficient[0] = 0
        if own and grid.k:
            coefficient = torch.arange(40.0).view(5, 8).double()
        log_probs.backward(coefficient)
        found.append((h.grad, weight.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def refused_heads(grid):
    """All ranks raise, whichever is wrong, and go on together."""
    weight, target = torch.zeros(3, 4), torch.arange(6).view(2, 3)
    right = {
        "hidden": torch.zeros(2, 3, 4), "weight": weight, "target": target,
        "vocabulary_group": grid.vocabulary,
    }
    last = dist.get_rank() == grid.tp - 1
    one_less = torch.ones(2, 3, dtype=torch.bool)
    one_less[0, 0] = False

    def sharded(x, placement):
        return DTensor.from_local(x, grid.heads, [placement])

    wrong_on_one = [
        ({"layout": one_less}, r"`target` must be the same on all ranks .*, 6 of .*, 5 of "),
        ({"target": target.flip(0)}, r"`target` must be the same on all ranks .* checksum"),
        ({"temperature": 0.5}, r"`temperature` must be the same .* 1\.0 on the first and 0\.5"),
        ({"vocabulary_size": 6}, "`vocabulary_size` must be the same"),
        ({"chunk_size": 2}, "`chunk_size` must be the same"),
        ({"bias": torch.zeros(3)}, "`bias` must be the same"),
        ({"weight": torch.zeros(3, 4, requires_grad=True)}, "`requires_grad` must be the same"),
        ({"hidden": torch.zeros(2, 3, 4).double()}, "`hidden` must be the same"),
        ({"weight": torch.zeros(3, 5)}, r"`hidden` must be a floating|from rank 1 of .* `hidden`"),
        ({"target": target[0]}, r"`target` must be of shape|from rank 1 of .* `target`"),
    ]
    wrong_on_all = [
        ({"vocabulary_size": 7}, "`vocabulary_size` must be at most 6"),
        ({"vocabulary_size": 5}, r"`target` must be token ids in \[0, 5\) .*, got 5"),
        ({"vocabulary_size": 0}, "`vocabulary_size` must be a whole number > 0"),
        ({"vocabulary_group": grid.heads}, "`vocabulary_group` must be a process group"),
        ({"sequence_parallel": True}, r"`target` must be of shape \(2, 6\)"),
        ({"hidden": torch.zeros(2, 1, 4)}, "pass sequence_parallel=True where"),
        ({"weight": sharded(weight, Replicate())}, "`weight` must be whole, or a DTensor"),
        ({"weight": sharded(weight, Shard(1))}, "`weight` must be whole, or a DTensor"),
        ({"weight": sharded(weight, Shard(0))}, "`vocabulary_group` must be None where"),
        ({"hidden": sharded(torch.zeros(2, 3, 4), Shard(1))}, "`hidden` must be a plain tensor"),
        (
            {"weight": sharded(weight, Shard(0)), "vocabulary_group": None,
             "bias": sharded(torch.zeros(6), Replicate())}, "`bias` must be sharded like",
        ),
    ]
    for change, message in wrong_on_one:
        with pytest.raises(InputError, match=message):
            ic.linear_log_probs(**right | (change if last else {}))
    for change, message in wrong_on_all:
        with pytest.raises(InputError, match=message):
            ic.linear_log_probs(**right | change)
    batch = dict.fromkeys(["rollout_log_probs", "advantages"], torch.zeros(2, 3))
    if last:
        batch["rollout_log_probs"] = torch.zeros(2, 4)
    with pytest.raises(InputError, match=r"one token too many|from rank 1 of .*"):
        ic.fused_policy_loss(PolicyLoss(), mask=torch.ones(2, 3, dtype=bool), **right, **batch)
    batch["rollout_log_probs"] = torch.zeros(2, 3)
    loss_fn = PolicyLoss(correction=ic.token_tis()) if last else PolicyLoss()
    with pytest.raises(InputError, match="`loss_fn` must be the same on all ranks"):
        ic.fused_policy_loss(loss_fn, mask=torch.ones(2, 3, dtype=bool), **right, **batch)
    assert ic.linear_log_probs(**right).shape == (2, 3)


def logits_that_fail(*args, **kwargs):
    raise ValueError("out of memory, say")


def logits_that_hang(*args, **kwargs):
    time.sleep(60)


def a_head_with(product):
    if dist.get_rank() == 1:
        reader_module.product = product
    ic.linear_log_probs(
        torch.zeros(2, 3, 4), torch.zeros(3, 4), torch.zeros(2, 3, dtype=torch.long),
        vocabulary_group=dist.group.WORLD,
    )


def a_rank_that_stops_in_the_head(grid):
    a_head_with(logits_that_fail)


def a_rank_that_hangs_in_the_head(grid):
    a_head_with(logits_that_hang)


def start(rank, store, facts, dp, cp, tp):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    reader_module.CPU_ROWS = 3  # a vocabulary of several blocks on each rank
    fails = set(FAILURES) & set(facts)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=dp * cp * tp,
        timeout=datetime.timedelta(seconds=5 if fails else 60),
    )
    grid = Grid(dp, cp, tp)
    for fact in facts:
        fact(grid)
    dist.destroy_process_group()


def spawn(tmp_path, facts, dp, cp, tp):
    # What takes seconds to import is imported once, before the server forks.
    multiprocessing.set_forkserver_preload(["iscorrect", "hypothesis", "torch.distributed.tensor"])
    mp.start_processes(
        start, (str(tmp_path / "store"), facts, dp, cp, tp), nprocs=dp * cp * tp,
        start_method="forkserver",
    )


FACTS = {
    (2, 1, 1): [every_correction, ages, idle_ranks, groups_across_ranks, averaged_gradients,
                disagreeing_ranks, parts_of_the_whole_batch, what_is_not_finite_on_one_rank,
                ids_of_any_type, segments_that_a_group_of_one_does_not_cut,
                metrics_of_some_kinds, second_derivatives, every_third_head],
    (1, 2, 1): [every_correction, every_objective, ages, idle_ranks, float32, every_third_head],
    (1, 1, 2): [every_head, drawn_heads, float32_heads, idle_heads, long_sequences, entropy,
                not_finite, all_but_certain, what_is_sent, gradients_that_differ,
                refused_heads],
    (2, 2, 1): [every_objective, drawn_batches, idle_ranks, every_third_head],
    (2, 1, 2): [every_third_head, drawn_heads, idle_heads],
    (1, 2, 2): [every_third_head, drawn_heads],
    (4, 1, 1): [drawn_batches, every_third_head],
    (1, 4, 1): [drawn_batches, every_third_head],
    (1, 1, 4): [every_third_head, entropy, idle_heads],
}


@pytest.mark.parametrize(
    ("dp", "cp", "tp"),
    [
        pytest.param(*grid, marks=() if grid == (2, 1, 1) else pytest.mark.slow)
        for grid in FACTS
    ],
)
def test_a_batch_cut_over_ranks_gives_what_it_gives_whole(tmp_path, dp, cp, tp):
    spawn(tmp_path, FACTS[dp, cp, tp], dp, cp, tp)


FAILURES = {
    a_rank_that_stops: "out of memory, say|[Gg]loo|[Cc]onnection|Timed out",
    a_rank_that_stops_in_the_head: "out of memory, say|[Gg]loo|[Cc]onnection|Timed out",
    a_rank_that_hangs_in_the_head: "Timed out",
}


@pytest.mark.slow
@pytest.mark.parametrize("fact", FAILURES)
def test_a_rank_that_stops_stops_the_others(tmp_path, fact):
    with pytest.raises(mp.ProcessRaisedException, match=FAILURES[fact]):
        spawn(tmp_path, [fact], 2, 1, 1)
