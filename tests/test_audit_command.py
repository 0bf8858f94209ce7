"""The table and the figure of `iscorrect audit`."""

import argparse
import csv
import json
import math
import sys

import pytest
import torch

from iscorrect import PRESETS, InputError, PolicyLoss, parse, sequence_tis
from iscorrect.cli.audit import (
    HEADER,
    Setting,
    add_arguments,
    audit_rows,
    frontier_figure,
    run,
    sweep,
    threshold,
)
from iscorrect.cli.main import main
from iscorrect.testing import audit


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def cells(setting, corrections):
    rows = audit_rows(setting, corrections)
    return {row[0]: dict(zip(HEADER, row, strict=True)) for row in rows}


@pytest.fixture(scope="module")
def setting():
    return Setting.of("noise=0.3", vocab=2, length=3, average=128)


def test_numbers_of_the_table_are_those_of_the_audit(setting):
    row = cells(setting, ["sequence-tis:cap=1.5"])
    loss_fn = PolicyLoss(correction=sequence_tis(1.5), aggregation="seq-mean-token-sum")
    found = audit(loss_fn, setting.policy, setting.rollout_policy, setting.reward)
    norm = found.target.norm().item()
    assert row["sequence-tis:cap=1.5"] == {
        "correction": "sequence-tis:cap=1.5",
        "bias": f"{found.bias / norm:.3f}",
        "cosine": f"{found.cosine:.3f}",
        "std": f"{found.std / math.sqrt(128) / norm:.3f}",
        "rmse": f"{math.sqrt(found.bias**2 + found.std**2 / 128) / norm:.3f}*",
        "mean weight": f"{found.mean_weight:.3f}",
        "ESS": f"{found.ess:.3f}",
    }


def test_the_star_is_on_the_least_error(setting):
    rows = cells(setting, ["uncorrected", "sequence-is", "sequence-tis"])
    errors = {name: float(row["rmse"].rstrip("* ")) for name, row in rows.items()}
    starred = [name for name, row in rows.items() if row["rmse"].endswith("*")]
    assert starred == [min(errors, key=errors.get)]


@pytest.mark.slow
def test_what_looks_at_the_batch_is_sampled_and_says_so(setting):
    rows = cells(setting, ["pareto-is", "sequence-is"])
    assert "±" in rows["pareto-is"]["bias"]
    assert "±" not in rows["sequence-is"]["bias"]
    assert rows["sequence-is"]["bias"] == "0.000"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sweep_has_the_preset_itself_in_it_and_rises(preset):
    name = threshold(preset)
    found = [parse(text) for text in sweep(preset)]
    assert parse(preset) in found
    if name is None:
        assert len(found) == 1
    else:
        assert len(set(found)) == len(found) > 5


def test_a_sweep_keeps_the_other_arguments():
    assert all(parse(text).bound.low == 0.25 for text in sweep("icepop:low=0.25,high=4"))
    assert sweep("token-mis:high=none") == ["token-mis:high=none"]


@pytest.mark.slow
def test_the_command_prints_a_row_for_every_preset(capsys):
    assert run(arguments("--vocab", "2", "--length", "2", "--average", "32")) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in PRESETS)


def test_the_command_sweeps_and_draws(capsys, tmp_path):
    file = tmp_path / "frontier.png"
    words = ["token-tis", "icepop", "--length", "2", "--sweep", "cap", "--plot", str(file)]
    assert run(arguments(*words)) == 0
    printed = capsys.readouterr().out
    assert "token-tis:cap=2 " in printed.replace("│", " ")
    assert not any(line.startswith("icepop") for line in printed.splitlines())
    assert "Without the threshold cap: icepop." in printed
    assert file.stat().st_size > 0


def test_the_figure_marks_the_least_error_of_all_thresholds(setting):
    axes = frontier_figure(setting, ["uncorrected", "sequence-tis"]).axes[0]
    *curves, star, circle = axes.lines
    points = torch.cat([torch.tensor(curve.get_xydata()) for curve in curves])
    marked = torch.tensor(star.get_xydata()[0])
    assert (points.norm(dim=1) >= marked.norm() - 1e-12).all()
    assert any(torch.equal(point, marked) for point in points)
    assert torch.allclose(
        torch.tensor(circle.get_xydata()).double().norm(dim=1), marked.norm(), rtol=1e-5
    )
    assert parse(star.get_label().removeprefix("least error: ")).level in ("sequence", "token")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["token-tiss"], "did you mean 'token-tis'"),
        (["--mismatch", "bf17"], "`mismatch` must be one of"),
        (["icepop", "--sweep", "cap"], "icepop: high"),
        (["--vocab", "100", "--length", "9"], "100 ** 9"),
        (["--mismatch", "top-k=1.7", "token-tis"], "a whole number of tokens, got 1.7"),
        (["token-tis", "--sweep", "cap", "--values", "nan"],
         "`--values` must be such that token-tis takes one of them, got nan"),
        (["token-tis", "--values", "nan", "--plot", "x.png"], "`--values` must be such that"),
        (["token-tis", "--plot", "/nonexistent/x.png"], "a file in a folder that is there"),
    ],
)
def test_messages_say_what_there_is(words, message):
    with pytest.raises(InputError) as error:
        run(arguments(*words))
    assert message in str(error.value)


OWN = """
import torch
from iscorrect import PolicyLoss, sequence_tis

value = PolicyLoss(correction=sequence_tis(1.5), aggregation="seq-mean-token-sum")

def mine(log_probs, *, rollout_log_probs, advantages, mask):
    d = torch.where(mask, log_probs - rollout_log_probs, 0).sum(-1, keepdim=True).detach()
    weights = d.exp().clamp(max=1.5)
    return -(weights * advantages * torch.where(mask, log_probs, 0)).sum() / len(mask)

NUMBER = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)


SMALL = ("sequence-tis:cap=1.5", "--vocab", "2", "--length", "3")


@pytest.mark.parametrize("path", ["my_losses:mine", "my_losses:value", "my_losses.py:mine"])
def test_a_loss_of_ones_own_stands_beside_the_corrections(own, capsys, path):
    assert run(arguments(*SMALL, "--loss", path, "--json")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == ["sequence-tis:cap=1.5", path]
    ours, theirs = rows.values()
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert run(arguments(*SMALL, "--loss", path)) == 0
    assert f"{path}: 0.9" in capsys.readouterr().out


def test_a_file_may_hold_dataclasses_and_import_its_neighbour(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "losses"
    folder.mkdir()
    (folder / "neighbour_of_it.py").write_text("CAP = 1.5\n")
    (folder / "with_a_class.py").write_text("""
from __future__ import annotations
from dataclasses import dataclass
from iscorrect import PolicyLoss, sequence_tis
from neighbour_of_it import CAP

@dataclass
class Own:
    cap: float = CAP

    def __call__(self, log_probs, **given):
        loss = PolicyLoss(correction=sequence_tis(self.cap), aggregation="seq-mean-token-sum")
        return loss(log_probs, **given)

own = Own()
""")
    (folder / "broken.py").write_text("def f(:\n")
    monkeypatch.setattr("sys.path", list(sys.path))
    path = f"{folder / 'with_a_class.py'}:own"
    assert run(arguments(*SMALL, "--loss", path, "--json")) == 0
    ours, theirs = json.loads(capsys.readouterr().out).values()
    assert ours == pytest.approx(theirs, abs=1e-12)
    with pytest.raises(InputError, match=r"can be imported, got .*broken\.py"):
        run(arguments(*SMALL, "--loss", f"{folder / 'broken.py'}:f"))


def test_numbers_come_as_csv_and_latex(own, capsys):
    assert run(arguments(*SMALL, "--loss", "my_losses:mine", "--csv")) == 0
    header, row, mine = csv.reader(capsys.readouterr().out.splitlines())
    assert header[:3] == ["correction", "bias", "cosine"]
    assert float(row[1]) == pytest.approx(float(mine[1]), abs=1e-12)
    assert run(arguments(*SMALL, "--loss", "my_losses:mine", "--latex")) == 0
    table = capsys.readouterr().out
    assert r"\texttt{my\_losses:mine} & $0." in table
    assert table.count(r"\\") == 3


def test_the_values_of_a_sweep_may_be_told(capsys):
    words = ["token-tis", "sequence-tis", "--length", "2", "--sweep", "cap", "--values", "1,3"]
    assert run(arguments(*words, "--csv")) == 0
    names = [row[0] for row in csv.reader(capsys.readouterr().out.splitlines())][1:]
    assert names == ["token-tis:cap=1", "token-tis:cap=3", "sequence-tis:cap=1",
                     "sequence-tis:cap=3"]


def test_corrections_that_are_no_preset_are_audited_too(capsys):
    text = "correction:level=sequence,bound=truncate(cap=1.5)"
    assert run(arguments(text, *SMALL, "--json")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[text] == rows["sequence-tis:cap=1.5"]
    assert sweep(text) == [text]
    assert sweep("token-tis:cap=ionides") == ["token-tis:cap=ionides"]


def test_values_that_are_no_numbers_are_told_what_they_must_be(capsys):
    with pytest.raises(SystemExit):
        arguments("--values", "1,x")
    assert "--values: must be numbers with commas between, got '1,x'" in capsys.readouterr().err


FAULTY = """
import torch
from iscorrect import Layout

def other_names(logp, adv):
    return (logp * adv).sum()

def no_key(log_probs, **_):
    return {}["loss"]

def shapes(log_probs, **_):
    return (log_probs @ torch.ones(7, 7).double()).sum()

def float_mask(log_probs, *, mask, **_):
    return Layout(mask.float())

def a_dict(log_probs, **_):
    return {"loss": log_probs.sum()}

def dropped(log_probs, **_):
    return torch.nn.functional.dropout(log_probs).sum()
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other_names", ("TypeError: other_names() got an unexpected", "testing.renamed")),
        ("no_key", ("KeyError: 'loss', at ", "faulty.py:9.")),
        ("shapes", ("Error: ", "at ", "faulty.py:12.")),
        ("float_mask", ("InputError: Layout: `mask` must be", "faulty.py:15.")),
        ("a_dict", ("a floating scalar tensor, or a tuple that begins with one, got dict",)),
        ("dropped", ("without randomness",)),
    ],
)
def test_a_loss_of_ones_own_that_fails_ends_with_2_and_says_where(
    tmp_path, capsys, monkeypatch, name, words
):
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setattr("sys.path", list(sys.path))
    loss = f"{tmp_path / 'faulty.py'}:{name}"
    assert main(["audit", *SMALL, "--loss", loss]) == 2
    said = capsys.readouterr()
    assert not said.out
    for word in (loss, *words):
        assert word in said.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torch\nx = 1 / 0\n", ("ZeroDivisionError: division by zero", "bad.py:2)")),
        ("import sys\nsys.exit('bye')\n", ("SystemExit: bye", "bad.py:2)")),
        ("from torch import nothing_of_this_name\n", ("ImportError: ", "bad.py:1)")),
    ],
)
def test_a_module_that_fails_on_import_ends_with_2_and_says_where(
    tmp_path, capsys, monkeypatch, text, words
):
    (tmp_path / "bad.py").write_text(text)
    monkeypatch.setattr("sys.path", list(sys.path))
    assert main(["audit", "token-tis", "--loss", f"{tmp_path / 'bad.py'}:f"]) == 2
    told = capsys.readouterr().err
    for word in ("`--loss` must be", "bad.py:f", *words):
        assert word in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss", "my_losses:nobody"], "can be imported"),
        (["--mismatch", "noise=inf"], "one of"),
        (["--mismatch", "top-k=nan"], "one of"),
        (["--loss", "no_such_module:f"], "no_such_module"),
        (["--loss", "nowhere.py:f"], "nowhere.py"),
        (["--loss", "token_loss"], "module:function"),
        (["--loss", "my_losses:NUMBER"], "called on tensors"),
        (["--values", "1,2"], "--sweep cap"),
    ],
)
def test_messages_about_a_loss_of_ones_own(own, words, message):
    with pytest.raises(InputError, match=message):
        run(arguments("token-tis", *words))
