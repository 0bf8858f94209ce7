"""The command for a day with a GPU runs on a rehearsed one, and goes on where it stopped."""

import csv
import time

import pytest
import torch

from benchmarks import gpu, harness
from benchmarks.harness import Setting, record
from rehearsal import Rehearsal

SETTING = Setting("cuda", 1, rounds=1, small=True)


@pytest.mark.slow
def test_the_command_for_a_gpu_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RECORDS", tmp_path)
    # a compiler does not see the rehearsal
    monkeypatch.setattr(torch, "compile", lambda f=None, **_: f or (lambda g: g))
    with Rehearsal():
        done = []
        for workload in gpu.run(SETTING, [], until=time.monotonic() + 600):
            done.append(workload)
            path = record("gpu", done, SETTING)
            if len(done) == 2:
                assert [w.name for w in gpu.recorded(SETTING)] == [w.name for w in done]
        assert [w.name for w in gpu.recorded(SETTING)] == list(gpu.tables(SETTING))
        assert list(gpu.run(SETTING, gpu.recorded(SETTING), until=time.monotonic() + 600)) == []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if "iscorrect" in row["provider"] or row["provider"] == "the table"]
    assert [row for row in ours if row["value"].startswith("fails")] == []


def test_without_a_gpu_the_command_says_so(capsys):
    assert gpu.main(["--small"]) == 1
    assert "no GPU" in capsys.readouterr().out
