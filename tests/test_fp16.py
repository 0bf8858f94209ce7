"""The FP16 switch: what is counted, what is judged, what is read, and the loss scale."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import save_file
from torch import nn

import iscorrect.fp16.checkpoints
from iscorrect import FP16Audit, InputError, audit_fp16, fp16_scaler
from iscorrect.cli.main import main
from iscorrect.fp16.checkpoints import boxes, stored
from iscorrect.fp16.ranges import measure

EDGES = [
    65504.0, 65519.996, 65520.0, 65536.0, 3e38, 2**-14, 2**-14 - 2**-26, 2**-14 - 2**-24, 2**-24,
    2**-25 * (1 + 2**-23), 2**-25, 1e-45, 0.0, math.inf, math.nan, 1.0,
]
EDGES = torch.tensor([*EDGES, *(-x for x in EDGES)])


def harmful(audit):
    return [row.name for row, _ in audit.harms]


def reason(audit):
    ((_, because),) = audit.harms
    return because


# what is counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_counts_are_those_of_numpys_float16(dtype):
    x = EDGES.to(dtype)
    stored = x.double().numpy()
    with np.errstate(all="ignore"):
        half = stored.astype(np.float32).astype(np.float16)
    finite, nonzero = np.isfinite(stored), stored != 0
    found = measure("x", "weight", x)
    assert found.entries == len(stored)
    assert found.nonfinite == np.sum(~finite)
    assert found.nonzero == np.sum(finite & nonzero)
    assert found.overflow == np.sum(finite & np.isinf(half))
    assert found.zero == np.sum(nonzero & (half == 0))
    assert found.subnormal == np.sum((half != 0) & (np.abs(half) < np.finfo(np.float16).tiny))
    assert found.largest == np.abs(stored[finite]).max()


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (65519.996, None), (65520.0, "overflow"), (2**-14, None), (2**-14 - 2**-26, None),
        (2**-14 - 2**-24, "subnormal"), (2**-24, "subnormal"),
        (2**-25 * (1 + 2**-23), "subnormal"), (2**-25, "zero"), (1e-45, "zero"), (0.0, None),
        (math.inf, "nonfinite"), (math.nan, "nonfinite"),
    ],
)
def test_each_boundary_lies_where_rounding_puts_it(value, count):
    found = measure("x", "weight", torch.tensor([value]))
    assert [
        name for name in ("nonfinite", "overflow", "subnormal", "zero") if getattr(found, name)
    ] == ([count] if count else [])


@given(arrays(np.float32, 40, elements=st.floats(-6e4, 6e4, width=32)))
def test_errors_are_those_of_float64(x):
    found = measure("x", "weight", torch.from_numpy(x))
    wide = x.astype(np.float64)
    norm = np.sqrt(np.sum(wide**2))
    half = x.astype(np.float16).astype(np.float64)
    brain = torch.from_numpy(x).bfloat16().double().numpy()
    if norm:
        assert found.fp16_error == pytest.approx(np.sqrt(np.sum((half - wide) ** 2)) / norm)
        assert found.bf16_error == pytest.approx(np.sqrt(np.sum((brain - wide) ** 2)) / norm)
        assert found.zero_norm == pytest.approx(np.sqrt(np.sum(wide[half == 0] ** 2)) / norm)
    nonzero = wide != 0
    if nonzero.any():
        relative = (half - wide)[nonzero] / wide[nonzero]
        assert found.to_dict()["fp16_entry_error"] == pytest.approx(
            np.sqrt(np.mean(relative**2)), rel=1e-4
        )


def test_the_range_of_a_whole_is_the_sum_of_its_parts(monkeypatch):
    x = torch.randn(1000) * 1e-5
    whole = measure("x", "gradient", x)
    monkeypatch.setattr("iscorrect.fp16.ranges.MEASURED_AT_ONCE", 7)
    parts = measure("x", "gradient", x)
    assert parts.octaves == whole.octaves
    assert parts.subnormal == whole.subnormal > 0
    assert parts.fp16_error == pytest.approx(whole.fp16_error)


def test_weights_stored_in_bf16_are_exact_from_2_to_the_minus_17():
    steps = torch.arange(128, 256).double()  # every 8-bit significand
    exact = (steps * 2.0**-24).bfloat16()
    found = measure("x", "weight", exact)
    assert found.subnormal == 128
    assert found.fp16_error == found.bf16_error == 0
    assert measure("x", "weight", (steps * 2.0**-25).bfloat16()).fp16_error > 0


# what is judged


def test_healthy_weights_are_safe_as_far_as_they_can_tell():
    audit = audit_fp16({"w": torch.randn(100, 100) * 0.02})
    assert audit.verdict == "safe with loss scaling"
    assert "activations and gradients were not seen" in audit.ending


def test_a_few_subnormal_entries_harm_nothing():
    w = torch.randn(1000)
    w[:100] = 1e-6
    audit = audit_fp16({"w": w})
    assert audit.rows[0].subnormal >= 100
    assert not audit.harms


def test_one_overflow_among_many_is_harmful():
    w = torch.ones(1000)
    w[7] = 65519.0
    assert not audit_fp16({"w": w}).harms
    w[7] = 65520.0
    assert reason(audit_fp16({"w": w})) == "1 overflow, up to 6.55e+04"


def test_what_is_not_finite_is_harmful():
    assert reason(audit_fp16({"w": torch.tensor([1.0, math.nan, math.inf])})) == "2 not finite"


# in units of 2⁻²⁵: 4 entries of 1 are lost, and 4 (511² + 31² + 6² + 5²) + 4 = 2²⁰
LOST = [2.0**-25] * 4


@pytest.mark.parametrize(("last", "safe"), [(5, True), (4, False)])
def test_a_share_of_the_norm_of_2_to_the_minus_9_may_be_lost_and_no_more(last, safe):
    kept = [x * 2.0**-24 for x in (511, 31, 6, last)]
    audit = audit_fp16({"w": torch.tensor(LOST + kept)})
    assert (audit.rows[0].fp16_error <= 2**-9) == safe
    assert (audit.verdict != "not safe") == safe


@pytest.mark.parametrize(("lost", "safe"), [(4, True), (5, False)])
def test_half_of_the_entries_may_become_zero_and_no_more(lost, safe):
    w = torch.tensor([0.0] * 9 + [1e-9] * lost + [1.0] * 4)
    assert (audit_fp16({"w": w}).verdict != "not safe") == safe


def test_a_tensor_below_the_range_is_harmful_in_whatever_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        audit = audit_fp16({"lora_B": torch.full((8,), 1e-9, dtype=dtype), "w": torch.ones(8)})
        assert harmful(audit) == ["lora_B"]
        assert "100.0 % become 0" in reason(audit)
    assert audit_fp16({"x": torch.full((2,), 1e-200, dtype=torch.float64)}).verdict == "not safe"


def test_zeros_are_exact():
    assert not audit_fp16({"lora_B": torch.zeros(8)}).harms


# what is read


def plant(directory):
    """Two shards and an index; harmful: a.overflow, b.vanishing, b.zeros."""
    torch.manual_seed(0)
    many = torch.randn(300, 40)
    many[299, 39] = 7e4
    shards = {
        "model-1.safetensors": {
            "a.fine": torch.randn(50, 4).bfloat16(), "a.overflow": many,
            "a.edge": torch.tensor([65519.0]), "a.some_subnormal": torch.randn(5000) * 1e-3,
            "a.positions": torch.arange(9), "a.mask": torch.ones(3, dtype=torch.bool),
        },
        "model-2.safetensors": {
            "b.vanishing": torch.randn(64) * 1e-6, "b.packed": torch.ones(3, dtype=torch.int8),
            "b.zeros": torch.cat([torch.ones(9), torch.full((10,), 2**-25)]),
            "b.fp8": torch.ones(4).to(torch.float8_e4m3fn), "b.scalar": torch.tensor(1.0),
            "b.empty": torch.zeros(0, 3),
        },
    }
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return {name: x for tensors in shards.values() for name, x in tensors.items()}


def test_fp16_check_names_exactly_what_was_planted(tmp_path, capsys):
    plant(tmp_path)
    assert main(["fp16-check", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == (
        "Not safe because of these tensors: a.overflow, b.vanishing, b.zeros"
    )
    (table,) = (part for part in printed.split("\n\n") if part.startswith("Not safe in FP16"))
    assert [line.split()[0] for line in table.splitlines()[2:]] == [
        "a.overflow", "b.vanishing", "b.zeros"
    ]
    (skipped,) = (line for line in printed.splitlines() if line.startswith("Skipped"))
    assert all(f"1 of {dtype}" in skipped for dtype in ("I64", "BOOL", "I8", "F8_E4M3"))


def test_fp16_check_ends_with_0_where_all_fits(tmp_path, capsys):
    save_file({"w": torch.randn(8, 8)}, tmp_path / "model.safetensors")
    assert main(["fp16-check", str(tmp_path / "model.safetensors")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Safe with loss scaling, as far as")


def test_json_has_every_tensor_and_the_same_verdict(tmp_path, capsys):
    plant(tmp_path)
    assert main(["fp16-check", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "not safe"
    assert [harm["name"] for harm in found["harms"]] == ["a.overflow", "b.vanishing", "b.zeros"]
    assert len(found["tensors"]) == 8
    assert found["totals"]["weight"]["overflow"] == 1
    assert found["skipped"]["b.fp8"] == "F8_E4M3"


def test_a_state_dict_a_directory_and_a_torch_file_say_the_same(tmp_path):
    state = plant(tmp_path)
    torch.save(state, tmp_path / "model.pt")
    of_state = audit_fp16(state)
    by_name = {row.name: row for row in of_state.rows}
    for other in (audit_fp16(tmp_path), audit_fp16(str(tmp_path / "model.pt"))):
        assert {row.name: row for row in other.rows} == by_name
        assert sorted(other.skipped) == sorted(of_state.skipped)


def test_without_an_index_every_file_of_a_directory_counts(tmp_path):
    plant(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert len(audit_fp16(tmp_path).rows) == 8


def test_a_directory_of_torch_files_leaves_the_trainers_state_alone(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"lr": 1.0}, tmp_path / "training_args.bin")
    assert [row.name for row in audit_fp16(tmp_path).rows] == ["w"]


def test_no_read_holds_more_than_a_piece(tmp_path, monkeypatch):
    x = torch.randn(5, 3, 7)
    save_file({"w": x, "flat": x.flatten().clone()}, tmp_path / "model.safetensors")
    monkeypatch.setattr(iscorrect.fp16.checkpoints, "boxes", lambda shape, _=8: boxes(shape, 8))
    for tensor in stored("test", tmp_path):
        pieces = list(tensor.pieces)
        assert max(piece.numel() for piece in pieces) <= 8
        assert torch.equal(torch.cat([piece.flatten() for piece in pieces]), x.flatten())


@given(st.lists(st.integers(1, 6), max_size=4), st.integers(1, 20))
def test_boxes_cut_an_array_in_order_and_leave_nothing_out(shape, entries):
    x = torch.arange(math.prod(shape)).reshape(shape)
    parts = [x[box].flatten() for box in boxes(shape, entries)]
    assert max(map(len, parts)) <= entries
    assert torch.equal(torch.cat(parts), x.flatten())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_memory_stays_with_the_piece_not_the_checkpoint(tmp_path):
    entries = 3 * iscorrect.fp16.checkpoints.READ_AT_ONCE
    save_file({"w": torch.ones(entries)}, tmp_path / "model.safetensors")
    mapped = []
    for tensor in stored("test", tmp_path):
        for piece in tensor.pieces:
            piece.sum()
            maps = [line.split() for line in Path("/proc/self/smaps").read_text().splitlines()]
            start = next(i for i, line in enumerate(maps) if line[-1].endswith("model.safetensors"))
            (rss,) = (int(kb) for name, kb, *_ in maps[start : start + 6] if name == "Rss:")
            mapped.append(rss)
    assert len(mapped) == 3
    assert max(mapped) * 1024 < 1.1 * entries * 4 / 3


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert [row.name for row in audit_fp16(model).rows] == ["0.weight"]


def broken_index(path):
    plant(path)
    (path / "model.safetensors.index.json").write_text("{")


def missing_shard(path):
    plant(path)
    (path / "model-2.safetensors").unlink()


def stale_shard(path):
    plant(path)
    save_file({"b.fp8": torch.ones(1)}, path / "model-2.safetensors")


def truncated(path):
    plant(path)
    file = path / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def truncated_torch(path):
    torch.save({"w": torch.ones(3)}, path / "model.pt")
    (path / "model.pt").write_bytes((path / "model.pt").read_bytes()[:-50])


def quantised(path):
    save_file({"w": torch.ones(3, dtype=torch.int8)}, path / "model.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "a directory with .safetensors files"),
        (broken_index, "its weight_map cannot be read"),
        (missing_shard, "without model-2.safetensors. Fix: download the missing shard"),
        (stale_shard, "model-2.safetensors (b.empty is not in it, though the index says)"),
        (truncated, "model-1.safetensors ("),
        (truncated_torch, "model.pt ("),
        (lambda path: torch.save([1], path / "model.pt"), "a state dict, which maps names"),
        (quantised, "got I8. Fix: pass the checkpoint as it was before quantisation"),
    ],
)
def test_what_cannot_be_read_ends_with_code_2_and_why(tmp_path, capsys, make, message):
    make(tmp_path)
    assert main(["fp16-check", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fp16-check: `source` must be ")
    assert message in captured.err
    assert not captured.out


def sharded(directory, suffix, missing):
    """Two shards and an index of a name that one library writes; the second may be missing."""
    names = [f"{'model' if suffix == 'safetensors' else 'pytorch_model'}-0000{i}-of-00002.{suffix}"
             for i in (1, 2)]
    save = save_file if suffix == "safetensors" else torch.save
    for i, name in enumerate(names):
        if not (missing and i):
            save({f"w{i}": torch.ones(2)}, directory / name)
    return {f"w{i}": name for i, name in enumerate(names)}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("missing", [True, False])
def test_half_a_checkpoint_is_no_verdict(tmp_path, capsys, suffix, index, missing):
    weight_map = sharded(tmp_path, suffix, missing)
    if index:
        name = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
        (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert main(["fp16-check", str(tmp_path)]) == (2 if missing else 0)
    told = capsys.readouterr()
    assert ("download the missing shard" in told.err) == missing
    assert bool(told.out) != missing


def test_every_index_of_a_directory_is_read(tmp_path):
    for name, scale in (("model.fp16", 1.0), ("model", 1e6)):
        save_file({"w": torch.ones(2) * scale}, tmp_path / f"{name}.safetensors")
        (tmp_path / f"{name}.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"w": f"{name}.safetensors"}})
        )
    assert len(audit_fp16(tmp_path).rows) == 2
    assert len(harmful(audit_fp16(tmp_path))) == 1


@pytest.mark.parametrize("weight_map", [{}, {"w": 3}, [1], {"w": "../nowhere"}])
def test_an_index_of_other_things_is_refused(tmp_path, weight_map):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError):
        audit_fp16(tmp_path)


@pytest.mark.parametrize(
    "inner", [{"w": torch.ones(1)}, [torch.ones(1)], {"a": {"b": (torch.ones(1),)}}]
)
def test_a_dict_of_state_dicts_is_not_judged_by_what_lies_on_top(inner):
    with pytest.raises(InputError, match=r"model, .* with tensors of its own.*state\['model'\]"):
        audit_fp16({"epoch": torch.tensor(1.0), "model": inner})


def test_names_that_are_no_text_and_sparse_weights_are_taken(tmp_path):
    dense = torch.tensor([[0.0, 1e6], [1.0, 0.0]])
    audit = audit_fp16({3: torch.ones(2), "sparse": dense.to_sparse(), "csr": dense.to_sparse()})
    assert [row.name for row in audit.rows] == ["3", "sparse", "csr"]
    assert harmful(audit) == ["sparse", "csr"]


def test_a_path_that_is_not_there_and_one_of_another_kind(tmp_path, capsys):
    assert main(["fp16-check", str(tmp_path / "nowhere")]) == 2
    assert "nowhere. Fix: download the checkpoint first" in capsys.readouterr().err
    (tmp_path / "model.gguf").touch()
    assert main(["fp16-check", str(tmp_path / "model.gguf")]) == 2
    assert "a .safetensors, .bin or .pt file" in capsys.readouterr().err


def test_without_safetensors_the_message_names_the_extra(tmp_path, capsys, monkeypatch):
    plant(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["fp16-check", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "pip install safetensors, which the extra 'safetensors' brings too" in message


# activations and gradients


class Net(nn.Module):
    """Multiplies by ``scales`` in turn, through one linear layer each."""

    def __init__(self, *scales):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in scales)
        for layer, scale in zip(self.layers, scales, strict=True):
            nn.init.eye_(layer.weight)
            layer.weight.data.mul_(scale)

    def forward(self, x, power=1):
        for layer in self.layers:
            x = layer(x)
        return {"parts": [x**power]}


class Free(nn.Module):
    """Gives its only parameter, so that a loss may give it any gradient."""

    def __init__(self, entries):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(entries))

    def forward(self):
        return self.weight


def audit_gradient(gradient, **arguments):
    model = Free(gradient.numel())
    return audit_fp16(model, inputs=[], loss=lambda w: (w * gradient).sum(), **arguments)


def test_the_first_module_that_overflows_is_named():
    audit = audit_fp16(Net(10.0, 1e4, 2.0), inputs=torch.ones(2, 4))
    assert harmful(audit) == ["layers.1", "layers.2 (input)", "layers.2", "Net"]
    assert "The first to overflow is layers.1." in str(audit)
    assert "Largest activation: 2.00e+05 at layers.2" in str(audit)
    assert audit.verdict == "not safe"


@dataclass
class Output:
    parts: list
    loss: torch.Tensor | None = None


class Wrapped(nn.Module):
    """Takes its tensor by name, and gives it inside a plain dataclass."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return Output([self.inner(input=x) * 1e3])


def test_tensors_by_name_and_inside_dataclasses_are_seen():
    model = nn.Sequential(Wrapped())
    model.append(nn.Linear(1, 1))  # a state dict needs a weight
    model[1].forward = lambda x: x
    audit = audit_fp16(model, inputs=[torch.full((1, 4), 100.0)])
    assert {row.name for row in audit.of("activation")} >= {"0.inner (input)", "0.inner", "0"}
    assert "0" in harmful(audit)


def test_what_functions_make_between_modules_shows_where_a_module_takes_it():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Identity(), nn.Linear(4, 4)

        def forward(self, x):
            return self.down(self.up(x) * 1e3) * 0

    assert harmful(audit_fp16(Gated(), inputs=[torch.full((1, 4), 100.0)]))[0] == "down (input)"


@pytest.mark.parametrize(
    "inputs", [torch.ones(1, 4), [torch.ones(1, 4), 3], {"x": torch.ones(1, 4), "power": 3}]
)
def test_inputs_are_passed_as_the_model_takes_them(inputs):
    audit = audit_fp16(Net(8.0), inputs=inputs)
    assert audit.total("activation").largest == (8.0 if isinstance(inputs, torch.Tensor) else 512.0)
    assert "gradients were not seen" in audit.ending


def test_the_activations_that_vanish_are_counted():
    audit = audit_fp16(Net(1e-5, 1e-5), inputs=torch.ones(1, 4))
    rows = {row.name: row for row in audit.of("activation")}
    assert rows["layers.0"].subnormal == 4
    assert rows["layers.1"].zero == 4
    assert "layers.1" in harmful(audit)


def test_a_model_is_left_as_it_was_even_where_it_fails():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    model[2].weight.requires_grad_(False)

    def state():
        return [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ], [(p.requires_grad, p.grad) for p in model.parameters()]

    before = state()
    audit_fp16(model, inputs=torch.ones(1, 4), loss=torch.sum)
    assert state() == before
    with pytest.raises(RuntimeError):
        audit_fp16(model, inputs=torch.ones(1, 3))
    assert state() == before

    def stops(_):
        raise KeyError("in the loss")

    with pytest.raises(KeyError):
        audit_fp16(model, inputs=torch.ones(1, 4), loss=stops)
    assert state() == before
    assert torch.is_grad_enabled()


def test_dropout_is_off_and_gradients_are_those_of_the_loss():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 1, bias=False))
    audit = audit_fp16(model, inputs=torch.tensor([[1.0, 2.0, 4.0]]), loss=torch.sum)
    (row,) = audit.of("gradient")
    assert (row.name, row.largest, row.octaves) == ("1.weight", 4.0, {0: 1, 1: 1, 2: 1})


def test_gradients_that_fit_need_no_scale():
    audit = audit_gradient(torch.tensor([1.0, 65504.0, 2**-24]))
    assert audit.scales == (1.0, 1.0)
    assert (audit.scale, audit.verdict) == (1.0, "safe")
    assert str(audit).splitlines()[-1].startswith("Safe: these gradients need no loss scale")


@pytest.mark.parametrize(
    ("smallest", "scale"),
    [(2.0**-24, 2.0**0), (2.0**-25 * (1 + 2**-23), 2.0**0), (2.0**-25, 2.0**1), (2.0**-30, 2.0**6)],
)
def test_the_scale_is_the_first_that_saves_the_smallest_gradient(smallest, scale):
    found = audit_gradient(torch.tensor([smallest, 1.0, -1.0]), underflow=0.0).scales
    assert found.smallest <= 1 if scale == 1 else found.smallest == scale
    x = torch.tensor(smallest)
    assert (x * found.smallest).half() != 0
    assert (x * found.smallest / 2).half() == 0


@pytest.mark.parametrize("largest", [1.0, 0.9995, 65519.996 / 2**10, 65520 / 2**10, 1e5, 3e-7])
def test_the_largest_scale_is_the_last_that_overflows_nothing(largest):
    found = audit_gradient(torch.tensor([largest, largest / 2])).scales.largest
    x = torch.tensor(largest)
    assert (x * found).half().isfinite()
    assert (x * found * 2).half().isinf()


@given(arrays(np.float32, 50, elements=st.floats(-(2**-9), 2**-9, width=32)), st.floats(0, 0.9))
def test_the_scale_leaves_the_stated_share_by_enumeration(gradient, underflow):
    x = torch.from_numpy(gradient)
    if x.any():
        found = audit_gradient(x, underflow=underflow).scales

        def share(scale):
            return ((x.double() * scale).half() == 0)[x != 0].double().mean()

        assert share(found.smallest) <= underflow < share(found.smallest / 2)


def test_small_gradients_want_a_scale_and_the_scaler_says_so():
    gradient = torch.cat([torch.full((10,), 2.0**-30), torch.full((90,), 2.0**-3)])
    audit = audit_gradient(gradient)
    assert (audit.scale, audit.verdict) == (2.0**6, "safe with loss scaling")
    assert audit.ending == "safe with loss scaling: fp16_scaler(device, scale=2**16)"
    assert "Without loss scaling 10.0 % of the gradients' nonzero entries become 0" in str(audit)
    assert audit_gradient(gradient, underflow=0.1).verdict == "safe"


def test_large_gradients_want_a_scale_below_one():
    audit = audit_gradient(torch.tensor([2.0**20, 1.0]))
    assert audit.scale == audit.scales.largest == 2.0**-5
    assert audit.verdict == "safe with loss scaling"


def test_where_no_scale_will_do_the_tensors_that_overflow_are_named():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            for name, entries in (("small", 9), ("edge", 1), ("large", 1)):
                setattr(self, name, nn.Parameter(torch.ones(entries)))

        def forward(self, large, edge):
            return (self.small * 2**-40).sum() + self.large @ large + self.edge @ edge

    edge = 65519 / 2**16  # does not overflow at 2¹⁶, and 65520 / 2¹⁶ does
    inputs = [torch.tensor([1e3]), torch.tensor([edge])]
    audit = audit_fp16(Wide(), inputs=inputs, loss=lambda x: x, underflow=0.2)
    assert audit.scales == (2.0**16, 2.0**6)
    assert audit.scale is None
    assert harmful(audit) == ["large"]
    assert reason(audit) == "overflows at the scale 2^16 that the small need"
    assert "So no loss scale will do." in str(audit)


def test_octaves_count_the_finite_entries_that_are_not_zero():
    found = measure("x", "gradient", EDGES)
    assert sum(found.octaves.values()) == found.nonzero
    x = EDGES[EDGES.isfinite() & (EDGES != 0)].double().abs()
    assert found.octaves == dict(zip(*(v.tolist() for v in x.log2().ceil().unique(
        return_counts=True)), strict=True))
    assert not measure("x", "gradient", torch.zeros(3)).octaves


def test_an_activations_gradient_limits_the_scale():
    model = Net(2.0**-10, 1.0)
    audit = audit_fp16(
        model, inputs=torch.ones(1, 4), loss=lambda out: 2.0**12 * out["parts"][0].sum()
    )
    largest = {row.name: row.largest for row in audit.of("activation gradient")}
    assert largest == {"Net": 2.0**12, "layers.1": 2.0**12, "layers.0": 2.0**12}
    assert audit.scales.largest == 2.0**3


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ({"w": torch.ones(1)}, dict(inputs=torch.ones(1)), "`source` must be a model where"),
        (Net(1.0), dict(loss=torch.sum), "`inputs` must be given where `loss` is"),
        (Net(1.0), dict(inputs=5), "`inputs` must be a dict, a sequence or a tensor"),
        (Net(1.0), dict(underflow=1.0), "`underflow` must be a share in [0, 1), got 1.0"),
        (3, {}, "`source` must be a module, a state dict, or a path, got int"),
        ({}, {}, "got no tensor"),
        (nn.Linear(2, 2, device="meta"), {}, "got weight on the meta device"),
        (Net(1.0), dict(inputs=torch.ones(1, 4), loss=lambda out: out["parts"][0]), "a scalar"),
        (Net(1.0), dict(inputs=torch.zeros(1, 4), loss=lambda out: out["parts"][0].sum()),
         "got a gradient of zeros"),
    ],
)
def test_arguments_that_do_not_go_together(source, arguments, message):
    with pytest.raises(InputError) as error:
        audit_fp16(source, **arguments)
    assert message in str(error.value)


def test_long_lists_are_cut_and_say_so():
    audit = audit_fp16({f"w{i}": torch.tensor([1e5 + i]) for i in range(30)})
    assert "… and 18 more; --json or .harms has all." in str(audit)
    assert str(audit).endswith("w11 and 18 more")


def test_a_real_step_in_fp16_overflows_where_the_audit_says():
    model = Net(10.0, 1e4)
    audit = audit_fp16(model, inputs=torch.ones(1, 4))
    half = Net(10.0, 1e4).half()
    assert half(torch.ones(1, 4).half())["parts"][0].isinf().any()
    assert isinstance(audit, FP16Audit)
    assert audit.verdict == "not safe"


# the scaler


def test_a_step_with_infinite_gradients_is_skipped_and_the_scale_halves():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, eps=1e-15)
    scaler = fp16_scaler("cpu", scale=2.0**10, growth_interval=2)
    for factor, scale in ((math.inf, 2**9), (1.0, 2**9), (1.0, 2**10), (math.nan, 2**9)):
        before = weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale((factor * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, before) == (not math.isfinite(factor))
        assert scaler.get_scale() == scale


def test_the_growth_interval_is_that_of_the_fp16_paper():
    assert fp16_scaler("cpu").get_growth_interval() == 400
    assert fp16_scaler("cpu").get_scale() == 2**16
    for scale in (0.0, -1.0):
        with pytest.raises(InputError, match="fp16_scaler: `scale` must be"):
            fp16_scaler("cpu", scale=scale)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_scaler_that_torch_would_switch_off_is_an_error():
    with pytest.raises(InputError, match="cuda without CUDA"):
        fp16_scaler()


def skip_together(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    one_overflows(rank)
    dist.destroy_process_group()


def one_overflows(rank):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    sharded = fully_shard(nn.Linear(4, 4), mesh=mesh)
    plain = nn.Linear(4, 4)
    for model, group in ((sharded, None), (plain, dist.group.WORLD)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = fp16_scaler("cpu", process_group=group)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        if rank == 1:
            grad = model.weight.grad
            (grad if group else grad.to_local())[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2**15
        for p, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, old) if group else torch.equal(p.to_local(), old.to_local())


@pytest.mark.slow
def test_all_ranks_skip_the_step_that_one_must_skip(tmp_path):
    # A server's child ends without shutting its interpreter down, which FSDP2 on gloo can abort.
    mp.start_processes(
        skip_together, (tmp_path / "store",), nprocs=2, start_method="forkserver"
    )
