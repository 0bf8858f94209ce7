"""What of an update arrives in an engine's number format, and the remedies where it is sent."""

import copy
import itertools
import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import assume, given, strategies as st
from safetensors.torch import save_file
from torch import nn

import iscorrect.fp16.checkpoints
from iscorrect import (
    GradientSketch,
    InputError,
    audit_fp16,
    round_with_feedback,
    stochastic_round,
    stochastic_round_weights,
    weight_arrival,
)
from iscorrect.cli.main import main
from iscorrect.fp16.arrival import UpdateWatch, arrived, to_grid
from iscorrect.fp16.checkpoints import boxes
from iscorrect.fp16.sending import neighbours

FP8 = [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]
DTYPES = [torch.bfloat16, torch.float16, *FP8]


def every_number(dtype):
    """All finite numbers of a dtype, in float64, in order and once each."""
    bits = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int64)
    kind = torch.int16 if dtype.itemsize == 2 else torch.uint8
    values = bits.to(kind).view(dtype).double()
    return np.unique(values[values.isfinite()].numpy())


def nearest(x, dtype):
    """The nearest numbers of a dtype in float64, ties to the even one, by looking at all."""
    grid = every_number(dtype)
    place = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
    low, high = grid[place - 1], grid[place]
    middle = (low + high) / 2
    found = np.where(x > middle, high, low)
    ties = np.flatnonzero(x == middle)
    kind = torch.int16 if dtype.itemsize == 2 else torch.uint8
    for i in ties:
        odd = int(torch.tensor(low[i]).to(dtype).view(kind)) & 1
        found[i] = high[i] if odd else low[i]
    return found


# the share that arrives


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", ["none", "row"])
def test_the_share_is_that_of_float64(dtype, scaling):
    torch.manual_seed(0)
    before = torch.randn(7, 30) * 0.05
    after = before + torch.randn(7, 30) * 1e-3
    w, w2 = before.double().numpy(), after.double().numpy()

    def rounded(x):
        scale = np.float32(1)
        if scaling == "row":  # as float32 has it
            largest = np.abs(x).max(1, keepdims=True).astype(np.float32)
            scale = largest / np.float32(torch.finfo(dtype).max)
        small = x.astype(np.float32) / scale
        return nearest(small.astype(np.float64), dtype).astype(np.float32) * scale

    q, q2 = rounded(w).astype(np.float64), rounded(w2).astype(np.float64)
    found = weight_arrival({"w": before}, {"w": after}, dtype, scaling=scaling)
    step = w2 - w
    assert found.share == pytest.approx(np.sum((q2 - q) * step) / np.sum(step**2), rel=1e-12)
    assert found.total.seen == np.sum(q2 != q)
    assert found.total.rest == pytest.approx(np.linalg.norm(q2 - w2) / np.linalg.norm(step))


def test_updates_of_less_than_half_a_step_vanish_from_weights_on_the_grid():
    grid = torch.arange(128, 256) * 2.0**-12  # every BF16 of an octave, 2⁻¹² apart
    for size, share in ((0.499, 0.0), (0.501, 1 / 0.501), (1.0, 1.0)):
        found = weight_arrival({"w": grid}, {"w": grid + size * 2.0**-12})
        assert found.share == pytest.approx(share, rel=1e-3)
        assert found.total.unchanged == (1.0 if size < 0.5 else 0.0)


def test_from_weights_anywhere_small_updates_arrive_on_average():
    w = (1 + torch.linspace(0, 1, 400_001))[:-1]
    found = weight_arrival({"w": w}, {"w": w + 2.0**-11})  # an eighth of half a step
    assert found.share == pytest.approx(1.0, abs=0.01)
    assert found.total.unchanged == pytest.approx(1 - 2.0**-4, abs=0.01)


def test_a_format_that_holds_the_weights_passes_the_whole_update():
    w = torch.randn(50).half()
    found = weight_arrival({"w": w}, {"w": w * 2}, torch.float16)
    assert (found.share, found.total.rest) == (1.0, 0.0)


def test_a_total_is_that_of_the_tensors_laid_end_to_end():
    torch.manual_seed(1)
    before = {"a": torch.randn(5, 3), "b": torch.randn(40)}
    after = {name: x + torch.randn_like(x) * 3e-3 for name, x in before.items()}
    ends = ({"ab": torch.cat([x["a"].flatten(), x["b"]])} for x in (before, after))
    whole = weight_arrival(*ends)
    total = weight_arrival(before, after).total
    assert total.share == pytest.approx(whole.share)
    assert (total.entries, total.seen) == (whole.total.entries, whole.total.seen)


def test_without_an_update_there_is_no_share():
    found = weight_arrival({"w": torch.ones(3)}, {"w": torch.ones(3)})
    assert math.isnan(found.share) and math.isnan(found.total.unchanged)
    assert found.to_dict()["total"]["share"] is None
    assert "–" in str(found)


def test_what_is_not_finite_is_counted_and_left_out():
    before = torch.tensor([1.0, 1.0, math.nan, 70000.0])
    after = torch.tensor([2.0, math.inf, 1.0, 70001.0])
    total = weight_arrival({"w": before}, {"w": after}, torch.float16).total
    assert (total.nonfinite, total.moved, total.share) == (3, 1, 1.0)


def test_arrival_of_what_was_sent_in_another_way():
    w, w2 = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
    sent, sent2 = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
    found = arrived("w", w, w2, sent_before=sent, sent_after=sent2)
    assert found.share == pytest.approx((0 * 0.5 + -2 * -1) / (0.25 + 1))
    assert (found.moved, found.seen, found.unchanged) == (2, 1, 0.5)


# what is read


def planted(folder):
    torch.manual_seed(2)
    states = [{"a": torch.randn(30, 5, dtype=torch.float32), "n": torch.arange(3)}]
    states.append({"a": states[0]["a"] + 1e-3, "n": torch.arange(3)})
    for name, state in zip(("before", "after"), states, strict=True):
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
    return states


def test_folders_files_state_dicts_and_modules_say_the_same(tmp_path):
    before, after = planted(tmp_path)
    torch.save(after, tmp_path / "after.pt")
    of_state = weight_arrival(before, after)
    for paths in (
        (tmp_path / "before", tmp_path / "after"), (before, tmp_path / "after"),
        (tmp_path / "before", str(tmp_path / "after.pt")),
    ):
        found = weight_arrival(*paths)
        assert found.rows == of_state.rows
        assert set(found.skipped) == {"n"}
    old, new = nn.Linear(3, 2), nn.Linear(3, 2)
    by_module = weight_arrival(old, new)
    assert by_module == weight_arrival(old.state_dict(), new.state_dict())


def test_no_read_holds_more_than_a_piece(tmp_path, monkeypatch):
    planted(tmp_path)
    whole = weight_arrival(tmp_path / "before", tmp_path / "after")
    sizes = []

    def small(shape, _=None):
        yield from boxes(shape, 8)

    def watched(x, **of):
        sizes.append(x.numel())
        return to_grid(x, **of)

    monkeypatch.setattr(iscorrect.fp16.checkpoints, "boxes", small)
    monkeypatch.setattr("iscorrect.fp16.arrival.to_grid", watched)
    parts = weight_arrival(tmp_path / "before", tmp_path / "after")
    assert max(sizes) <= 8 and len(sizes) == 2 * 30
    assert parts.share == pytest.approx(whole.share)
    assert parts.total.seen == whole.total.seen


@pytest.mark.parametrize(
    ("after", "message"),
    [({"v": torch.ones(3)}, r"v in `after` alone, and 1 more"),
     ({"w": torch.ones(4)}, r"float32 \(4,\) beside float32 \(3,\) in w"),
     ({"w": torch.ones(3), "x": torch.ones(3)}, "x in `after` alone")],
)
def test_two_models_are_no_update(after, message):
    with pytest.raises(InputError, match=message):
        weight_arrival({"w": torch.ones(3)}, after)


def tied():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def test_names_of_one_tensor_are_names_of_copies_of_it():
    model = tied()
    copies = {name: x.clone() for name, x in model.state_dict().items()}
    alone = {"0.weight": copies["0.weight"]}
    with torch.no_grad():
        model[0].weight.add_(0.01)
    one = weight_arrival(alone, {"0.weight": model[0].weight})
    for before, after in ((copies, model), (copies, model.state_dict())):
        found = weight_arrival(before, after)
        assert [row.name for row in found.rows] == ["0.weight", "1.weight"]
        assert found.share == pytest.approx(one.share)
    # files hold one name of a tied tensor, not always the first
    for name, x in copies.items():
        assert weight_arrival({name: x}, model).share == one.share


def test_a_tensor_of_two_names_on_both_sides_counts_once():
    old, new = tied(), tied()
    with torch.no_grad():
        new[0].weight.add_(0.01)
    assert [row.name for row in weight_arrival(old, new).rows] == ["0.weight"]


def test_each_name_of_one_tensor_is_held_against_its_own():
    zeros = torch.zeros(3)
    after = {"a": torch.ones(3), "b": torch.full((3,), 2.0)}
    found = weight_arrival({"a": zeros, "b": zeros}, after)
    assert [row.squares for row in found.rows] == [3.0, 12.0]
    backward = weight_arrival(after, {"a": zeros, "b": zeros})
    assert [row.squares for row in backward.rows] == [3.0, 12.0]


@pytest.mark.parametrize("missing", ["0.weight", "1.weight"])
def test_a_name_that_copies_lack_is_refused(missing):
    copies = {name: x.clone() for name, x in tied().state_dict().items()}
    fewer = {name: x for name, x in copies.items() if name != missing}
    with pytest.raises(InputError, match=f"{missing} in `before` alone, and 0 more"):
        weight_arrival(copies, fewer)
    with pytest.raises(InputError, match=f"{missing} in `after` alone, and 0 more"):
        weight_arrival(fewer, copies)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", ["none", "row"])
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0,)])
def test_a_tensor_without_entries_has_none(dtype, scaling, shape):
    w, empty = torch.ones(2), torch.zeros(shape)
    found = weight_arrival({"e": empty, "w": w}, {"e": empty, "w": w * 2}, dtype, scaling=scaling)
    assert [row.entries for row in found.rows] == [0, 2]
    assert found.share == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [(dict(dtype=torch.float32), "dtype"), (dict(dtype="bfloat16"), "dtype"),
     (dict(dtype=torch.int8), "dtype"), (dict(scaling="tensor"), "scaling")],
)
def test_what_no_engine_holds_is_refused(changes, argument):
    with pytest.raises(InputError, match=f"`{argument}`"):
        weight_arrival({"w": torch.ones(3)}, {"w": torch.ones(3)}, **changes)


def test_quantised_weights_alone_are_refused():
    packed = {"w": torch.ones(3, dtype=torch.int8)}
    with pytest.raises(InputError, match="the trainer's own weights"):
        weight_arrival(packed, packed)


# the command


def test_fp16_check_says_what_arrives_since_an_earlier_checkpoint(tmp_path, capsys):
    grid = torch.linspace(0.5, 1, 129)
    for name, state in (("old", grid), ("new", grid - 2.0**-11)):
        save_file({"w": state}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / "new.safetensors"), "--since", str(tmp_path / "old.safetensors")]
    assert main(["fp16-check", *paths]) == 0
    printed = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    assert rows["bfloat16"][1:4] == ["0", "100.0", "%"]
    assert rows["float16"][1:4] == ["1.000", "0", "%"]
    assert printed.splitlines()[-1].startswith("Safe with loss scaling")
    assert "stored in 16 bits" not in printed
    assert main(["fp16-check", *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["update"]
    assert [x["format"] for x in found] == ["bfloat16", "float16", "float8_e4m3fn by row"]
    assert [x["total"]["share"] for x in found][:2] == [0.0, 1.0]
    assert main(["fp16-check", paths[0], "--since", str(tmp_path / "none")]) == 2
    assert "`--since` must be a path that exists" in capsys.readouterr().err
    save_file({"v": grid}, tmp_path / "other.safetensors")
    assert main(["fp16-check", paths[0], "--since", str(tmp_path / "other.safetensors")]) == 2
    assert "of the same tensors as `--since`, got v in `--since`" in capsys.readouterr().err


def test_fp16_check_reads_tensors_without_entries(tmp_path, capsys):
    for name, size in (("old", 1.0), ("new", 2.0)):
        state = {"e": torch.zeros(3, 0), "w": torch.full((3,), size)}
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / "new.safetensors"), "--since", str(tmp_path / "old.safetensors")]
    assert main(["fp16-check", *paths, "--json"]) == 0
    for found in json.loads(capsys.readouterr().out)["update"]:
        assert [x["entries"] for x in found["tensors"]] == [0, 3]
        assert found["total"]["share"] == 1.0


def test_fp16_check_counts_a_tied_tensor_once(tmp_path, capsys):
    w = torch.nn.Parameter(torch.ones(3))
    torch.save({"a": w, "b": w}, tmp_path / "model.pt")
    assert main(["fp16-check", str(tmp_path / "model.pt"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["tensors"]
    assert (row["name"], row["entries"]) == ("a", 3)


def test_a_tied_tensor_counts_once_however_the_model_is_given(tmp_path):
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for source in (model, model.state_dict(), tmp_path / "model.pt"):
        assert [row.name for row in audit_fp16(source).rows] == ["0.weight"]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert weight_arrival(before, model).total.entries == 30  # two tensors before, one now
    assert weight_arrival(copy.deepcopy(model), model).total.entries == 15


def test_no_tensor_that_is_read_on_demand_is_taken_for_another(tmp_path):
    class OnDemand(Mapping):
        """Frees each tensor before it makes the next, which often lies where it did."""

        def __getitem__(self, name):
            return torch.full((300, 300), 1e6 if name == "w4" else 0.1)

        def __iter__(self):
            return iter([f"w{i}" for i in range(6)])

        def __len__(self):
            return 6

    audit = audit_fp16(OnDemand())
    assert [row.name for row in audit.rows] == [*OnDemand()] and audit.verdict == "not safe"


def test_a_checkpoint_from_before_zip_files_is_read(tmp_path):
    state = {"w": torch.ones(3)}
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert [row.name for row in audit_fp16(tmp_path / "old.bin").rows] == ["w"]


def test_a_state_dict_that_changes_with_the_model_is_refused():
    model = nn.Linear(2, 3)
    kept = {name: x.clone() for name, x in model.state_dict().items()}
    for before in (model.state_dict(), dict(model.named_parameters()), model):
        with pytest.raises(InputError, match=r"`before` must .*the same memory.*x\.clone\(\)"):
            weight_arrival(before, model)
    partly = {**kept, "bias": model.bias}  # a frozen tensor need not be copied
    with torch.no_grad():
        model.weight.mul_(1.5)
    assert weight_arrival(partly, model).total.moved == 6


def test_checkpoints_that_were_rounded_already_are_said_to_be(tmp_path, capsys):
    save_file({"w": torch.ones(3).bfloat16()}, tmp_path / "old.safetensors")
    save_file({"w": torch.ones(3).bfloat16() * 2}, tmp_path / "new.safetensors")
    paths = [str(tmp_path / "new.safetensors"), "--since", str(tmp_path / "old.safetensors")]
    assert main(["fp16-check", *paths]) == 0
    assert "stored in 16 bits" in capsys.readouterr().out


# the remedies


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_are_those_of_the_list_of_all_numbers(dtype):
    grid = every_number(dtype)
    torch.manual_seed(0)
    inside = torch.cat([
        torch.randn(2000) * torch.logspace(-9, 2, 2000), torch.tensor(grid[::97]).float(),
        torch.tensor([0.0, -0.0, 2.0**-30]),
    ])
    inside = inside[inside.abs() <= grid[-1]]
    low, high, up = (x.double().numpy() for x in neighbours(inside, dtype))
    x = inside.double().numpy()
    size = np.abs(x)
    positive = grid[grid >= 0]
    place = np.searchsorted(positive, size, side="right") - 1
    assert np.array_equal(np.abs(low), positive[place])
    exact = positive[place] == size
    above = positive[np.minimum(place + 1, len(positive) - 1)]
    assert np.array_equal(np.abs(high), np.where(exact, size, above))
    for part in (low, high):
        signs = (part != 0) | ("fnuz" not in str(dtype))  # which has no −0
        assert np.array_equal(np.signbit(part), np.signbit(x) & signs)
    assert np.array_equal(up[exact], np.zeros(exact.sum()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2e-2, 1e-3])
def test_small_weights_that_are_sent_are_numbers_of_their_own_sign(dtype, size):
    torch.manual_seed(0)
    x = torch.randn(20_000) * size
    sent = stochastic_round(x, dtype).float()
    assert sent.isfinite().all() and (sent * x >= 0).all()
    steps = 4 * (sent - x).std() / len(x) ** 0.5
    assert sent.mean().item() == pytest.approx(x.mean().item(), abs=steps.item() + 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@given(x=st.floats(-400, 400, width=32))
def test_stochastic_rounding_has_no_bias_over_its_two_outcomes(dtype, x):
    assume(abs(x) <= torch.finfo(dtype).max)
    low, high, up = (v.double().item() for v in neighbours(torch.tensor([x]), dtype))
    assert min(low, high) <= x <= max(low, high) and 0 <= up < 1
    # the probability itself is a float32
    assert (1 - up) * low + up * high == pytest.approx(x, abs=abs(high - low) * 2**-24)
    drawn = math.ceil(up * 2**24) / 2**24  # how many of the 2²⁴ draws lie below it
    spacing = 2.0 ** (math.frexp(x)[1] - 24) if x else 0.0
    if high != low and spacing >= abs(high - low) * 2**-24:
        assert drawn == up  # exact: float32's own step is a whole number of draws


def test_every_draw_below_the_probability_rounds_away_from_zero(monkeypatch):
    x = torch.tensor([1 + 2**-9, -1 - 2**-9])  # a quarter of a step of BF16
    found = []
    for draw in (0.0, 0.25 - 2**-24, 0.25, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda *_, draw=draw, **__: torch.full((2,), draw))
        found.append(stochastic_round(x, torch.bfloat16).tolist())
    away, back = [1 + 2**-7, -1 - 2**-7], [1.0, -1.0]
    assert found == [away, away, back, back]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_the_format_stay_and_what_it_cannot_hold_is_as_torch_has_it(dtype):
    grid = torch.tensor(every_number(dtype)).float()
    assert torch.equal(stochastic_round(grid, dtype).float(), grid)
    outside = torch.tensor([math.inf, -math.inf, math.nan, 3e38, 1e6, -1e6])
    outside = outside[~(outside.abs() <= torch.finfo(dtype).max)]
    sent, plain = stochastic_round(outside, dtype).float(), outside.to(dtype).float()
    assert torch.equal(sent.nan_to_num(7), plain.nan_to_num(7))


def test_every_entry_of_a_large_tensor_is_rounded_in_its_place(monkeypatch):
    monkeypatch.setattr("iscorrect.fp16.sending.ROUNDED_AT_ONCE", 7)
    x = torch.randn(5, 4)
    low, high, _ = neighbours(x, torch.bfloat16)
    sent = stochastic_round(x, torch.bfloat16)
    assert sent.shape == x.shape and ((sent == low) | (sent == high)).all()
    assert stochastic_round(torch.zeros(0, 3), torch.bfloat16).shape == (0, 3)


def test_a_seeded_generator_sends_what_did_not_change_as_it_was():
    torch.manual_seed(0)
    w = torch.randn(10_000) * 0.05

    def sent(x):
        return stochastic_round(x, torch.bfloat16, generator=torch.Generator().manual_seed(5))

    first = sent(w)
    later = [sent(w + k * 2e-6).float() for k in range(5)]
    assert torch.equal(first, sent(w))
    for old, new in itertools.pairwise(later):
        assert (new >= old).all()  # an entry passes its threshold once
    ends = weight_arrival({"w": w}, {"w": w + 8e-6}).total.moved
    share = arrived("w", w, w + 8e-6, sent_before=later[0], sent_after=later[4]).share
    assert ends == 10_000 and share == pytest.approx(1.0, abs=0.3)


def test_ranks_and_sends_have_the_same_draws_whatever_else_is_sent():
    torch.manual_seed(0)
    weights = {name: torch.randn(1000) for name in "abc"}
    first = dict(stochastic_round_weights(weights.items(), torch.bfloat16))
    assert [*dict(stochastic_round_weights(weights, torch.bfloat16))] == [*first]
    other_rank = dict(stochastic_round_weights([("c", weights["c"])], torch.bfloat16))
    assert torch.equal(first["c"], other_rank["c"])
    again = dict(stochastic_round_weights([("d", weights["c"])], torch.bfloat16))
    other_seed = dict(stochastic_round_weights(weights.items(), torch.bfloat16, seed=1))
    assert not torch.equal(again["d"], first["c"]) and not torch.equal(other_seed["c"], first["c"])


def test_weights_arrive_through_the_stream():
    torch.manual_seed(0)
    w = (0.05 * torch.randn(20_000)).bfloat16().float()
    update = 2e-5 * torch.randn(20_000).sign()

    def sent(x):
        (_, found), = stochastic_round_weights([("w", x)], torch.bfloat16)
        return found.float()

    share = arrived("w", w, w + update, sent_before=sent(w), sent_after=sent(w + update)).share
    nearest = weight_arrival({"w": w}, {"w": w + update}).total.share
    assert nearest < 0.2 and share == pytest.approx(1, abs=0.1)


def test_what_needs_no_rounding_passes_and_narrow_weights_are_widened():
    given = {
        "kept": torch.ones(3, dtype=torch.bfloat16), "ids": torch.arange(3),
        "half": torch.full((1000,), 1 + 2**-9, dtype=torch.float16),
    }
    sent = dict(stochastic_round_weights(given.items(), torch.bfloat16))
    assert sent["kept"] is given["kept"] and sent["ids"] is given["ids"]
    assert sent["half"].dtype == torch.bfloat16
    assert sent["half"].float().mean().item() == pytest.approx(1 + 2**-9, abs=5e-4)


@pytest.mark.parametrize(("given", "message"), [
    (dict(dtype=torch.float32), "`dtype`"), (dict(dtype=torch.bfloat16, seed=0.5), "`seed`"),
])
def test_a_stream_is_refused_before_anything_is_sent(given, message):
    with pytest.raises(InputError, match=message):
        stochastic_round_weights([("w", torch.ones(2))], **given)


def test_what_is_no_tensor_is_named():
    with pytest.raises(InputError, match="under 'w'"):
        list(stochastic_round_weights([("w", 1.0)], torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_feedback_sent_adds_up_to_what_it_was_given(dtype):
    torch.manual_seed(3)
    given_, sent, rest = torch.zeros(200).double(), torch.zeros(200).double(), None
    for _ in range(50):
        x = torch.randn(200)
        out, rest = round_with_feedback(x, dtype, rest)
        given_ += x.double()
        sent += out.double()
    assert torch.allclose(sent + rest.double(), given_, rtol=0, atol=50 * 2**-22)


def test_feedback_sends_a_constant_weight_right_on_average():
    x, rest, sent = torch.tensor([1 + 2**-10]), None, []
    for _ in range(8):
        out, rest = round_with_feedback(x, torch.bfloat16, rest)
        sent.append(out.item())
    assert sum(sent) / 8 == x.item()
    assert x.bfloat16().item() == 1.0


def test_what_a_format_cannot_hold_leaves_no_rest():
    _, rest = round_with_feedback(torch.tensor([1e5, math.nan, 1.0]), torch.float16)
    assert rest.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("send", [stochastic_round, round_with_feedback])
@pytest.mark.parametrize(
    ("x", "dtype", "message"),
    [(torch.ones(2).bfloat16(), torch.bfloat16, "float32 or wider, got bfloat16"),
     (torch.ones(2), torch.float32, "`dtype`"), (1.0, torch.bfloat16, "got float")],
)
def test_sends_of_other_things_are_refused(send, x, dtype, message):
    with pytest.raises(InputError, match=message):
        send(x, dtype)


def test_a_rest_of_another_tensor_is_refused():
    with pytest.raises(InputError, match=r"`rest` must be of shape \(2,\)"):
        round_with_feedback(torch.ones(2), torch.bfloat16, torch.ones(3))


def test_a_rest_on_another_device_is_refused():
    with pytest.raises(InputError, match="`rest` must be on cpu like `x`, got on meta"):
        round_with_feedback(torch.ones(2), torch.bfloat16, torch.ones(2, device="meta"))


@pytest.mark.parametrize("shape", [(2,), ()])
def test_a_rest_that_is_no_tensor_is_refused(shape):
    x = torch.ones(shape)
    for rest in (round_with_feedback(x, torch.bfloat16), 0.0):
        with pytest.raises(InputError, match="`rest` must be of shape"):
            round_with_feedback(x, torch.bfloat16, rest)


def test_a_seed_is_no_generator():
    with pytest.raises(InputError, match=r"`generator` must be a .*, or None, got int"):
        stochastic_round(torch.ones(2), torch.bfloat16, generator=3)


@pytest.mark.parametrize("name", ["old_is_lag", "noise"])
def test_lag_and_noise_of_one_size_are_told_apart(name):
    torch.manual_seed(4)
    start = torch.randn(20_000)
    update = torch.randn(20_000) * 1e-2
    sent = start if name == "old_is_lag" else start + update + torch.randn(20_000) * 1e-2
    found = arrived("w", start, start + update, sent_before=start, sent_after=sent)
    assert found.rest == pytest.approx(1.0, abs=0.03)
    assert found.share == pytest.approx(0.0 if name == "old_is_lag" else 1.0, abs=0.03)


# over a run


def test_a_sample_says_about_what_the_whole_says():
    torch.manual_seed(5)
    w = [torch.nn.Parameter((torch.randn(300, 100) * 0.05).bfloat16().float()) for _ in range(4)]
    before = {str(i): x.detach().clone() for i, x in enumerate(w)}
    watch = UpdateWatch(torch.bfloat16, entries=20_000)
    assert math.isnan(watch(w).share)
    with torch.no_grad():
        for x in w:
            x.add_(torch.randn_like(x).sign() * 1e-4)
    found = watch(w)
    whole = weight_arrival(before, {str(i): x for i, x in enumerate(w)})
    assert found.entries == 20_000
    assert 0.1 < whole.share < 0.9
    assert found.share == pytest.approx(whole.share, abs=0.03)
    assert found.unchanged == pytest.approx(whole.total.unchanged, abs=0.02)
    assert watch(w).moved == 0


def test_a_sample_may_be_all_there_is_and_a_rank_may_hold_nothing():
    w = torch.nn.Parameter(torch.ones(7))
    for parameters in ([w], [w, torch.nn.Parameter(torch.zeros(0))]):
        watch = UpdateWatch(torch.bfloat16)
        watch(parameters)
        assert watch(parameters).entries == 7
    empty = UpdateWatch(torch.bfloat16)
    assert empty([torch.nn.Parameter(torch.zeros(0))]).entries == 0
    with pytest.raises(InputError, match="UpdateWatch: `parameters` must be at least one tensor"):
        empty([])


def on_two_ranks(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shards_are_made_whole()
    dist.destroy_process_group()


def shards_are_made_whole():
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Linear(4, 3)  # an odd number of rows for two ranks
    before = {name: x.clone() for name, x in model.state_dict().items()}
    expected = dict(stochastic_round_weights(before.items(), torch.bfloat16))
    sharded = fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    sent = dict(stochastic_round_weights(sharded.named_parameters(), torch.bfloat16))
    assert all(torch.equal(sent[name], x) for name, x in expected.items())
    assert [row.entries for row in audit_fp16(sharded).rows] == [12, 3]
    with torch.no_grad():
        for x in sharded.parameters():
            x.add_(1e-2)
    found = weight_arrival(before, sharded, torch.float16)
    assert found.total.moved == 15 and found.share == pytest.approx(1, abs=0.05)
    sharded(torch.ones(2, 4)).sum().backward()
    with pytest.raises(InputError, match="GradientSketch: `gradients` must be plain tensors"):
        GradientSketch()(x.grad for x in sharded.parameters())
    with pytest.raises(InputError, match="stochastic_round: `x` must be a plain tensor"):
        stochastic_round(next(sharded.parameters()), torch.bfloat16)


@pytest.mark.slow
def test_shards_are_made_whole_one_after_the_other(tmp_path):
    # A server's child ends without shutting its interpreter down, which FSDP2 on gloo can abort.
    mp.start_processes(on_two_ranks, (tmp_path / "store",), nprocs=2, start_method="forkserver")
