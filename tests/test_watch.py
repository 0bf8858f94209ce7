"""`iscorrect watch` on folders that are there, and on one that a job fills."""

import re

import pytest
import torch

from iscorrect.cli import watch
from iscorrect.cli.main import main
from iscorrect.dumps import DumpWriter, dump_files, read_dump, write_dump


def fill(folder, scales, *, start=0, **options):
    """A file a step; scales are those of log π_old − log μ."""
    writer = DumpWriter(folder, **options)
    generator = torch.Generator().manual_seed(start)
    for step, scale in enumerate(scales, start):
        rollout = -torch.rand(8, 40, generator=generator) - 3
        noise = torch.randn(8, 40, generator=generator)
        writer.write(
            step=step, mask=torch.ones(8, 40, dtype=torch.bool), rollout_log_probs=rollout,
            old_log_probs=rollout + scale * noise,
        )


def test_a_healthy_run_ends_with_0(tmp_path, capsys):
    fill(tmp_path, [0.02] * 40)
    assert main(["watch", str(tmp_path), "--idle", "0"]) == 0
    assert capsys.readouterr().out == "steps: 40, alarms: 0\n"


def test_a_jump_ends_with_1_and_says_where(tmp_path, capsys):
    fill(tmp_path, [0.02] * 30 + [0.2] * 8, suffix=".jsonl")
    assert main(["watch", str(tmp_path), "--idle", "0"]) == 1
    *alarms, last = capsys.readouterr().out.splitlines()
    assert last == f"steps: 38, alarms: {len(alarms)}"
    for alarm in alarms:
        assert re.fullmatch(
            r"step 3\d: mismatch/\S+ is \S+ since step 30, \S+ before \(jump\)", alarm
        )
    assert "mismatch/kl_k3 is" in "".join(alarms)


def test_a_side_that_is_copied_from_the_other_is_said_once(tmp_path, capsys):
    fill(tmp_path, [0.0] * 12)
    assert main(["watch", str(tmp_path), "--idle", "0"]) == 0
    assert capsys.readouterr() == ("steps: 12, alarms: 0\n", (
        "step 0 has the same log-probs on both sides: unless they agree to the bit, one is a copy"
        " of the other, and nothing is measured\n"
    ))


def test_files_of_all_ranks_make_one_step_in_whatever_order(tmp_path, capsys):
    fill(tmp_path / "a", [0.02] * 20)
    fill(tmp_path / "b", [0.02] * 20)
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / "a" / path.name.replace("rank_0", "rank_1"))
    assert main(["watch", str(tmp_path / "a"), "--idle", "0"]) == 0
    assert capsys.readouterr().out == "steps: 20, alarms: 0\n"


def test_folders_of_ranks_hold_the_same_steps(tmp_path, capsys):
    for rank in range(3):
        fill(tmp_path / f"rank_{rank}", [0.02] * 12)
    assert main(["watch", str(tmp_path), "--idle", "0"]) == 0
    assert capsys.readouterr() == ("steps: 12, alarms: 0\n", "")


def test_names_that_begin_with_the_step_are_in_order(tmp_path, capsys, monkeypatch):
    fill(tmp_path, [0.02] * 4, start=98)
    for path in tmp_path.iterdir():
        path.rename(tmp_path / f"{int(path.name.split('_')[1])}_0.npz")
    monkeypatch.chdir(tmp_path)
    names = [path.name for path in dump_files(".")]
    assert names == ["98_0.npz", "99_0.npz", "100_0.npz", "101_0.npz"]
    assert main(["watch", ".", "--idle", "0"]) == 0
    assert capsys.readouterr() == ("steps: 4, alarms: 0\n", "")


def test_steps_below_0_are_steps(tmp_path, capsys):
    fill(tmp_path, [0.02] * 6, start=-3)
    assert main(["watch", str(tmp_path), "--idle", "0"]) == 0
    assert capsys.readouterr() == ("steps: 6, alarms: 0\n", "")


def test_one_file_with_many_steps_is_as_good(tmp_path, capsys):
    fill(tmp_path / "many", [0.02] * 30 + [0.3] * 8)
    write_dump(read_dump(tmp_path / "many"), tmp_path / "one.npz")
    assert main(["watch", str(tmp_path / "one.npz"), "--idle", "0"]) == 1
    of_one = capsys.readouterr().out
    assert main(["watch", str(tmp_path / "many"), "--idle", "0"]) == 1
    assert capsys.readouterr().out == of_one


def test_a_file_that_comes_after_its_step_was_over_is_said_to_be_left_out(tmp_path, capsys):
    run = watch._Run()
    fill(tmp_path, [0.02] * 3)
    first, second, third = sorted(tmp_path.iterdir())
    for path in (first, third, second):
        run.come([path])
    run.finish()
    assert run.steps == 3
    run.take(first)
    assert run.steps == 3
    assert "came after step 2 was over: step 0 is left out" in capsys.readouterr().err


def test_dumps_that_come_while_it_watches_are_seen(tmp_path, capsys, monkeypatch):
    batches = [(0, [0.02] * 20), (20, [0.3] * 8), None, None]

    def meanwhile(_):
        if not batches:
            raise KeyboardInterrupt
        batch = batches.pop(0)
        if batch is not None:
            fill(tmp_path, batch[1], start=batch[0])

    monkeypatch.setattr(watch.time, "sleep", meanwhile)
    assert main(["watch", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "since step 20" in told
    assert "steps: 28" in told


def test_a_file_that_still_grows_is_not_read(tmp_path, capsys, monkeypatch):
    fill(tmp_path / "whole", [0.02] * 2, suffix=".jsonl")
    text = b"".join(path.read_bytes() for path in sorted((tmp_path / "whole").iterdir()))
    growing = tmp_path / "run" / "dump.jsonl"
    growing.parent.mkdir()
    ends = [len(text) // 2, len(text) - 1, len(text), None, None]

    def meanwhile(_):
        if not ends:
            raise KeyboardInterrupt
        end = ends.pop(0)
        if end is not None:
            growing.write_bytes(text[:end])

    monkeypatch.setattr(watch.time, "sleep", meanwhile)
    assert main(["watch", str(growing.parent)]) == 0
    assert capsys.readouterr().out == "steps: 2, alarms: 0\n"


def happening(monkeypatch, *events):
    """One event after each look at the folder, two quiet looks, then an interruption."""
    left = [*events, None, None]

    def meanwhile(_):
        if not left:
            raise KeyboardInterrupt
        event = left.pop(0)
        if event is not None:
            event()

    monkeypatch.setattr(watch.time, "sleep", meanwhile)


def test_it_waits_while_a_folder_has_no_dump(tmp_path, capsys, monkeypatch):
    (tmp_path / "README.md").write_text("what this is")
    (tmp_path / ".0f3a").write_bytes(b"PK")  # a DumpWriter's, unfinished
    happening(monkeypatch, None, lambda: fill(tmp_path, [0.02] * 3))
    assert main(["watch", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("steps: 3, alarms: 0\n", "interrupted\n")


@pytest.mark.parametrize(("scale", "code"), [(0.02, 2), (0.2, 1)])
def test_a_file_that_cannot_be_read_is_said_and_the_others_are_read(tmp_path, capsys, scale, code):
    fill(tmp_path, [0.02] * 30 + [scale] * 8)
    bad = sorted(tmp_path.iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:400])
    assert main(["watch", str(tmp_path), "--idle", "0"]) == code
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert bad.name in line
    assert re.search(r"steps: 37, alarms: \d, files that could not be read: 1\n$", said.out)


def test_a_file_that_could_not_be_read_is_read_when_it_was_written_again(
    tmp_path, capsys, monkeypatch
):
    fill(tmp_path, [0.02] * 3)
    *_, last = sorted(tmp_path.iterdir())
    whole = last.read_bytes()
    last.write_bytes(whole[:400])
    happening(monkeypatch, None, None, lambda: last.write_bytes(whole))
    assert main(["watch", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == "steps: 3, alarms: 0\n"
    assert "cannot be read" in said.err


def test_files_that_go_away_end_nothing(tmp_path, capsys, monkeypatch):
    fill(tmp_path, [0.02] * 20 + [0.3] * 8)
    *_, last = sorted(tmp_path.iterdir())
    read = watch.stream_dump

    def emptied():
        for path in tmp_path.iterdir():
            path.unlink()

    monkeypatch.setattr(
        watch, "stream_dump", lambda path: (last.unlink(missing_ok=True), read(path))[1]
    )
    happening(monkeypatch, None, None, emptied)
    assert main(["watch", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "steps: 27, " in said.out
    assert "which is not there" in said.err


def test_a_file_that_grows_after_it_was_read_is_said_once(tmp_path, capsys, monkeypatch):
    fill(tmp_path / "whole", [0.02] * 4, suffix=".jsonl")
    first, *others = [path.read_bytes() for path in sorted((tmp_path / "whole").iterdir())]
    growing = tmp_path / "dump.jsonl"
    growing.write_bytes(first)

    def grow(piece):
        with growing.open("ab") as file:
            file.write(piece)

    quiet = [None, None]
    happening(
        monkeypatch, *quiet, lambda: grow(others[0]), *quiet, lambda: grow(others[1]), *quiet
    )
    assert main(["watch", str(growing)]) == 0
    said = capsys.readouterr()
    assert said.out == "steps: 1, alarms: 0\n"
    assert said.err.count("changed after it was read: what came since is left out") == 1


@pytest.mark.parametrize(("changed", "name"), [
    ({"old_log_probs": torch.full((8, 40), -torch.inf)}, "mismatch/ is not measured"),
    ({"mask": torch.zeros(8, 40, dtype=torch.bool)}, "mismatch/ is not measured"),
    ({"old_log_probs": torch.tensor([-torch.inf] + [-3.01] * 39).expand(8, 40)},
     "mismatch/ess/sequence is not measured"),
])
def test_a_step_in_which_nothing_was_measured_is_said_once_and_is_no_value(
    tmp_path, capsys, changed, name
):
    dump = {
        "mask": torch.ones(8, 40, dtype=torch.bool), "old_log_probs": torch.full((8, 40), -3.01),
        "rollout_log_probs": torch.full((8, 40), -3.0),
    }
    writer = DumpWriter(tmp_path)
    for step in range(40):
        nothing = changed if step >= 30 else {}
        writer.write(step=step, **(dump | nothing))
    main(["watch", str(tmp_path), "--idle", "0"])
    said = capsys.readouterr()
    assert said.out.count("mismatch/ess/sequence is 0") == 0
    (line,) = said.err.splitlines()
    assert line.startswith("step 30 has no ")
    assert name in line


@pytest.mark.parametrize(("make", "message"), [
    (lambda folder: folder / "nowhere", "a folder or a file that exists"),
    (lambda folder: folder, "a directory with"),
    (lambda folder: (folder / "notes.txt").write_text("") and folder, "a directory with"),
    (lambda folder: (folder / "broken.npz").write_bytes(b"PK") and folder, "broken.npz"),
])
def test_what_cannot_be_watched_ends_with_2(tmp_path, capsys, make, message):
    assert main(["watch", str(make(tmp_path) or tmp_path), "--idle", "0"]) == 2
    assert message in capsys.readouterr().err


def test_an_interruption_ends_it_with_what_was_seen(tmp_path, capsys, monkeypatch):
    fill(tmp_path, [0.02] * 3)

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    assert main(["watch", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("steps: 0, alarms: 0\n", "interrupted\n")


@pytest.mark.parametrize("idle", ["x", "-1", "nan"])
def test_seconds_are_a_number_of_at_least_0(tmp_path, capsys, idle):
    with pytest.raises(SystemExit) as ended:
        main(["watch", str(tmp_path), f"--idle={idle}"])
    assert ended.value.code == 2
    assert "argument --idle: " in capsys.readouterr().err
