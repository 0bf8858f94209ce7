"""What is written is read again, what is no value of a field is refused, and files are bounded."""

import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from iscorrect import InputError, Layout
from iscorrect.dumps import DumpWriter, LogProbDump, Tokens, read_dump, stream_dump, write_dump

SUFFIXES = [".parquet", ".jsonl", ".npz", ".safetensors", ".pt"]
ANY = st.floats(width=32)
LOG_PROB = st.one_of(st.floats(-9984, 0, width=32), st.sampled_from([np.nan, np.inf, -np.inf]))
INT64 = st.integers(-(2**63), 2**63 - 1)


ID = {"version": 2, "engine": 2, "policy_version": 1, "group": 1}
"""Fields that may be text, with their number of axes."""


@st.composite
def dumps(draw):
    """Dumps with any fields, also without counted tokens; values outside the mask are anything."""
    b, t, k = draw(st.integers(1, 4)), draw(st.integers(0, 4)), draw(st.integers(1, 3))
    mask = draw(arrays(bool, (b, t)))

    def floats(inside):
        values = draw(arrays(np.float32, (b, t), elements=inside))
        return torch.from_numpy(np.where(mask, values, draw(ANY)).astype(np.float32))

    fields = {name: floats(LOG_PROB) for name in ("rollout_log_probs", "old_log_probs")}
    for name in draw(st.sets(st.sampled_from(["advantages", "entropy", "varentropy"]))):
        fields[name] = floats(ANY)
    for name in draw(st.sets(st.sampled_from(["step", "policy_version", "group"]))):
        fields[name] = torch.from_numpy(draw(arrays(np.int64, b, elements=INT64)))
    for name in draw(st.sets(st.sampled_from(["version", "turn", "engine", "pack"]))):
        fields[name] = torch.from_numpy(draw(arrays(np.int64, (b, t), elements=INT64)))
    names = {}
    for name in draw(st.sets(st.sampled_from(sorted(ID)))):
        names[name] = tuple(draw(st.lists(st.text(max_size=4), min_size=1, unique=True)))
        number = st.integers(0, len(names[name]) - 1)
        fields[name] = torch.from_numpy(
            draw(arrays(np.int64, (b, t)[: ID[name]], elements=number))
        )
    if draw(st.booleans()):
        fields["token_ids"] = torch.from_numpy(draw(arrays(np.int64, (b, t), elements=INT64)))
    if draw(st.booleans()):
        top = draw(arrays(np.float32, (b, t, k), elements=ANY))
        fields["top_k_log_probs"] = torch.from_numpy(top)
        fields["top_k_ids"] = torch.from_numpy(draw(arrays(np.int64, (b, t, k))))
    return LogProbDump(mask=torch.from_numpy(mask), **fields, names=names)


def bits(dump):
    """Each sequence up to its last counted token, with floats as their bits; NaN is one value."""
    rows = []
    for i in range(len(dump)):
        counted = dump.mask[i].nonzero()
        length = int(counted[-1]) + 1 if len(counted) else 0
        row = {}
        for name, x in dump.given().items():
            part = x[i].tolist() if x.ndim == 1 else x[i, :length]
            if name in dump.names:
                texts = np.array(dump.names[name], object)
                part = texts[np.array(part.tolist() if x.ndim > 1 else part, int)]
                part = part.tolist() if x.ndim > 1 else part
            if x.ndim > 1 and x.is_floating_point():
                part = torch.where(part.isnan(), torch.nan, part).view(torch.int32)
            row[name] = part.tolist() if isinstance(part, torch.Tensor) else part
        rows.append(row)
    return rows


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(dump=dumps())
def test_every_dump_that_is_written_is_read_bit_for_bit(suffix, dump):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"dump{suffix}"
        write_dump(dump, path)
        assert bits(read_dump(path)) == bits(dump)


@given(dump=dumps())
def test_padded_arrays_of_others_are_read_bit_for_bit(dump):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "dump.npz"
        texts = {  # in numpy's own texts, which end before a NUL
            name: np.array([text.rstrip("\0") for text in names])[dump.given()[name].numpy()]
            for name, names in dump.names.items()
        }
        np.savez(path, **{name: x.numpy() for name, x in dump.given().items()} | texts)
        trimmed = {n: tuple(x.rstrip("\0") for x in names) for n, names in dump.names.items()}
        assert bits(read_dump(path)) == bits(replace(dump, names=trimmed))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_sequence_without_counted_tokens_keeps_its_place_beside_candidates(tmp_path, suffix):
    log_probs = -torch.ones(2, 3)
    dump = LogProbDump(
        rollout_log_probs=log_probs, old_log_probs=log_probs,
        mask=torch.tensor([[True] * 3, [False] * 3]), top_k_ids=torch.ones(2, 3, 4).long(),
        top_k_log_probs=-torch.ones(2, 3, 4),
    )
    write_dump(dump, tmp_path / f"dump{suffix}")
    assert read_dump(tmp_path / f"dump{suffix}").mask.sum(1).tolist() == [3, 0]


def test_infinite_values_are_valid_json(tmp_path):
    one = -torch.ones(1, 1)
    dump = LogProbDump(
        rollout_log_probs=one, old_log_probs=one, mask=one < 0, advantages=one * torch.inf,
        entropy=one * torch.nan,
    )
    write_dump(dump, tmp_path / "dump.jsonl")
    row = json.loads((tmp_path / "dump.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["advantages"] == [-float("inf")]
    assert row["entropy"] == [None]


@pytest.mark.parametrize("value", [-1e30, torch.finfo(torch.float32).min, 2])
def test_what_would_not_be_read_is_not_written(tmp_path, value):
    one = -torch.ones(1, 2)
    bad = torch.tensor([[-1.0, value]])
    dump = LogProbDump(rollout_log_probs=one, old_log_probs=bad, mask=one < 0)
    with pytest.raises(InputError, match=r"`old_log_probs`.*token 1 in sequence 0"):
        write_dump(dump, tmp_path / "dump.npz")
    assert not list(tmp_path.iterdir())


def test_numbers_beyond_float32_are_not_written_as_infinite(tmp_path):
    one = -torch.ones(1, 2)
    dump = LogProbDump(
        rollout_log_probs=one, old_log_probs=one, mask=torch.tensor([[True, False]]),
        advantages=torch.tensor([[1e300, 0.0]], dtype=torch.float64),
    )
    with pytest.raises(InputError, match="`advantages` must be within the range of float32"):
        write_dump(dump, tmp_path / "dump.npz")
    write_dump(replace(dump, advantages=dump.advantages.flip(1)), tmp_path / "dump.npz")


ROW = {
    "rollout_log_probs": [-1.0, -2.0], "old_log_probs": [-1.0, -2.0], "mask": [1, 1],
    "token_ids": [4, 5], "top_k_log_probs": [[-1.0], [-2.0]],
}


@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        ("mask", [None, 1], "nan at token 0"), ("mask", [1, 0.5], "0.5 at token 1"),
        ("mask", [float("nan"), 1], "nan at token 0"), ("mask", [1, 2], "2 at token 1"),
        ("mask", ["1", None], "text"), ("token_ids", [3, None], "nan at token 1"),
        ("token_ids", [2**63, 3], "9.22.* at token 0"), ("token_ids", [1.5, 2], "1.5"),
        ("token_ids", [2.0**60, 3], "token 0"), ("step", 1.7, "1.7"), ("step", [3], "1 numbers"),
        ("step", 10**30, "1e[+]30"), ("step", float("inf"), "inf"),
        ("step", "3", "the text '3'"), ("group", ["a", "b"], "2 numbers"),
        ("group", "\ud800", "ud800"), ("engine", ["a", None], "None"),
        ("version", ["a"], "1 in"), ("version", [["a"], ["b"]], "2×1"),
        ("policy_version", None, ""), ("advantages", [1e39, 1], "1e[+]39 at token 0"),
        ("old_log_probs", [-(10**400), -1], "too large"), ("old_log_probs", [-1e30, -1], "token 0"),
        ("old_log_probs", [True, False], "bool"), ("entropy", "high", "the text"),
        ("top_k_log_probs", [[-1.0]], "2 lists"), ("top_k_log_probs", [-1.0, -2.0], "2 lists"),
    ],
)
def test_a_value_that_is_not_what_its_field_says_is_refused_with_its_place(
    tmp_path, name, value, place
):
    path = tmp_path / "dump.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {name: value}))
    if value is None:  # null stands for a field that is not there
        assert read_dump(path).policy_version is None
        return
    with pytest.raises(InputError, match=f"`{name}`.*{place}.*dump.jsonl, row 1"):
        read_dump(path)


def test_columns_of_a_trainer_that_have_other_lengths_are_not_cut(tmp_path):
    path = tmp_path / "1.pt"
    columns = {"rollout_log_probs": [[-1.0], [-2.0]], "log_probs": [[-1.0], [-2.0]], "other": [1]}
    torch.save({"rollout_data": columns}, path)
    assert len(read_dump(path)) == 2
    torch.save({"rollout_data": columns | {"tokens": [[1]]}}, path)
    with pytest.raises(InputError, match="`tokens` must be 2 rows"):
        read_dump(path)


def test_counted_tokens_after_the_last_boundary_are_not_dropped(tmp_path):
    flat = -np.ones(4, np.float32)
    rest = {"rollout_log_probs": flat, "old_log_probs": flat, "cu_seqlens": np.array([0, 3])}
    np.savez(tmp_path / "padded.npz", mask=np.array([1, 1, 1, 0], bool), **rest)
    assert read_dump(tmp_path / "padded.npz").num_tokens == 3
    np.savez(tmp_path / "cut.npz", mask=np.ones(4, bool), **rest)
    with pytest.raises(InputError, match=r"`cu_seqlens`.*counted tokens after it"):
        read_dump(tmp_path / "cut.npz")


def good_arrays(**more):
    return {
        "rollout_log_probs": -np.ones((2, 3), np.float32),
        "old_log_probs": -np.ones((2, 3), np.float32), "mask": np.ones((2, 3), bool), **more,
    }


def test_what_no_field_needs_is_not_looked_at(tmp_path):
    np.savez(tmp_path / "a.npz", **good_arrays(about=np.array({"x": 1}, dtype=object)))
    tensors = {name: torch.from_numpy(x) for name, x in good_arrays().items()}
    torch.save({**tensors, "x": torch.ones(2).to_sparse(), 1: torch.ones(1)}, tmp_path / "b.pt")
    assert len(read_dump(tmp_path)) == 4


def test_eight_bit_floats_are_numbers_too(tmp_path):
    tensors = {name: torch.from_numpy(x) for name, x in good_arrays().items()}
    tensors["old_log_probs"] = tensors["old_log_probs"].to(torch.float8_e4m3fn)
    torch.save(tensors, tmp_path / "dump.pt")
    assert (read_dump(tmp_path / "dump.pt").old_log_probs == -1).all()


@pytest.mark.parametrize(
    ("arrays", "name"),
    [
        (good_arrays(mask=np.array(True)), "mask"),
        (good_arrays(cu_seqlens=np.array(0)), "mask"),
        ({n: x[0] for n, x in good_arrays().items()} | {"cu_seqlens": np.array(0)}, "cu_seqlens"),
        ({n: x[0] for n, x in good_arrays().items()} | {"cu_seqlens": np.array([0.0, 3.0])},
         "cu_seqlens"),
        (good_arrays(mask=np.array([["a"] * 3] * 2)), "mask"),
        (good_arrays(top_k_log_probs=np.ones((2, 3))), "top_k_log_probs"),
    ],
)
def test_arrays_of_other_shapes_and_kinds_are_refused_by_name(tmp_path, arrays, name):
    np.savez(tmp_path / "dump.npz", **arrays)
    with pytest.raises(InputError, match=f"`{name}`"):
        read_dump(tmp_path / "dump.npz")


@pytest.mark.parametrize("content", [{"samples": ["text"]}, {"samples": [3]}, {1: torch.ones(1)}])
def test_a_torch_file_of_other_things_is_told_what_is_missing(tmp_path, content):
    torch.save(content, tmp_path / "dump.pt")
    with pytest.raises(InputError, match=r"known dialect.*dump\.pt"):
        read_dump(tmp_path / "dump.pt")


def test_a_file_without_sequences_is_named_and_harms_no_other(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match=r"empty\.jsonl, which hold none"):
        read_dump(tmp_path / "empty.jsonl")
    (tmp_path / "full.jsonl").write_text(json.dumps(ROW))
    assert len(read_dump(tmp_path)) == 1


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "dump.jsonl")
    with pytest.raises(InputError, match="a pipe or a device"):
        read_dump(tmp_path / "dump.jsonl")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "dump.jsonl").write_text(json.dumps(ROW))

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(InputError, match="Permission denied") as error:
        read_dump(tmp_path / "dump.jsonl")
    assert "damaged" not in str(error.value)


# two processes, and the same step again


def write(directory, value):
    one = torch.full((4, 3), -float(value))
    DumpWriter(directory).write(step=1, mask=one < 0, rollout_log_probs=one, old_log_probs=one)


@pytest.mark.slow
def test_two_processes_without_a_process_group_lose_no_row(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write, args=(tmp_path, i)) for i in (1, 2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    assert sorted(read_dump(tmp_path).old_log_probs[:, 0].tolist()) == [-2.0] * 4 + [-1.0] * 4


@pytest.mark.parametrize("links", [True, False])
def test_a_step_that_is_written_again_keeps_both_files(tmp_path, monkeypatch, links):
    if not links:
        def no_links(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
    for value in (1, 2, 3):
        write(tmp_path, value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_000001_rank_0.npz", "step_000001_rank_0_1.npz", "step_000001_rank_0_2.npz",
    ]
    assert len(read_dump(tmp_path)) == 12


def write_for_ever(directory, suffix):
    one = -torch.ones(64, 512)
    writer = DumpWriter(directory, suffix=suffix)
    for step in range(10**6):
        writer.write(step=step, mask=one < 0, rollout_log_probs=one, old_log_probs=one)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_writer_that_is_killed_leaves_whole_files_only(tmp_path, suffix):
    process = multiprocessing.get_context("spawn").Process(
        target=write_for_ever, args=(tmp_path, suffix)
    )
    process.start()
    while not list(tmp_path.glob("step_*")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    files = list(tmp_path.glob(f"step_*{suffix}"))
    assert len(read_dump(tmp_path)) == 64 * len(files)


@pytest.mark.filterwarnings("ignore")  # a file that was interrupted before anyone held it
def test_an_interrupt_while_lines_are_written_is_never_swallowed(tmp_path):
    one = -torch.rand(64, 512)
    dump = LogProbDump(rollout_log_probs=one, old_log_probs=one, mask=one < 0)
    fired, caught = [], []

    def interrupt(*_):
        fired.append(True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(40):
            signal.setitimer(signal.ITIMER_REAL, 0.005 + 0.0005 * i)
            try:
                while len(fired) == i:
                    write_dump(dump, tmp_path / "dump.jsonl")
            except KeyboardInterrupt:
                caught.append(True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(caught) == len(fired) == 40


# unusual batches in a training step


def batch(**changed):
    one = -torch.ones(2, 3)
    return {"mask": one < 0, "rollout_log_probs": one, "old_log_probs": one} | changed


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_number_for_each_sequence_goes_to_its_tokens(tmp_path, suffix):
    writer = DumpWriter(tmp_path, suffix=suffix)
    for advantages in (torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [2.0]])):
        path = writer.write(step=1, **batch(advantages=advantages))
        assert read_dump(path).advantages.tolist() == [[1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("changed", "left"),
    [
        ({"entropy": torch.ones(2, 4)}, "entropy"), ({"token_ids": torch.ones(2, 3)}, "token_ids"),
        ({"group": torch.ones(3).long()}, "group"),
        ({"log_probs": -1e30 * torch.ones(2, 3)}, "log_probs"),
        ({"advantages": 1e300 * torch.ones(2, 3).double()}, "advantages"),
    ],
)
def test_a_field_that_does_not_fit_is_left_out_and_said_once(tmp_path, suffix, changed, left):
    writer = DumpWriter(tmp_path, suffix=suffix)
    with pytest.warns(UserWarning, match=f"left out {left}"):
        path = writer.write(step=1, **batch(**changed))
    assert left not in read_dump(path).given()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.write(step=2, **batch(**changed))
    assert len(read_dump(tmp_path)) == 4


def packed_batch():
    """A row of a prompt token, two sequences and padding, and a row of one sequence."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
    layout = Layout(
        mask, sequence_ids=torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1]]),
        segment_ids=torch.tensor([[0, 0, 1, 5, 5, 5], [0, 1, 2, 2, 2, 2]]),
        age=torch.tensor([[9, 0, 0, 1, 2, 9], [3, 3, 0, 9, 9, 9]]),
    )
    x = -torch.arange(12.0).view(2, 6) / 10
    return layout, x


def test_packed_rows_become_sequences_with_their_places_turns_and_versions(tmp_path):
    layout, x = packed_batch()
    path = DumpWriter(tmp_path).write(
        step=7, mask=layout, rollout_log_probs=x, old_log_probs=2 * x,
        advantages=torch.tensor([1.0, 2.0]), group=["a", "b", "c"], engine="host-1",
    )
    dump = read_dump(path)
    assert dump.mask.tolist() == [[False, True, True], [True, True, False], [True] * 3]
    torch.testing.assert_close(dump.rollout_log_probs[dump.mask], x[layout.mask])
    assert dump.pack[:, 0].tolist() == [0, 1, 0]
    assert dump.turn[dump.mask].tolist() == [0, 1, 0, 0, 0, 1, 2]
    assert dump.version[dump.mask].tolist() == [7, 7, 6, 5, 4, 4, 7]
    assert dump.advantages[:, 0].tolist() == [1, 1, 2]
    assert [dump.names["group"][i] for i in dump.group] == ["a", "b", "c"]
    assert dump.names["engine"] == ("host-1",)
    assert Tokens.of(dump).age.tolist() == [0, 0, 1, 2, 3, 3, 0]


@given(data=st.data())
def test_every_packed_batch_is_written_as_its_sequences(data):
    rows, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    mask = data.draw(arrays(bool, (rows, width)))
    ids, turns = (data.draw(arrays(np.int64, (rows, width), elements=st.integers(0, 2)))
                  for _ in range(2))
    age = data.draw(arrays(np.int64, (rows, width), elements=st.integers(-2, 9)))
    value = -np.arange(1, rows * width + 1, dtype=np.float32).reshape(rows, width)
    expected = []  # of each sequence: its place, and value, turn and version of its tokens
    for r in range(rows):
        place = 0
        for _, places in itertools.groupby(range(width), key=lambda t, r=r: ids[r, t]):
            run, sequence, turn = list(places), [], 0
            for before, t in itertools.pairwise([run[0], *run]):
                turn += bool(turns[r, before] != turns[r, t])
                if mask[r, t]:
                    sequence.append((value[r, t], turn, 20 - age[r, t]))
            if sequence:
                expected.append((place, sequence))
                place += 1
    layout = Layout(
        torch.from_numpy(mask), sequence_ids=torch.from_numpy(ids),
        segment_ids=torch.from_numpy(turns), age=torch.from_numpy(age),
    )
    x = torch.from_numpy(value)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where no token counts, there is no sequence to write
        path = DumpWriter(directory).write(
            step=20, mask=layout, rollout_log_probs=x, old_log_probs=x
        )
        found = []
        if path is not None:
            dump = read_dump(path)
            for i, counted in enumerate(dump.mask):
                columns = (dump.rollout_log_probs, dump.turn, dump.version)
                tokens = [c[i][counted].tolist() for c in columns]
                found.append((int(dump.pack[i, 0]), list(zip(*tokens, strict=True))))
    assert found == expected


def test_a_flat_packed_row_and_what_is_one_for_each_sequence(tmp_path):
    mask = torch.ones(5, dtype=torch.bool)
    layout = Layout.from_cu_seqlens(mask, torch.tensor([0, 2, 5]))
    x = -torch.ones(5)
    for group in (torch.tensor([3, 4]), torch.tensor([3, 3, 4, 4, 4])):
        path = DumpWriter(tmp_path).write(
            step=1, mask=layout, rollout_log_probs=x, old_log_probs=x, group=group,
        )
        assert read_dump(path).group.tolist() == [3, 4]
        assert read_dump(path).mask.sum(1).tolist() == [2, 3]


def test_a_layout_of_plain_rows_is_its_mask(tmp_path):
    plain = batch()
    write = DumpWriter(tmp_path).write
    paths = [write(step=1, **plain), write(step=1, **plain | {"mask": Layout(plain["mask"])})]
    assert bits(read_dump(paths[0])) == bits(read_dump(paths[1]))
    assert read_dump(paths[1]).pack is None


def test_a_step_is_a_whole_number_of_any_kind(tmp_path):
    write = DumpWriter(tmp_path).write
    names = {write(step=x, **batch()).name for x in (7, np.int64(8), torch.tensor(9))}
    assert names == {f"step_00000{x}_rank_0.npz" for x in (7, 8, 9)}
    for other in (None, 1.7, "7"):
        with pytest.raises(InputError, match="DumpWriter: `step` must be a whole number"):
            write(step=other, **batch())


def test_what_is_no_dump_is_not_written(tmp_path):
    dump = read_dump(DumpWriter(tmp_path).write(step=1, **batch()))
    for other in ("x.npz", None, {"mask": dump.mask}, [dump, dump.mask]):
        with pytest.raises(InputError, match="write_dump: `dump` must be a LogProbDump"):
            write_dump(other, tmp_path / "y.npz")
    assert not (tmp_path / "y.npz").exists()


@pytest.mark.parametrize("name", ["version", "engine", "policy_version", "group"])
def test_one_id_for_the_whole_batch_may_be_a_number_or_text(tmp_path, name):
    writer = DumpWriter(tmp_path, suffix=".jsonl")
    rows = []
    for value in (3, "a", ["x", "y"]):
        path = writer.write(step=1, **batch(**{name: value}))
        rows.append([json.loads(line)[name] for line in path.read_text().splitlines()])
    of_tokens = name in ("version", "engine")
    expected = [[3, 3], ["a", "a"], ["x", "y"]]
    assert rows == [[[v] * 3 if of_tokens else v for v in row] for row in expected]
    dump = read_dump(tmp_path)  # numbers beside text are read as text
    assert set(dump.names[name]) == {"3", "a", "x", "y"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pieces_of_numbers_and_of_texts_are_written_as_texts(tmp_path, suffix):
    one = -torch.ones(1, 2)
    base = LogProbDump(rollout_log_probs=one, old_log_probs=one, mask=one < 0)
    number, text = torch.tensor([5]), torch.tensor([0])
    pieces = [
        replace(base, group=number, engine=number),
        replace(base, group=text, engine=text, names={"group": ("p",), "engine": ("host",)}),
    ]
    write_dump(pieces, tmp_path / f"dump{suffix}")
    dump = read_dump(tmp_path / f"dump{suffix}")
    assert [dump.names["group"][i] for i in dump.group] == ["5", "p"]
    assert [dump.names["engine"][i] for i in dump.engine[:, 0]] == ["5", "host"]


def test_versions_of_tokens_may_be_named_as_those_of_the_sequence(tmp_path):
    rows = [ROW | {"step": 6, "policy_version": value} for value in ([2, 4], ["2", "default"])]
    (tmp_path / "dump.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokens = Tokens.of(read_dump(tmp_path / "dump.jsonl"))
    np.testing.assert_array_equal(tokens.age, [4, 2, 4, np.nan])
    assert [tokens.label("version", v) for v in tokens.version] == ["2", "4", "2", "default"]


@pytest.mark.parametrize("name", ["advantages", "version", "turn", "engine", "pack"])
def test_one_value_for_a_sequence_goes_to_its_tokens_in_every_form(tmp_path, name):
    (tmp_path / "dump.jsonl").write_text(json.dumps(ROW | {name: 3}))
    assert getattr(read_dump(tmp_path / "dump.jsonl"), name).tolist() == [[3, 3]]
    np.savez(tmp_path / "padded.npz", **good_arrays(**{name: np.array([3, 4])}))
    assert getattr(read_dump(tmp_path / "padded.npz"), name).tolist() == [[3] * 3, [4] * 3]
    flat = -np.ones(6, np.float32)
    np.savez(
        tmp_path / "flat.npz", rollout_log_probs=flat, old_log_probs=flat, mask=flat < 0,
        cu_seqlens=np.array([0, 2, 6]), **{name: np.array([3, 4])},
    )
    assert getattr(read_dump(tmp_path / "flat.npz"), name)[:, 0].tolist() == [3, 4]


def test_names_that_are_no_texts_of_the_numbers_are_refused(tmp_path):
    one = -torch.ones(1, 2)
    base = LogProbDump(rollout_log_probs=one, old_log_probs=one, mask=one < 0)
    with pytest.raises(InputError, match="`group` must be from 0 to 0"):
        replace(base, group=torch.tensor([1]), names={"group": ("p",)})
    with pytest.raises(InputError, match="`names`"):
        replace(base, names={"step": ("p",)})
    for texts in (b"[1, 2]", b"[", b'["a"]'):
        arrays = good_arrays(group=np.array([0, 1]), group_names=np.frombuffer(texts, np.uint8))
        np.savez(tmp_path / "dump.npz", **arrays)
        with pytest.raises(InputError, match="`group"):
            read_dump(tmp_path / "dump.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_that_no_file_can_hold_is_left_out_and_ends_no_training(tmp_path, suffix):
    with pytest.warns(UserWarning, match="left out engine"):
        path = DumpWriter(tmp_path, suffix=suffix).write(step=1, **batch(engine="host-\udcff"))
    assert read_dump(path).engine is None


def test_the_engines_candidates_are_compared_with_the_sampled_token():
    one = -torch.ones(1, 3)
    dump = LogProbDump(
        rollout_log_probs=one, old_log_probs=one, mask=one < 0, log_probs=2 * one,
        token_ids=torch.tensor([[4, 5, 6]]),
        top_k_ids=torch.tensor([[[4, 9], [9, 5], [8, 9]]]),
        top_k_log_probs=torch.tensor([[[-1.0, -2.0], [-0.5, -1.5], [-0.5, -0.6]]]),
    )
    tokens = Tokens.join([Tokens.of(dump)])
    assert tokens.best.tolist() == [-1.0, -0.5, -0.5]
    np.testing.assert_array_equal(tokens.candidate, [-1.0, -1.5, np.nan])
    assert tokens.current.tolist() == [-2.0] * 3


def test_a_value_that_stands_for_missing_ones_is_named_and_told_from_a_wrong_sign(tmp_path):
    row = {"rollout_log_probs": [-1.0] * 8, "old_log_probs": [-1.0] * 8, "mask": [1] * 8}
    path = tmp_path / "dump.jsonl"
    path.write_text(json.dumps(row | {"rollout_log_probs": [-1.0] * 6 + [1.0] * 2}))
    with pytest.raises(InputError, match=r"1.0 at token 6 .* 2 of its 8 tokens.*write null or NaN"):
        read_dump(path)
    path.write_text(json.dumps(row | {"rollout_log_probs": [1.0] * 8}))
    with pytest.raises(InputError, match="negate"):
        read_dump(path)


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_a_missing_package_is_said_before_training_begins(tmp_path, monkeypatch, suffix):
    for name in ("pyarrow.parquet", "safetensors"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pip install"):
        DumpWriter(tmp_path, suffix=suffix)


def test_sparse_and_wide_tensors_are_written_as_they_are(tmp_path):
    sparse = torch.eye(2, 3).to_sparse()
    path = DumpWriter(tmp_path).write(
        step=1, **batch(entropy=sparse, rollout_log_probs=-torch.ones(2, 3).bfloat16())
    )
    assert torch.equal(read_dump(path).entropy, torch.eye(2, 3))


@pytest.mark.parametrize(
    "changed",
    [
        {name: x[:0] for name, x in batch().items()},
        {"old_log_probs": -torch.ones(2, 4)}, {"mask": torch.full((2, 3), 0.5)},
        {"old_log_probs": torch.ones(2, 3).long()},
    ],
)
def test_a_batch_that_no_dump_can_hold_is_said_once_and_ends_no_training(tmp_path, changed):
    writer = DumpWriter(tmp_path)
    with pytest.warns(UserWarning, match="left out a batch"):
        assert writer.write(step=1, **batch(**changed)) is None
    assert writer.write(step=2, **batch(**changed)) is None
    assert writer.write(step=3, **batch(mask=torch.ones(2, 3))).exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_tokens_whose_log_prob_is_not_finite_are_written_as_they_are(tmp_path, value):
    bad = torch.tensor([[-1.0, value, -1.0]] * 2)
    path = DumpWriter(tmp_path).write(step=7, **batch(rollout_log_probs=bad))
    dump = read_dump(path)
    assert dump.mask.all()
    torch.testing.assert_close(dump.rollout_log_probs, bad, equal_nan=True)
    assert (len(Tokens.of(dump)), Tokens.of(dump).lost) == (4, 2)


@pytest.mark.parametrize("value", [-1e30, 0.5])
def test_tokens_whose_number_is_no_log_prob_are_written_as_masked_and_said(tmp_path, value):
    writer = DumpWriter(tmp_path)
    bad = torch.tensor([[-1.0, value, -1.0]] * 2)
    with pytest.warns(UserWarning, match="2 in step 7"):
        path = writer.write(step=7, **batch(rollout_log_probs=bad))
    assert read_dump(path).mask.tolist() == [[True, False, True]] * 2


def test_a_call_that_can_never_work_is_an_error(tmp_path):
    writer = DumpWriter(tmp_path)
    with pytest.raises(InputError, match="did you mean 'entropy'"):
        writer.write(step=1, **batch(entrpy=torch.ones(2, 3)))
    with pytest.raises(InputError, match="`old_log_probs` must be a tensor"):
        writer.write(step=1, **batch(old_log_probs=None))


# bounded cost


def header(shape, kind):
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * ((64 - (11 + len(text)) % 64) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def absurd_npz(path, shape, blocks=0):
    """An archive that claims a shape, with so many blocks of a million zeros behind it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, kind, size in (
            ("rollout_log_probs", "<f4", 4), ("old_log_probs", "<f4", 4), ("mask", "|b1", 1)
        ):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(header(shape, kind))
                for _ in range(blocks * size):
                    file.write(bytes(1_000_000))


def long_boundaries(path):
    np.savez_compressed(
        path, rollout_log_probs=np.zeros(0), old_log_probs=np.zeros(0), mask=np.zeros(0),
        cu_seqlens=np.zeros(10**7, np.int64),
    )


def repeated_parquet(path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    many = [np.full(2 * 10**7, -1.0, np.float32)]
    table = pyarrow.table({"rollout_log_probs": many, "old_log_probs": many, "mask": many})
    parquet.write_table(table, path)


def expanded_torch(path):
    one = -torch.ones(1, 1)
    huge = one.expand(10**6, 10**6)
    torch.save({"rollout_log_probs": huge, "old_log_probs": huge, "mask": huge}, path)


def peak(code, *arguments):
    """MiB that code takes beyond what importing took."""
    prelude = (
        "import resource, sys; import numpy, torch, iscorrect, iscorrect.dumps\n"
        "import pyarrow.parquet, safetensors.torch\n"
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = rss()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", f"{prelude}{code}\nprint(rss() - before)", *map(str, arguments)],
        capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)),
    )
    return float(ended.stdout.splitlines()[-1])


REFUSED = """
try:
    iscorrect.dumps.read_dump(sys.argv[1])
    sys.exit("it was read")
except iscorrect.InputError as error:
    assert "claims" in str(error), error
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("rows.npz", lambda path: absurd_npz(path, (10**12, 0))),
        ("columns.npz", lambda path: absurd_npz(path, (1, 10**12))),
        ("zeros.npz", lambda path: absurd_npz(path, (1, 10**8), blocks=100)),
        ("boundaries.npz", long_boundaries),
        ("expanded.pt", expanded_torch),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_a_small_file_with_absurd_sizes_is_refused_in_little_memory(tmp_path, name, make):
    path = tmp_path / name
    make(path)
    assert peak(REFUSED, path) < 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_a_small_parquet_file_costs_no_more_than_its_longest_sequence(tmp_path):
    repeated_parquet(tmp_path / "dump.parquet")  # one sequence: 3 columns of 80 MB
    assert peak(REFUSED, tmp_path / "dump.parquet") < 400


@pytest.mark.slow
def test_constant_values_that_compress_to_nothing_are_still_read(tmp_path):
    one = torch.full((1, 9_000_000), -1.0)
    dump = LogProbDump(rollout_log_probs=one, old_log_probs=one, mask=one < 0)
    for suffix in (".npz", ".parquet"):
        write_dump(dump, tmp_path / f"dump{suffix}")
        assert read_dump(tmp_path / f"dump{suffix}").num_tokens == 9_000_000


def ragged(path, rows, short, longest):
    lengths = np.full(rows, short)
    lengths[-1] = longest
    flat = -np.random.default_rng(0).random(lengths.sum()).astype(np.float32)
    np.savez(
        path, rollout_log_probs=flat, old_log_probs=flat - 0.01, mask=np.ones(len(flat), bool),
        cu_seqlens=np.r_[0, lengths.cumsum()],
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
@pytest.mark.parametrize("command", ["report --json", "compare --json", "convert"])
def test_a_ragged_dump_costs_its_tokens_and_not_rows_times_the_longest(tmp_path, command):
    ragged(tmp_path / "dump.npz", rows=1500, short=20, longest=100_000)
    name, *options = command.split()
    words = [name, str(tmp_path / "dump.npz"), *options]
    if name == "convert":
        words.append(str(tmp_path / "other.jsonl"))
    code = (
        "import io, contextlib\n"
        "try:\n    from iscorrect.cli.main import main\n"
        "except ImportError:\n    from iscorrect.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n    assert main(sys.argv[1:]) == 0"
    )
    assert peak(code, *words) < 400


@pytest.mark.slow
def test_rows_of_very_different_lengths_are_streamed_in_bounded_pieces(tmp_path):
    ragged(tmp_path / "dump.npz", rows=20_000, short=0, longest=50_000)
    pieces = list(stream_dump(tmp_path / "dump.npz"))
    assert sum(map(len, pieces)) == 20_000
    assert max(piece.mask.numel() for piece in pieces) <= 2**20
    assert max(map(len, pieces)) <= 2**14
