import io
import json
import pickle

import numpy as np
import pytest
import torch

from iscorrect import InputError
from iscorrect.dumps import (
    DumpWriter,
    LogProbDump,
    Tokens,
    concatenate,
    read_dump,
    stream_dump,
    write_dump,
)
from iscorrect.dumps.dump import PER_SEQUENCE

SUFFIXES = [".parquet", ".jsonl", ".npz", ".safetensors", ".pt"]


def ragged_dump(lengths=(5, 1, 3), seed=0, **without):
    torch.manual_seed(seed)
    b, t, k = len(lengths), max(lengths), 4
    mask = torch.arange(t) < torch.tensor(lengths)[:, None]
    everything = {
        "rollout_log_probs": -torch.rand(b, t) * 5,
        "old_log_probs": -torch.rand(b, t) * 5,
        "log_probs": -torch.rand(b, t) * 5,
        "mask": mask,
        "token_ids": torch.randint(0, 99, (b, t)),
        "advantages": torch.randn(b, t),
        "entropy": torch.rand(b, t),
        "varentropy": torch.rand(b, t),
        "version": torch.randint(0, 2, (b, t)),
        "turn": torch.randint(0, 3, (b, t)),
        "engine": torch.randint(0, 2, (b, t)),
        "pack": torch.randint(0, 5, (b, t)),
        "step": torch.arange(b),
        "policy_version": torch.arange(b) + 7,
        "group": torch.arange(b) // 2,
        "top_k_ids": torch.randint(0, 99, (b, t, k)),
        "top_k_log_probs": -torch.rand(b, t, k),
    }
    names = {"version": ("default", "7"), "engine": ("host-1", "høst 2")}
    return LogProbDump(
        **{n: x for n, x in everything.items() if n not in without},
        names={n: x for n, x in names.items() if n not in without},
    )


def assert_same(a, b):
    assert a.given().keys() == b.given().keys()
    assert torch.equal(a.mask, b.mask)
    for name, x in a.given().items():
        y = getattr(b, name)
        if name in PER_SEQUENCE:
            assert torch.equal(x, y), name
        elif name in a.names:
            texts = np.array(a.names[name])[x.numpy()], np.array(b.names[name])[y.numpy()]
            assert (texts[0] == texts[1])[a.mask.numpy()].all(), name
        else:
            assert x.dtype == y.dtype, name
            assert torch.equal(x[a.mask], y[a.mask]), name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_returns_what_was_written_to_the_last_bit(tmp_path, suffix):
    dump = ragged_dump()
    write_dump(dump, tmp_path / f"dump{suffix}")
    assert_same(read_dump(tmp_path / f"dump{suffix}"), dump)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_masked_prompt_and_gaps_keep_their_place(tmp_path, suffix):
    mask = torch.tensor([[False, True, False, True], [False, True, False, False]])
    dump = LogProbDump(
        rollout_log_probs=-torch.rand(2, 4), old_log_probs=-torch.rand(2, 4), mask=mask
    )
    write_dump(dump, tmp_path / f"dump{suffix}")
    assert_same(read_dump(tmp_path / f"dump{suffix}"), dump)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_lies_outside_the_mask_may_be_anything(tmp_path, suffix):
    mask = torch.tensor([[False, True]])
    rollout = torch.tensor([[torch.nan, -1.0]])
    old = torch.tensor([[torch.inf, -1.0]])
    dump = LogProbDump(rollout_log_probs=rollout, old_log_probs=old, mask=mask)
    write_dump(dump, tmp_path / f"dump{suffix}")
    assert_same(read_dump(tmp_path / f"dump{suffix}"), dump)


def test_padded_arrays_are_read_as_numpy_saves_them(tmp_path):
    dump = ragged_dump()
    for save in (np.savez, np.savez_compressed):
        texts = {n: np.array(names)[dump.given()[n].numpy()] for n, names in dump.names.items()}
        save(tmp_path / "dump.npz", **{n: x.numpy() for n, x in dump.given().items()} | texts)
        assert_same(read_dump(tmp_path / "dump.npz"), dump)


def test_half_precision_arrays_become_float32(tmp_path):
    from safetensors.torch import save_file

    dump = ragged_dump()
    for dtype in (torch.bfloat16, torch.float16):
        half = dump.rollout_log_probs.to(dtype)
        save_file(
            {"rollout_log_probs": half, "old_log_probs": half.clone(), "mask": dump.mask},
            tmp_path / "dump.safetensors",
        )
        read = read_dump(tmp_path / "dump.safetensors")
        assert read.rollout_log_probs.dtype == torch.float32
        assert torch.equal(read.rollout_log_probs[dump.mask], half.float()[dump.mask])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_streaming_yields_whole_sequences_in_order_and_in_bounded_pieces(tmp_path, suffix):
    dump = ragged_dump(lengths=[3, 9, 2, 2, 7, 1, 9, 4])
    write_dump(dump, tmp_path / f"dump{suffix}")
    pieces = list(stream_dump(tmp_path / f"dump{suffix}", tokens=20))
    assert len(pieces) > 2
    assert all(piece.mask.numel() <= 20 for piece in pieces)
    assert_same(concatenate(pieces), dump)


def test_a_sequence_longer_than_a_piece_is_its_own_piece(tmp_path):
    dump = ragged_dump(lengths=[50, 2])
    write_dump(dump, tmp_path / "dump.npz")
    assert [len(piece) for piece in stream_dump(tmp_path / "dump.npz", tokens=10)] == [1, 1]


def test_a_directory_is_read_in_the_order_of_its_steps(tmp_path):
    writer = DumpWriter(tmp_path)
    for step in (10, 9, 2):
        dump = ragged_dump(seed=step)
        writer.write(step=step, **{n: x for n, x in dump.given().items() if n != "step"})
    assert read_dump(tmp_path).step.tolist() == [2] * 3 + [9] * 3 + [10] * 3


def test_fields_that_only_some_files_have_are_left_out(tmp_path):
    write_dump(ragged_dump(), tmp_path / "a.npz")
    write_dump(ragged_dump(entropy=False), tmp_path / "b.npz")
    dump = read_dump(tmp_path)
    assert len(dump) == 6
    assert dump.entropy is None
    assert dump.varentropy is not None


def test_standard_input_is_read_as_json_lines(monkeypatch):
    row = {"rollout_log_probs": [-1.0], "old_log_probs": [-1.5], "mask": [1]}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(row) + "\n"))
    assert read_dump("-").old_log_probs.tolist() == [[-1.5]]


def test_an_advantage_of_a_sequence_goes_to_its_tokens(tmp_path):
    row = {
        "rollout_log_probs": [-1.0, -2.0], "old_log_probs": [-1.5, -2.0], "mask": [1, 1],
        "advantages": 0.5,
    }
    (tmp_path / "dump.jsonl").write_text(json.dumps(row))
    assert read_dump(tmp_path / "dump.jsonl").advantages.tolist() == [[0.5, 0.5]]


class TestDialects:
    def test_prime_rl_token_export(self, tmp_path):
        directory = tmp_path / "token_exports" / "step_12"
        directory.mkdir(parents=True)
        (directory / "STABLE").touch()
        row = {
            "schema_version": 1, "inference_logprobs": [None, -1.0, -2.0],
            "trainer_logprobs": [None, -1.1, -2.1], "loss_mask": [False, True, True],
            "advantages": [0.0, 1.0, 1.0], "entropy": [0.1, 0.2, 0.3], "token_ids": [4, 5, 6],
            "micro_step": 0, "micro_sequence_idx": 2,
        }
        (directory / "rank_0.jsonl").write_text(json.dumps(row) + "\n")
        dump = read_dump(tmp_path / "token_exports")
        assert dump.mask.tolist() == [[False, True, True]]
        assert dump.rollout_log_probs[0, 1:].tolist() == [-1.0, -2.0]
        torch.testing.assert_close(dump.old_log_probs[0, 1:], torch.tensor([-1.1, -2.1]))
        assert dump.token_ids.tolist() == [[4, 5, 6]]
        assert dump.pack.tolist() == [[2, 2, 2]]
        assert dump.step.tolist() == [12]

    def test_nemo_rl_train_data(self, tmp_path):
        row = {
            "generation_logprobs": [[0.0, -1.0, -2.0]], "prev_logprobs": [[0.0, -1.1, -2.1]],
            "token_loss_mask": [[0, 0, 1]], "sample_loss_mask": [1], "token_ids": [[4, 5, 6]],
            "advantages": [[0.0, 1.0, 2.0]], "input_lengths": [3],
        }
        dropped = row | {"sample_loss_mask": [0]}
        (tmp_path / "train_data_step7.jsonl").write_text(
            json.dumps(row) + "\n" + json.dumps(dropped) + "\n"
        )
        dump = read_dump(tmp_path)
        assert dump.mask.tolist() == [[False, True], [False, False]]
        assert dump.rollout_log_probs[0].tolist() == [-1.0, -2.0]
        assert dump.token_ids[0].tolist() == [5, 6]
        assert dump.step.tolist() == [7, 7]

    def test_slime_samples(self, tmp_path):
        sample = {
            "tokens": [1, 2, 3, 4], "response_length": 2, "rollout_log_probs": [-1.0, -2.0],
            "log_probs": torch.tensor([-1.1, -2.1]), "loss_mask": [1, 0], "group_index": 3,
        }
        torch.save({"format_version": 2, "samples": [sample]}, tmp_path / "41.pt")
        dump = read_dump(tmp_path / "41.pt")
        assert dump.mask.tolist() == [[True, False]]
        assert dump.token_ids.tolist() == [[3, 4]]
        torch.testing.assert_close(dump.old_log_probs, torch.tensor([[-1.1, -2.1]]))
        assert dump.step.tolist() == [41]
        assert dump.group.tolist() == [3]

    def test_slime_columns(self, tmp_path):
        columns = {
            "rollout_log_probs": [torch.tensor([-1.0]), torch.tensor([-2.0, -3.0])],
            "log_probs": [torch.tensor([-1.5]), torch.tensor([-2.5, -3.5])],
            "tokens": [torch.tensor([7, 8]), torch.tensor([7, 8, 9])],
        }
        folder = tmp_path / "from_step_200"  # a checkpoint's step, not the dump's
        folder.mkdir()
        torch.save({"rollout_id": 4, "rollout_data": columns}, folder / "4_0.pt")
        dump = read_dump(folder / "4_0.pt")
        assert dump.step.tolist() == [4, 4]
        assert dump.mask.tolist() == [[True, False], [True, True]]
        assert dump.token_ids[0, 0] == 8
        assert dump.token_ids[1].tolist() == [8, 9]

    def details(self, path, rows=3):
        """What slime writes for one step: rollouts, and the trainer's samples in the same order."""
        rollouts = [
            {
                "index": 7 + i, "group_index": i // 2, "tokens": [1, 2, 3 + i],
                "response_length": 2, "rollout_log_probs": [-1.0 - i, -2.0],
                "weight_versions": ["4"] * (1 + i % 2), "status": "completed",
            }
            for i in range(rows)
        ]
        samples = [
            {
                "rollout_position": i, "sample_index": 7 + i, "data_parallel_rank": 0,
                "tokens": torch.tensor(x["tokens"]), "response_lengths": 2, "total_lengths": 3,
                "loss_masks": torch.ones(2, dtype=torch.int),
                "rollout_log_probs": torch.tensor(x["rollout_log_probs"]),
                "log_probs": torch.tensor(x["rollout_log_probs"]) - 0.5,
            }
            for i, x in enumerate(rollouts)
        ]
        for folder in ("rollout_data", "train_data"):
            (path / folder).mkdir(parents=True)
        torch.save({"rollout_id": 5, "samples": rollouts}, path / "rollout_data" / "5.pt")
        torch.save({"rollout_id": 5, "samples": rollouts}, path / "rollout_data" / "eval_5.pt")
        content = {"format_version": 2, "rollout_id": 5, "rank": 0, "samples": samples}
        torch.save(content, path / "train_data" / "5.pt")
        return rollouts, samples

    def test_the_directory_of_dump_details_is_the_trainers_samples_with_their_rollouts(
        self, tmp_path
    ):
        rollouts, _ = self.details(tmp_path)
        rollouts[2]["weight_versions"] = ["3", "4"]
        torch.save({"rollout_id": 5, "samples": rollouts}, tmp_path / "rollout_data" / "5.pt")
        dump = read_dump(tmp_path)
        assert dump.step.tolist() == [5] * 3
        assert dump.group.tolist() == [0, 0, 1]
        assert [dump.names["policy_version"][i] for i in dump.policy_version] == ["4", "4", "3, 4"]
        assert dump.token_ids[:, -1].tolist() == [3, 4, 5]
        assert (dump.old_log_probs - dump.rollout_log_probs).unique().tolist() == [-0.5]
        (tmp_path / "rollout_data" / "5.pt").write_bytes(b"objects of somebody")
        assert read_dump(tmp_path).group is None

    def test_rollouts_without_the_trainers_log_probs_are_refused_with_the_place_to_look(
        self, tmp_path
    ):
        self.details(tmp_path)
        with pytest.raises(InputError, match=r"without the trainer's log-probs.*train_data"):
            read_dump(tmp_path / "rollout_data")

    def test_a_request_that_failed_is_counted_and_a_short_one_is_refused(self, tmp_path):
        _, samples = self.details(tmp_path)
        path = tmp_path / "train_data" / "5.pt"
        torch.save({"samples": [samples[0], samples[1] | {"rollout_log_probs": None}]}, path)
        tokens = Tokens.of(read_dump(path))
        assert (len(tokens), tokens.lost) == (2, 2)
        torch.save({"samples": [samples[0] | {"rollout_log_probs": torch.ones(1)}]}, path)
        with pytest.raises(InputError, match=r"`rollout_log_probs` must be 2 numbers.*got 1 in"):
            read_dump(path)

    def test_files_of_ranks_hold_each_sample_once(self, tmp_path):
        _, samples = self.details(tmp_path)
        (tmp_path / "train_data" / "5.pt").unlink()
        columns = {name: [x[name] for x in samples] for name in samples[0]}
        columns["sample_indices"] = columns.pop("sample_index")
        early = {name: x for name, x in columns.items() if name != "log_probs"}
        other = columns | {"sample_indices": [20, 21, 22]}
        for rank, data in enumerate((early, early, columns, columns, other, other)):
            content = {"rollout_id": 5, "rank": rank, "rollout_data": data, "cp_size": 1}
            torch.save(content, tmp_path / "train_data" / f"5_{rank}.pt")
        assert len(read_dump(tmp_path)) == 6
        assert read_dump(tmp_path / "train_data" / "5_2.pt").group.tolist() == [0, 0, 1]
        with pytest.raises(InputError, match="`log_probs` must be there"):
            read_dump(tmp_path / "train_data" / "5_0.pt")
        torch.save(content | {"cp_size": 2}, tmp_path / "train_data" / "5_0.pt")
        with pytest.raises(InputError, match="a rank's shares of sequences"):
            read_dump(tmp_path)

    def test_rows_of_no_known_trainer_are_never_taken_for_copies(self, tmp_path):
        row = {
            "rollout_log_probs": [-1.0], "old_log_probs": [-1.0], "mask": [1], "rank": 0,
            "rollout_id": 1,
        }
        for name in ("a", "b"):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        assert len(read_dump(tmp_path)) == 2

    def test_an_unknown_one_is_told_what_is_missing(self, tmp_path):
        (tmp_path / "dump.jsonl").write_text('{"logps": [-1.0], "input": "x"}\n')
        with pytest.raises(InputError, match=r"prime-rl.*logps, input in .*dump\.jsonl"):
            read_dump(tmp_path / "dump.jsonl")


class TestBrokenDumps:
    good = {"rollout_log_probs": [-1.0, -2.0], "old_log_probs": [-1.0, -2.0], "mask": [1, 1]}  # noqa: RUF012

    def complaint(self, tmp_path, **changed):
        path = tmp_path / "dump.jsonl"
        path.write_text(json.dumps(self.good) + "\n" + json.dumps(self.good | changed) + "\n")
        with pytest.raises(InputError) as error:
            read_dump(path)
        message = str(error.value)
        assert "dump.jsonl, row 1" in message
        assert "Fix:" in message
        return message

    def test_a_token_without_a_log_prob_is_counted_and_harms_no_other(self, tmp_path):
        (tmp_path / "dump.jsonl").write_text(json.dumps(self.good | {"old_log_probs": [-1, None]}))
        dump = read_dump(tmp_path / "dump.jsonl")
        assert (len(Tokens.of(dump)), Tokens.of(dump).lost) == (1, 1)

    def test_positive_log_probs(self, tmp_path):
        message = self.complaint(tmp_path, rollout_log_probs=[1.0, -2.0])
        assert "1.0 at token 0" in message
        assert "negate" in message

    def test_the_tiny_positive_ones_of_a_16_bit_head_are_no_error(self, tmp_path):
        (tmp_path / "dump.jsonl").write_text(json.dumps(self.good | {"old_log_probs": [0.06, -2]}))
        assert read_dump(tmp_path / "dump.jsonl").num_tokens == 2

    def test_lengths_that_disagree(self, tmp_path):
        assert "`old_log_probs` must be 2 numbers like `mask`, got 3" in self.complaint(
            tmp_path, old_log_probs=[-1.0, -2.0, -3.0]
        )

    def test_ragged_lists(self, tmp_path):
        assert "`rollout_log_probs`" in self.complaint(
            tmp_path, rollout_log_probs=[[-1.0], [-2.0, -3.0]]
        )

    def test_text_in_place_of_numbers(self, tmp_path):
        assert "`old_log_probs` must be numbers" in self.complaint(
            tmp_path, old_log_probs=["a", "b"]
        )

    def test_a_scalar_in_place_of_a_list(self, tmp_path):
        assert "`mask` must be a list" in self.complaint(tmp_path, mask=1)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
    def test_a_file_cut_short(self, tmp_path, suffix, share):
        path = tmp_path / f"dump{suffix}"
        write_dump(ragged_dump(lengths=[40, 30, 50]), path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=f"dump{suffix}"):
            read_dump(path)

    def test_an_uncompressed_archive_whose_array_ends_early(self, tmp_path):
        path = tmp_path / "dump.npz"
        dump = ragged_dump()
        np.savez(path, **{name: x.numpy() for name, x in dump.given().items()})
        whole = path.read_bytes()
        path.write_bytes(whole[:100] + whole[140:])
        with pytest.raises(InputError, match=r"dump\.npz"):
            read_dump(path)

    @pytest.mark.parametrize("name", ["dump.pkl", "dump.pickle"])
    def test_pickles_are_refused_unread(self, tmp_path, name):
        with pytest.raises(InputError, match=r"a pickle.*write_dump"):
            read_dump(tmp_path / name)

    def test_pickled_objects_in_pt_are_not_unpickled(self, tmp_path):
        ran = []

        class Bomb:
            def __reduce__(self):
                return (ran.append, (1,))

        torch.save({"samples": [Bomb()]}, tmp_path / "dump.pt")
        with pytest.raises(InputError, match="not unpickled"):
            read_dump(tmp_path / "dump.pt")
        assert ran == []

    def test_pickled_objects_in_npz_are_not_unpickled(self, tmp_path):
        objects = np.array([{"a": 1}], dtype=object)
        np.savez(tmp_path / "dump.npz", rollout_log_probs=objects)
        with pytest.raises(InputError, match="pickled objects"):
            read_dump(tmp_path / "dump.npz")

    def test_a_pickle_named_pt_is_not_unpickled(self, tmp_path):
        (tmp_path / "dump.pt").write_bytes(pickle.dumps(LogProbDump))
        with pytest.raises(InputError, match=r"dump\.pt"):
            read_dump(tmp_path / "dump.pt")

    def test_arrays_that_disagree(self, tmp_path):
        np.savez(
            tmp_path / "dump.npz", rollout_log_probs=-np.ones((2, 3)),
            old_log_probs=-np.ones((2, 4)), mask=np.ones((2, 3), bool),
        )
        with pytest.raises(InputError, match=r"`old_log_probs`.*\(2, 3\).*\(2, 4\) in .*dump\.npz"):
            read_dump(tmp_path / "dump.npz")

    def test_boundaries_that_fall(self, tmp_path):
        flat = -np.ones(4, np.float32)
        np.savez(
            tmp_path / "dump.npz", rollout_log_probs=flat, old_log_probs=flat, mask=flat < 0,
            cu_seqlens=np.array([0, 3, 2]),
        )
        with pytest.raises(InputError, match="cu_seqlens"):
            read_dump(tmp_path / "dump.npz")

    def test_a_path_that_is_not_there(self, tmp_path):
        with pytest.raises(InputError, match="not there"):
            read_dump(tmp_path / "dump.npz")

    def test_a_directory_without_dumps(self, tmp_path):
        with pytest.raises(InputError, match="has none"):
            read_dump(tmp_path)

    def test_an_unknown_suffix(self, tmp_path):
        for call in (read_dump, lambda path: write_dump(ragged_dump(), path)):
            with pytest.raises(InputError, match=r"\.parquet"):
                call(tmp_path / "dump.csv")
        with pytest.raises(InputError, match=r"\.parquet"):
            DumpWriter(tmp_path, suffix="csv")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, suffix, monkeypatch):
    from iscorrect.dumps import writers

    path = tmp_path / f"dump{suffix}"
    write_dump(ragged_dump(), path)
    before = path.read_bytes()

    def half(rows, unfinished):
        unfinished.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setitem(writers.WRITERS, suffix, half)
    with pytest.raises(OSError, match="disk full"):
        write_dump(ragged_dump(seed=1), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_writer_takes_tensors_with_gradient_and_other_dtypes(tmp_path):
    log_probs = torch.tensor([[-1.0]], requires_grad=True)
    path = DumpWriter(tmp_path / "new", suffix=".jsonl").write(
        step=1, mask=torch.tensor([[True]]), rollout_log_probs=log_probs.bfloat16(),
        old_log_probs=log_probs.double(), log_probs=log_probs, entropy=None,
    )
    dump = read_dump(path)
    assert dump.log_probs.dtype == torch.float32
    assert dump.entropy is None
    assert dump.step.tolist() == [1]


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="pip install pyarrow, which the extra 'parquet' brings"):
        write_dump(ragged_dump(), tmp_path / "dump.parquet")


def test_fields_of_other_shapes_are_refused():
    good = {"rollout_log_probs": -torch.ones(2, 3), "old_log_probs": -torch.ones(2, 3)}
    mask = torch.ones(2, 3, dtype=torch.bool)
    for name, x in {"step": torch.zeros(3), "token_ids": torch.zeros(2, 2),
                    "top_k_ids": torch.zeros(2, 2, 5)}.items():
        with pytest.raises(InputError, match=f"`{name}`"):
            LogProbDump(mask=mask, **good, **{name: x.long()})
    with pytest.raises(InputError, match="at least one"):
        concatenate([])


@pytest.mark.parametrize("ids", [True, False])
def test_candidates_are_read_in_any_order_with_the_sampled_one_first_or_not(ids):
    torch.manual_seed(0)
    logits = torch.randn(4, 9, 20).log_softmax(-1)
    sampled = torch.randint(0, 20, (4, 9))
    first = logits.topk(5)
    fresh = not ids  # without ids nobody can tell that the sampled one is listed twice
    sampled = torch.where((first.indices == sampled[..., None]).any(-1) & fresh,
                          logits.argmin(-1), sampled)
    chosen = logits.gather(-1, sampled[..., None])
    dump = LogProbDump(
        rollout_log_probs=chosen[..., 0], old_log_probs=chosen[..., 0], token_ids=sampled,
        mask=sampled >= 0, top_k_log_probs=torch.cat([chosen, first.values], -1),
        top_k_ids=torch.cat([sampled[..., None], first.indices], -1) if ids else None,
    )
    tokens = Tokens.of(dump)
    assert np.allclose(tokens.best, first.values[..., 0].flatten())
    assert np.allclose(tokens.lead, (first.values[..., 0] - first.values[..., 1]).flatten())


def test_an_id_that_fills_an_unused_place_is_no_second_listing():
    one = torch.tensor([[-0.1]])
    dump = LogProbDump(
        rollout_log_probs=one, old_log_probs=one, mask=one < 0, token_ids=torch.tensor([[0]]),
        top_k_log_probs=torch.tensor([[[-0.1, -3.0, torch.nan]]]),
        top_k_ids=torch.tensor([[[0, 5, 0]]]),
    )
    tokens = Tokens.of(dump)
    assert tokens.best.tolist() == pytest.approx([-0.1])
    assert tokens.lead.tolist() == pytest.approx([2.9])
