"""The same data in any layout gives the same values."""

import numpy as np
import pytest
import torch
from batches import Batch, batches, make_batch
from components import AGGREGATIONS, OBJECTIVES
from hypothesis import given, strategies as st

import iscorrect as ic
from iscorrect import PRESETS, Layout, PolicyLoss, pad_sequences, unpad
from iscorrect.layout import masked
from iscorrect.loss.ratios import at_level


def pack(batch, per_row=2):
    """Put `per_row` rows after one another; the layout tells them apart."""
    rows, width = batch.mask.shape
    short = -rows % per_row
    grown = [torch.cat([x, x[:1].expand(short, width)]) for x in batch]
    grown[-1][rows:] = False
    packed = Batch(*(x.reshape(-1, per_row * width) for x in grown))
    ids = torch.arange(per_row * width).expand(packed.mask.shape) // width
    return packed, Layout(packed.mask, sequence_ids=ids)


def flatten(batch):
    """Only the counted tokens, in one flat row, as flash-attention packs them."""
    lengths = batch.mask.sum(-1)
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    flat = Batch(*(x[batch.mask][None] for x in batch))
    return flat, Layout.from_cu_seqlens(flat.mask, cu_seqlens)


def loss_and_gradient(loss_fn, batch, layout):
    log_probs = batch.log_probs.clone().requires_grad_()
    loss, metrics = loss_fn(
        log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=layout, old_log_probs=batch.old_log_probs, ref_log_probs=batch.ref_log_probs,
    )
    loss.backward()
    return loss.detach(), log_probs.grad[layout.mask], metrics.to_floats()


def assert_same(loss_fn, batch, layout, other, other_layout, rtol):
    loss, gradient, metrics = loss_and_gradient(loss_fn, batch, layout)
    loss2, gradient2, metrics2 = loss_and_gradient(loss_fn, other, other_layout)
    torch.testing.assert_close(loss2, loss, rtol=rtol, atol=rtol)
    scale = gradient.abs().max().item() if gradient.numel() else 1.0
    torch.testing.assert_close(gradient2, gradient, rtol=rtol, atol=rtol * scale)
    assert metrics2 == pytest.approx(metrics, rel=rtol, abs=rtol)


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(
    batch=batches(), preset=st.sampled_from(sorted(PRESETS)),
    aggregation=st.sampled_from(list(AGGREGATIONS.values())),
    over=st.sampled_from(["mask", "kept"]),
)
def test_packed_and_flat_equal_padded_in_float64(objective, batch, preset, aggregation, over):
    loss_fn = PolicyLoss(
        correction=PRESETS[preset](), objective=OBJECTIVES[objective], aggregation=aggregation,
        over=over, reference_kl=ic.ReferenceKL(coefficient=0.1),
    )
    padded = Layout(batch.mask)
    assert_same(loss_fn, batch, padded, *pack(batch), rtol=1e-12)
    assert_same(loss_fn, batch, padded, *flatten(batch), rtol=1e-12)


@pytest.mark.parametrize("preset", ["token-tis", "sequence-tis", "confidence-is", "pareto-is"])
def test_packed_and_flat_equal_padded_to_float32_rounding(preset):
    batch = make_batch(11, rows=6, width=200, scale=0.02).to(torch.float32)
    loss_fn = PolicyLoss(
        correction=PRESETS[preset](), objective=OBJECTIVES["gspo"],
        reference_kl=ic.ReferenceKL(),
    )
    padded = Layout(batch.mask)
    assert_same(loss_fn, batch, padded, *pack(batch), rtol=2e-5)
    assert_same(loss_fn, batch, padded, *flatten(batch), rtol=2e-5)


@given(batch=batches())
def test_lists_of_sequences_survive_padding(batch):
    lists = unpad(batch.old_log_probs, batch.mask)
    padded, mask = pad_sequences(lists, value=float("nan"))
    assert [x.tolist() for x in unpad(padded, mask)] == [x.tolist() for x in lists]


def test_no_sequences_pad_to_an_empty_batch():
    padded, mask = pad_sequences([])
    assert padded.shape == mask.shape == (0, 0)
    assert mask.dtype == torch.bool


def test_a_row_may_hold_sequences_of_any_ids_as_long_as_they_change():
    mask = torch.ones(2, 5, dtype=torch.bool)
    layout = Layout(mask, sequence_ids=torch.tensor([[7, 7, -1, -1, 7], [7, 7, 7, 7, 7]]))
    assert layout.sequence_total(torch.ones(2, 5)).tolist() == [[2, 2, 2, 2, 1], [5] * 5]
    assert layout.num_sequences() == 4


def test_padding_between_sequences_is_no_sequence():
    mask = torch.tensor([[True, True, False, True, False]])
    layout = Layout(mask, sequence_ids=torch.tensor([[0, 0, 1, 2, 3]]))
    assert layout.num_sequences() == 2
    assert layout.sequence_starts().tolist() == [[True, False, False, True, False]]


def test_position_ids_start_a_sequence_at_each_zero():
    mask = torch.ones(1, 5, dtype=torch.bool)
    layout = Layout.from_position_ids(mask, torch.tensor([[0, 1, 0, 1, 2]]))
    assert layout.sequence_max(torch.arange(5.0)[None]).tolist() == [[1, 1, 4, 4, 4]]


def test_tokens_beyond_the_last_cumulative_length_are_padding():
    mask = torch.tensor([[True, True, True, False, False]])
    layout = Layout.from_cu_seqlens(mask, torch.tensor([0, 1, 3]))
    assert layout.num_sequences() == 2
    assert layout.sequence_count(torch.float32)[0, :3].tolist() == [1, 2, 2]


@given(batch=batches(), start=st.integers(0, 3), size=st.integers(1, 3))
def test_some_rows_of_a_layout_are_the_layout_of_those_rows(batch, start, size):
    packed, layout = pack(batch)
    x = torch.where(packed.mask, packed.advantages, 0)
    part = layout.rows(start, start + size)
    rows = slice(start, start + size)
    assert torch.equal(part.sequence_total(x[rows]), layout.sequence_total(x)[rows])
    assert torch.equal(part.sequence_starts(), layout.sequence_starts()[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@given(seed=st.integers(0, 999))
def test_masking_is_where_whatever_the_padding_holds(dtype, seed):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((5, 3)))
    x[torch.from_numpy(rng.random((5, 3)) < 0.4)] = rng.choice([np.nan, np.inf, -np.inf])
    x = x.to(dtype)
    mask = torch.from_numpy(rng.random((5, 3)) < 0.5)
    expected = torch.where(mask, x, 0)
    torch.testing.assert_close(masked(x, mask), expected, rtol=0, atol=0, equal_nan=True)
    across = masked(x.T, mask.T)
    torch.testing.assert_close(across, expected.T, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lengths", [[2, 5], [0, 3, 2], [[0, 2]], [0.0, 2.0], []])
def test_cumulative_lengths_rise_from_zero(lengths):
    mask = torch.ones(5, dtype=torch.bool)
    with pytest.raises(ic.InputError, match="`cu_seqlens` must be"):
        Layout.from_cu_seqlens(mask, torch.tensor(lengths))


def test_a_mask_counts_what_is_true_whatever_its_bytes_hold():
    mask = torch.tensor([[255, 0, 1]], dtype=torch.uint8).view(torch.bool)
    with torch.no_grad():
        assert Layout(mask).total(torch.ones(1, 3)) == 2


def test_sums_of_a_long_packed_row_keep_their_digits():
    n, last = 200_000, 10
    x = torch.rand(1, n, generator=torch.Generator().manual_seed(0)) - 0.4
    ids = (torch.arange(n) >= n - last).long().view(1, n)
    layout = Layout(torch.ones(1, n, dtype=torch.bool), sequence_ids=ids)
    total = layout.sequence_total(x)[0, 0].double()
    torch.testing.assert_close(total, x[0, :-last].double().sum(), rtol=1e-7, atol=0)
    prefix, expected = layout.prefix_total(x)[0, -last:], x[0, -last:].double().cumsum(-1)
    torch.testing.assert_close(prefix.double(), expected, rtol=1e-6, atol=1e-7)


def test_lengths_that_do_not_fit_the_tokens_are_refused():
    mask = torch.ones(5, dtype=torch.bool)
    for beyond in ([0, 3, 6], [0, 2, 100]):
        with pytest.raises(ic.InputError, match="to end at 5"):
            Layout.from_cu_seqlens(mask, torch.tensor(beyond))
    with pytest.raises(ic.InputError, match="False from token 2 on"):
        Layout.from_cu_seqlens(mask, torch.tensor([0, 2]))
    padded = Layout.from_cu_seqlens(torch.arange(5) < 2, torch.tensor([0, 2]))
    assert padded.num_sequences() == 1


@pytest.mark.parametrize("ids", [torch.ones(1, 2).bool(), torch.ones(1, 2, dtype=torch.complex64)])
def test_ids_are_integers(ids):
    with pytest.raises(ic.InputError, match="`sequence_ids` must be an integer tensor"):
        Layout(torch.ones(1, 2, dtype=torch.bool), sequence_ids=ids)


def test_a_mean_of_16_bit_numbers_does_not_overflow():
    x = torch.full((1, 70_000), 0.5, dtype=torch.float16)
    layout = Layout(torch.ones(1, 70_000, dtype=torch.bool))
    assert layout.mean(x) == 0.5 and (layout.sequence_mean(x) == 0.5).all()
    assert layout.sequence_mean(x).dtype == torch.float16


def test_another_mask_is_over_the_same_tokens():
    layout = Layout(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ic.InputError, match=r"of shape \(2, 3\)"):
        layout.with_mask(torch.ones(2, 4, dtype=torch.bool))


def test_sequences_to_pad_are_tensors_of_one_dtype():
    with pytest.raises(ic.InputError, match=r"`tensors\[1\]` must be torch.int64 like the first"):
        pad_sequences([torch.tensor([1, 2]), torch.tensor([-0.5, -0.7])])
    with pytest.raises(ic.InputError, match="a one-dimensional tensor, got list"):
        pad_sequences([[1.0, 2.0]])


def test_only_a_bool_mask_of_their_shape_takes_padding_away():
    padded = torch.tensor([[-0.1, -0.2, 9.0]])
    with pytest.raises(ic.InputError, match=r"pass mask.bool\(\)"):
        unpad(padded, torch.tensor([[1, 1, 0]]))
    with pytest.raises(ic.InputError, match=r"of shape \(1, 2\) like `mask`"):
        unpad(padded, torch.tensor([[True, True]]))


def test_an_unknown_level_is_refused_and_a_mask_is_a_layout():
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ic.InputError, match="one of 'token', 'sequence'"):
        at_level(torch.zeros(1, 2), Layout(mask), "foo")
    assert at_level(torch.ones(1, 2), mask, "sequence").tolist() == [[2.0, 2.0]]


def test_a_group_is_a_process_group():
    with pytest.raises(ic.InputError, match="a process group, or None"):
        Layout(torch.ones(1, 2, dtype=torch.bool), batch_group="world")


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("objective", [ic.PPOClip(level="geometric"), ic.GMPO(), ic.Reinforce()])
def test_a_batch_made_under_inference_mode_trains(objective, aggregation):
    loss_fn = ic.PolicyLoss(objective=objective, aggregation=aggregation)
    x = -torch.rand(2, 5)
    plain = dict(rollout_log_probs=x - 0.1, old_log_probs=x.clone(), advantages=torch.ones(2, 5),
                 mask=torch.ones(2, 5, dtype=torch.bool))
    with torch.inference_mode():
        made = {name: tensor.clone() for name, tensor in plain.items()}
    gradients = []
    for batch in (plain, made):
        leaf = x.clone().requires_grad_()
        loss_fn(leaf, **batch).loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
