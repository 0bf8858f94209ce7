"""The command line, run as a user runs it."""

import json
import subprocess
import sys

import numpy as np
import pytest

import iscorrect
from iscorrect import PRESETS
from iscorrect.cli.audit import Setting
from iscorrect.cli.main import main
from iscorrect.cli.rollouts import MODELS, PAIRS, shipped_rollouts
from iscorrect.dumps import write_dump


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def demo(folder):
    command = [sys.executable, "-m", "iscorrect", "demo"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_demo_shows_every_precision_pair_and_every_preset(demo):
    lines = demo.splitlines()
    for name in PRESETS:
        assert sum(line.startswith(name + " ") for line in lines) == 1
    for pair in ("FP32 / FP32", "BF16 / BF16", "FP16 / FP16", "BF16 / FP16"):
        assert sum(line.startswith(pair) for line in lines) == len(MODELS)


def test_the_demo_ends_with_a_page_to_look_at_and_the_next_step_of_each_use(demo, folder):
    assert (folder / "iscorrect-demo" / "report.html").stat().st_size > 10_000
    end = demo.partition("Which numbers matter")[2]
    for word in ("KL (k3)", "iscorrect-demo/report.html", "iscorrect.token_tis_loss(",
                 "check_same_as(", "iscorrect report DUMPS"):
        assert word in end


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"iscorrect {iscorrect.__version__}\n"


def test_the_demo_shows_sequence_is_without_bias(demo):
    (row,) = (line for line in demo.splitlines() if line.startswith("sequence-is "))
    assert row.split()[-3:-1] == ["0", "%"]
    setting = Setting.of("noise=0.05", length=4)
    assert setting.audit("sequence-mis").relative_bias < 1e-12
    assert setting.audit("token-is").relative_bias > 1e-3


def test_fp16_on_both_sides_ships_a_tenth_of_the_mismatch_of_bf16():
    sigma = {}
    for precision in ("bfloat16", "float16"):
        dump = shipped_rollouts("sharp", precision, precision)
        sigma[precision] = (dump.old_log_probs - dump.rollout_log_probs).std().item()
    assert 8 < sigma["bfloat16"] / sigma["float16"] < 11
    assert len(PAIRS) == 9


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".jsonl"])
def test_compare_reads_a_dump_and_prints_a_row_per_correction(tmp_path, capsys, suffix):
    path = tmp_path / f"rollouts{suffix}"
    write_dump(shipped_rollouts("sharp", "bfloat16", "bfloat16"), path)
    corrections = ["token-tis:cap=1.1", "sequence-mis:high=2"]
    arguments = ["compare", str(path)]
    for correction in corrections:
        arguments += ["--correction", correction]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "64 sequences, 8192 tokens; k1" in out
    assert all(any(line.startswith(c) for line in out.splitlines()) for c in corrections)
    assert main([*arguments, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert list(seen) == corrections
    assert seen["token-tis:cap=1.1"]["is/weight/max"] == pytest.approx(1.1)
    assert 0 < seen["sequence-mis:high=2"]["is/rejected"] < 0.2


def test_compare_reads_a_plain_npz(tmp_path, capsys):
    path = tmp_path / "mine.npz"
    rollout = -np.ones((2, 3), np.float32)
    np.savez(path, rollout_log_probs=rollout, old_log_probs=rollout, mask=np.ones((2, 3), bool))
    assert main(["compare", str(path)]) == 0
    assert "2 sequences, 6 tokens; k1 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "nowhere.npz"], "nowhere.npz"),
        (["compare", "{file}", "--correction", "token-tsi"], "did you mean 'token-tis'?"),
        (["compare", "{file}", "--correction", "token-tis:cap=-1"], "Truncate: `cap` must be"),
    ],
)
def test_bad_input_ends_with_code_2_and_a_message(tmp_path, capsys, arguments, message):
    path = tmp_path / "rollouts.npz"
    write_dump(shipped_rollouts("add", "float16", "float16"), path)
    assert main([a.format(file=path) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out
