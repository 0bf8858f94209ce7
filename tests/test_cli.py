"""The command line, run as a user runs it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import iscorrect
from iscorrect import PRESETS
from iscorrect.cli.audit import Setting
from iscorrect.cli.main import COMMANDS, main
from iscorrect.cli.rollouts import MODELS, PAIRS, shipped_rollouts
from iscorrect.dumps import LogProbDump, write_dump


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


def test_compare_says_how_many_tokens_it_could_not_measure(tmp_path, capsys):
    log_probs = -torch.ones(4, 8)
    half = torch.where(torch.arange(8) < 4, log_probs, torch.nan)
    for name, rollout in (("half", half), ("none", torch.full_like(log_probs, torch.nan))):
        dump = LogProbDump(rollout_log_probs=rollout, old_log_probs=log_probs, mask=log_probs < 0)
        write_dump(dump, tmp_path / f"{name}.npz")
    assert main(["compare", str(tmp_path / "half.npz")]) == 0
    assert "32 tokens, 16 of them without a finite log-prob" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "none.npz")]) == 2
    assert "log-probs are finite, got none of 32" in capsys.readouterr().err


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
        (["compare", "{file}", "--correction", "geometric-rs:low=none"], "Outside: `low` must"),
    ],
)
def test_bad_input_ends_with_code_2_and_a_message(tmp_path, capsys, arguments, message):
    path = tmp_path / "rollouts.npz"
    write_dump(shipped_rollouts("add", "float16", "float16"), path)
    assert main([a.format(file=path) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


@pytest.mark.parametrize("command", [["demo"], ["report", "no-such-dump.npz"]])
@pytest.mark.parametrize("out", ["taken", "taken/inside"])
def test_a_folder_that_cannot_be_made_is_said_before_the_work(
    tmp_path, monkeypatch, capsys, command, out
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    assert main([*command, "--out", out]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert f"{command[0]}: `--out` must be a folder" in said.err
    assert f"got {out}, and taken is a file" in said.err


def test_convert_says_which_columns_are_left_out_and_since_which_sequence(tmp_path, capsys):
    row = {"rollout_log_probs": [-1.0], "old_log_probs": [-1.0], "mask": [1], "step": 3}
    rows = [row | {"token_ids": [5]}, row | {"token_ids": [6], "turn": 1}, row]
    source, target = tmp_path / "dump.jsonl", tmp_path / "other.npz"
    source.write_text("".join(json.dumps(x) + "\n" for x in rows))
    assert main(["convert", str(source), str(target)]) == 0
    *left, last = capsys.readouterr().err.splitlines()
    assert left == [
        f"{name} is left out, for not all sequences have it: the first without is sequence"
        f" {first}, counted from 0" for name, first in (("token_ids", 2), ("turn", 0))
    ]
    assert last.startswith("3 sequences, 3 tokens -> ")
    assert set(np.load(target)) == {*row, "cu_seqlens"}
    source.write_text(json.dumps(rows[0]))
    assert main(["convert", str(source), str(target)]) == 0
    assert "left out" not in capsys.readouterr().err


# surroundings


@pytest.fixture
def dump(tmp_path):
    path = tmp_path / "dump.npz"
    write_dump(shipped_rollouts("add", "float16", "float16"), path)
    return path


def shell(command, directory, **environment):
    """Exit code, and what standard error got, of a shell's command; $I is the program."""
    ended = subprocess.run(
        ["bash", "-c", command], cwd=directory, capture_output=True, check=False,
        env=os.environ | {"I": f"{sys.executable} -m iscorrect"} | environment,
    )
    return ended.returncode, ended.stderr.decode("utf-8", "replace")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("touch taken; $I report dump.npz --out taken", "`--out` must be a folder"),
        ("$I report dump.npz --out /proc/nowhere", "/proc/nowhere"),
        ("$I convert dump.npz no/other.npz", "Fix: make the directory first"),
        ("ulimit -f 8; trap '' XFSZ; $I convert dump.npz other.jsonl", "File too large"),
        ("$I report dump.npz --json > /dev/full", "No space left"),
        ("mkfifo pipe.npz; $I report pipe.npz", "a pipe or a device"),
        ("$I report - --json 0<&-", "standard input"),
        ("$I report dump.npz --json --fail-if 'mismatch/kl_k3>nan'", "a number"),
        ("$I audit token-tis --length 2 --plot x.xyz", "`--plot` must be a file that ends in"),
    ],
)
def test_what_cannot_be_read_or_written_ends_with_code_2(dump, command, message):
    code, told = shell(command, dump.parent)
    assert (code, message in told, "Traceback" in told) == (2, True, False), told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("$I compare dump.npz | head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", 0),
        ("$I report dump.npz --json --fail-if 'batch/tokens>1' | head -c 1; exit ${PIPESTATUS[0]}",
         1),
        ("PYTHONIOENCODING=ascii $I compare dump.npz", 0),
        ("PYTHONIOENCODING=cp1252 $I report dump.npz --fail-if 'batch/tokens>1'", 1),
        ("$I compare dump.npz >&-", 0),
        ("cp dump.npz $'x\\xff.npz'; $I report x*.npz --out out && grep udcff out/report.md", 0),
    ],
)
def test_the_exit_code_is_the_commands_wherever_the_text_goes(dump, command, expected):
    code, told = shell(command, dump.parent)
    assert (code, "Traceback" in told) == (expected, False), told


@pytest.mark.slow
def test_lines_of_json_are_utf_8_in_every_locale(tmp_path):
    row = {"rollout_log_probs": [-1], "old_log_probs": [-1], "mask": [1], "prompt": "日本語"}
    text = json.dumps(row, ensure_ascii=False)
    (tmp_path / "dump.jsonl").write_text(text, encoding="utf-8")
    for command in ("$I compare dump.jsonl", "$I compare - < dump.jsonl"):
        assert shell(command, tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")[0] == 0


def test_names_that_would_steer_a_terminal_are_shown_escaped(tmp_path, capsys):
    (tmp_path / "\x1b[31mred\n.npz").write_bytes(b"")
    assert main(["compare", str(tmp_path / "\x1b[31mred\n.npz")]) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert "\\x1b[31mred\\n.npz" in told


@pytest.mark.parametrize("name", ["[/0]", "[gate]", "\x1b[31m"])
def test_a_tensors_name_is_no_markup(tmp_path, capsys, monkeypatch, name):
    pytest.importorskip("rich")
    torch.save({name: torch.tensor([1e6])}, tmp_path / "model.pt")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["fp16-check", str(tmp_path / "model.pt")]) == 1
    printed = capsys.readouterr().out
    assert name.replace("\x1b", "\\x1b") in printed


def test_a_fault_of_the_program_has_a_code_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr("iscorrect.cli.env.run", lambda options: 1 / 0)
    assert main(["env"]) == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_report_and_compare_do_the_same_where_a_rule_needs_advantages(dump, capsys):
    words = [str(dump), "--json", "--correction", "topr"]
    assert main(["compare", *words]) == 0
    compared = json.loads(capsys.readouterr().out)["topr"]
    assert main(["report", *words]) == 0
    reported = json.loads(capsys.readouterr().out)
    assert reported["corrections"]["topr"] == {n: x for n, x in compared.items() if n[:3] == "is/"}
    assert reported["notes"] == [
        "No advantages in the dump: topr got a sign at random for each sequence."
    ]
    assert main(["compare", str(dump), "--correction", "topr", "--correction", "icepop"]) == 0
    assert reported["notes"][0] in capsys.readouterr().out


def test_a_correction_of_whole_batches_says_what_a_batch_was(tmp_path, capsys):
    for i, suffix in enumerate((".npz", ".jsonl")):
        one = -torch.rand(4, 8)
        optional = {} if i else {"entropy": one.abs()}
        write_dump(
            LogProbDump(rollout_log_probs=one, old_log_probs=one - 0.1, mask=one < 0, **optional),
            tmp_path / f"{i}{suffix}",
        )
    assert main(["compare", str(tmp_path), "--correction", "pareto-is"]) == 0
    assert "pareto-is looks at a whole batch: here at each of 2 pieces" in capsys.readouterr().out


# the house


PACKAGE = Path(iscorrect.__file__).parent
LIBRARY = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "cli"]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_prints_and_parses_arguments(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", "") or "", *(alias.name for alias in node.names)]
            assert not {"argparse", "redirect_stdout"} & set(names), f"line {node.lineno}"
            inside = any(name.startswith("iscorrect.cli") for name in names)
            assert not inside or path.name == "__main__.py", f"line {node.lineno}"


def test_every_command_is_a_file_of_one_form():
    for name, module in COMMANDS.items():
        assert module.__name__ == f"iscorrect.cli.{name.replace('-', '_')}"
        assert module.__doc__
        assert module.HELP
        assert callable(module.add_arguments)
        assert callable(module.run)


def test_only_main_turns_errors_into_exit_codes():
    for path in (PACKAGE / "cli").glob("*.py"):
        caught = [
            ast.unparse(node.type) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ExceptHandler) and node.type is not None
        ]
        # a threshold that a preset refuses is not part of a sweep, and watch waits for files
        assert ("InputError" in caught) == (path.stem in ("main", "audit", "watch")), path
