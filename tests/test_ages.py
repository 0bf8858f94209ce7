"""Tokens of several versions: corrections by age, and metrics of each age that merge exactly."""

from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from batches import batches, make_batch
from hypothesis import given
from test_fused import assert_same, make
from test_layout import flatten, pack
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import iscorrect as ic
from iscorrect import Correction, InputError, Layout, PolicyLoss
from iscorrect.loss import policy_loss
from iscorrect.loss.metrics import merge

BUCKETS = {
    "0": (0, 0), "1": (1, 1), "2-3": (2, 3), "4-7": (4, 7), "8-15": (8, 15), "16+": (16, 10**6),
}
BY_AGE = Correction(
    bound=ic.ByAge(
        limit=0, fresh=ic.Truncate(2.0),
        stale=ic.ByAge(limit=4, fresh=ic.Truncate(1.2), stale=ic.Mask(0.8, 1.1)),
    ),
    reject=(ic.AgeAbove(limit=16),),
)


def evaluate(loss_fn, batch, layout, old=True, normalizer=None):
    log_probs = batch.log_probs.clone().requires_grad_()
    loss, metrics = loss_fn(
        log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=layout, old_log_probs=batch.old_log_probs if old else None, normalizer=normalizer,
    )
    loss.backward()
    return loss.detach(), log_probs.grad, metrics


def expected_metrics(sequences, weigh):
    """By the definitions, of the tokens of each bucket put together."""
    d = np.concatenate([oracle.log_ratio(s) for s in sequences])
    age = np.concatenate([s.age for s in sequences])
    w = np.concatenate([weigh(s) for s in sequences])
    r = np.concatenate([oracle.token_is(s) for s in sequences])
    found = {}
    for name, (least, most) in BUCKETS.items():
        these = (age >= least) & (age <= most)
        n = these.sum()
        found |= {f"age/{name}/{key}": value for key, value in {
            "tokens": n / max(1, len(d)),
            "log_prob_diff": abs(d[these]).mean() if n else np.nan,
            "kl_k3": oracle.k3(d[these]).mean() if n else np.nan,
            "ess": oracle.ess(w[these]) if n else np.nan,
            "bounded": (w != r)[these].mean() if n else np.nan,
            "rejected": (w == 0)[these].mean() if n else np.nan,
        }.items()}
    return found


def of_ages(metrics):
    return {name: x for name, x in metrics.to_floats().items() if name.startswith("age/")}


@given(batch=batches(scales=(1e-4, 0.05, 1.0)))
def test_metrics_of_an_age_are_those_of_its_tokens(batch):
    _, _, metrics = ic.icepop(0.9, 1.1)(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=Layout(batch.mask, age=batch.ages()),
    )

    def weigh(s):
        r = oracle.token_is(s)
        return np.where((r >= 0.9) & (r <= 1.1), r, 0)

    expected = expected_metrics(batch.sequences(), weigh)
    assert of_ages(metrics) == pytest.approx(expected, rel=1e-9, abs=1e-14, nan_ok=True)


def test_an_age_that_no_token_has_is_not_a_number_and_has_no_tokens():
    batch = make_batch(0, rows=4, width=8)
    fresh = Layout(batch.mask, age=torch.zeros_like(batch.mask, dtype=torch.int32))
    metrics = of_ages(evaluate(PolicyLoss(), batch, fresh)[2])
    assert metrics["age/0/tokens"] == 1
    for name, value in metrics.items():
        _, age, kind = name.split("/")
        if age != "0":
            assert value == 0 if kind == "tokens" else np.isnan(value), name


def test_an_age_below_0_counts_as_0():
    batch, loss_fn = make_batch(0, rows=4, width=8), PolicyLoss(correction=BY_AGE)
    generator = torch.Generator().manual_seed(2)
    ages = torch.randint(-4, 20, batch.mask.shape, generator=generator)
    fresh, negative = (Layout(batch.mask, age=x) for x in (ages.clamp(min=0), ages))
    expected, found = (evaluate(loss_fn, batch, x) for x in (fresh, negative))
    assert found[0] == expected[0]
    assert of_ages(found[2]) == pytest.approx(of_ages(expected[2]), nan_ok=True)


def test_without_ages_there_is_no_metric_of_an_age():
    batch = make_batch(0)
    assert not of_ages(evaluate(PolicyLoss(), batch, Layout(batch.mask))[2])


def three_versions():
    """A rollout of versions 0, 5 and 7, its trainer at version 7; some sequences hold two."""
    batch = make_batch(1, rows=9, width=12, scale=0.2)
    version = torch.tensor([0, 5, 7]).repeat_interleave(3)[:, None].repeat(1, 12)
    version[::2, 6:] = 7
    return batch, 7 - version


@pytest.mark.parametrize("cuts", [[0, 9], [0, 1, 2, 9], list(range(10))])
@pytest.mark.parametrize("correction", [ic.token_tis(1.1), ic.sequence_tis(1.1), BY_AGE])
def test_micro_batches_of_three_versions_add_up_to_the_whole(cuts, correction):
    batch, age = three_versions()
    loss_fn = PolicyLoss(correction=correction, objective=ic.PPOClip())
    loss, gradient, metrics = evaluate(loss_fn, batch, Layout(batch.mask, age=age))
    normalizer = batch.mask.sum()
    parts = [
        evaluate(
            loss_fn, batch.rows(slice(a, b)), Layout(batch.mask[a:b], age=age[a:b]),
            normalizer=normalizer,
        )
        for a, b in pairwise(cuts)
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient)
    merged = merge([part[2] for part in parts])
    for name, value in metrics.sums.items():
        if name.rpartition("/")[2] in ("tokens", "finite", "kept", "bounded"):
            assert merged.sums[name] == value, name
    assert all(metrics[f"age/{age}/tokens"] > 0 for age in ("0", "2-3", "4-7"))
    assert merged.to_floats() == pytest.approx(metrics.to_floats(), rel=1e-12, nan_ok=True)


def test_blocks_of_a_large_batch_keep_their_ages(monkeypatch):
    batch, age = three_versions()
    loss_fn = PolicyLoss(correction=BY_AGE)
    whole = evaluate(loss_fn, batch, Layout(batch.mask, age=age))
    monkeypatch.setattr(policy_loss, "BLOCK", 24)
    blocks = evaluate(loss_fn, batch, Layout(batch.mask, age=age))
    torch.testing.assert_close(blocks[:2], whole[:2])
    assert blocks[2].to_floats() == pytest.approx(whole[2].to_floats(), rel=1e-12, nan_ok=True)


@given(batch=batches())
def test_packed_rows_have_the_ages_of_padded_ones(batch):
    loss_fn = PolicyLoss(correction=BY_AGE)
    age = batch.ages()
    loss, gradient, metrics = evaluate(loss_fn, batch, Layout(batch.mask, age=age))
    short = -len(age) % 2
    for (other, layout), ages in (
        (pack(batch), torch.cat([age, age[:1].expand(short, -1)]).reshape(-1, 2 * age.shape[1])),
        (flatten(batch), age[batch.mask][None]),
    ):
        layout.age = ages
        found = evaluate(loss_fn, other, layout)
        torch.testing.assert_close(found[0], loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[1][other.mask], gradient[batch.mask])
        assert found[2].to_floats() == pytest.approx(
            metrics.to_floats(), rel=1e-9, abs=1e-12, nan_ok=True
        )


def test_every_way_to_make_a_layout_takes_ages():
    mask, age = torch.ones(1, 5, dtype=torch.bool), torch.arange(5)[None]
    for layout in (
        Layout(mask, age=age),
        Layout.from_cu_seqlens(mask, torch.tensor([0, 2, 5]), age=age),
        Layout.from_position_ids(mask, torch.tensor([[0, 1, 0, 1, 2]]), age=age),
        Layout(mask, age=age).with_mask(~mask),
        Layout(mask.expand(3, 5), age=age.expand(3, 5)).rows(1, 2),
    ):
        assert torch.equal(layout.age, age)


def test_tokens_beyond_an_age_have_no_weight():
    old = torch.zeros(1, 4)
    age = torch.tensor([[0, 4, 5, 90]])
    weights, keep, _ = Correction(reject=(ic.AgeAbove(limit=4),))(
        old_log_probs=old, rollout_log_probs=old,
        mask=Layout(torch.ones(1, 4, dtype=torch.bool), age=age),
    )
    assert weights.tolist() == [[1, 1, 0, 0]]
    assert keep.tolist() == [[True, True, False, False]]


def test_each_age_has_its_bound():
    old, rollout = torch.zeros(1, 4), torch.full((1, 4), -1.0)
    age = torch.tensor([[0, 1, 4, 5]])
    weights = BY_AGE(
        old_log_probs=old, rollout_log_probs=rollout,
        mask=Layout(torch.ones(1, 4, dtype=torch.bool), age=age),
    ).weights
    torch.testing.assert_close(weights, torch.tensor([[2.0, 1.2, 1.2, 0.0]]))


@pytest.mark.parametrize(
    ("part", "caller"),
    [
        (Correction(reject=(ic.AgeAbove(limit=1),)), "AgeAbove"),
        (Correction(bound=BY_AGE.bound), "ByAge"),
    ],
)
def test_what_needs_ages_says_so_where_there_are_none(part, caller):
    zeros = torch.zeros(1, 2)
    with pytest.raises(InputError, match=f"^{caller}: `mask` must be a Layout with the age"):
        part(old_log_probs=zeros, rollout_log_probs=zeros, mask=torch.ones(1, 2).bool())


@pytest.mark.parametrize(
    "age", [torch.zeros(1, 3), torch.zeros(1, 3).bool(), torch.zeros(3, 1).long(), torch.tensor(1),
            [1]]
)
def test_ages_are_integers_of_the_shape_of_the_mask(age):
    with pytest.raises(InputError, match=r"^Layout: `age` must be an integer tensor"):
        Layout(torch.ones(1, 3, dtype=torch.bool), age=age)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence", "prefix"])
@pytest.mark.parametrize("chunk_size", [4, None])
def test_one_pass_knows_the_age_of_each_token(old, level, chunk_size):
    batch = make(old=old)
    generator = torch.Generator().manual_seed(2)
    age = torch.randint(0, 20, batch.mask.shape, generator=generator)
    correction = Correction(level=level, bound=BY_AGE.bound, reject=BY_AGE.reject)
    layout = Layout(batch.mask, age=age)
    assert_same(PolicyLoss(correction=correction), batch, chunk_size=chunk_size, mask=layout)


def test_a_loss_with_ages_runs_on_fake_tensors_so_nothing_reads_a_value():
    batch = make_batch(0, rows=4, width=8).to(torch.float32)
    age = batch.ages()
    with FakeTensorMode() as mode:
        fake = type(batch)(*(mode.from_tensor(x) for x in batch))
        layout = Layout(fake.mask, age=mode.from_tensor(age))
        loss, gradient, metrics = evaluate(PolicyLoss(correction=BY_AGE), fake, layout)
        assert loss.shape == ()
        assert gradient.shape == fake.mask.shape
        assert all(value.shape == () for value in metrics.values())


@pytest.mark.slow
def test_one_graph_serves_two_shapes_of_batches_with_ages():
    loss_fn = PolicyLoss(correction=BY_AGE, objective=ic.PPOClip())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(log_probs, batch, age):
        return loss_fn(
            log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
            mask=Layout(batch.mask, age=age), old_log_probs=batch.old_log_probs,
        )

    graphs = []
    for seed, (rows, width) in enumerate([(4, 8), (6, 12)]):
        batch = make_batch(seed, rows=rows, width=width)
        log_probs = batch.log_probs.clone().requires_grad_()
        loss, metrics = step(log_probs, batch, batch.ages())
        graphs.append(counter.frame_count)
        loss.backward()
        expected = evaluate(loss_fn, batch, Layout(batch.mask, age=batch.ages()))
        torch.testing.assert_close(loss.detach(), expected[0])
        torch.testing.assert_close(log_probs.grad, expected[1])
        assert metrics.to_floats() == pytest.approx(
            expected[2].to_floats(), rel=1e-9, abs=1e-12, nan_ok=True
        )
    first, second = graphs
    assert first == second
