"""Public numbers replayed: tiny made-up files in the formats of the public ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.lab import __main__ as lab, published, published_table
from iscorrect.errors import InputError

RECORDS = Path(published.__file__).parent / "records"
ROOT = Path(__file__).parents[1]
HEALTHY = [1e-3 * (1 + 0.1 * (-1) ** i) for i in range(40)]
NOTEBOOK = """# Notes

### Iteration 0 — NCCL baseline
| Step | KL | | Step | KL |
|---:|---:|---|---:|---:|
| 0 | 0.0010 | | 3 | 0.0011 |
| 1 | 0.0012 | | 4 | 0.0010 |
| 2 | 0.0011 | | | |

### Iteration 1 — sent by NIXL
Twenty steps:
0.0010, 0.0011, 0.0010, 0.0011, 0.0010, 0.0011, 0.0010, 0.0011, 0.0010,
0.0011, **0.0900**, **0.0900**, 0.0900, 0.0900, 0.0900, 0.0900, 0.0900

| Step | Sum |
|---:|---:|
| 0 | 3.0 |

### Iteration 2 — nothing measured
"""


def test_the_labs_commands_are_listed_without_what_some_of_them_need(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "benchmarks.lab.engines", raising=False)
    with pytest.raises(SystemExit) as ended:
        lab.main(["--help"])
    assert ended.value.code == 0 and "reinforcement learning in each" in capsys.readouterr().out


def test_the_lab_of_the_real_model_names_the_packages_that_it_lacks(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\nfound = util.find_spec\n"
        "util.find_spec = lambda name, *of: None if name == 'scipy' else found(name, *of)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.lab.real", "--help"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, check=False,
    )
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert "needs" in ran.stderr and "scipy" in ran.stderr and "pip install" in ran.stderr


def plotted(kl, head="train/vllm_kl"):
    """A file of curves, every tenth step."""
    name = f"_step,training/rollout_probs_diff_max,training/rollout_probs_diff_min,{head}\n"
    return name + "".join(f"{10 * i},0.99,-0.5,{y}\n" for i, y in enumerate(kl, 1))


@pytest.fixture
def data(tmp_path):
    """A folder with all files, of which the one with W8A8 rises."""
    for run, source in published.CURVES.items():
        kl = [(30 if "W8A8" in run else 1) * y for y in HEALTHY]
        if run == "GSM8K, W8A8":
            kl[20:] = [4 * y for y in kl[20:]]
        (tmp_path / Path(source.path).name).write_text(plotted(kl))
    (tmp_path / "nixl-kl-investigation.md").write_text(NOTEBOOK)
    rows = "".join(f"{i},{i / 100},9\n" for i in range(1, 11))
    (tmp_path / "rounds.csv").write_text("step,g10_mean_logp_diff,g10_max_abs_diff\n" + rows)
    return tmp_path


def test_a_file_of_curves_is_read_and_replayed(data):
    found = {finding.run: finding for finding in published.curves(data)}
    calm, risen = found["GSM8K, BF16"], found["GSM8K, W8A8"]
    assert calm.steps == "40"
    assert calm.alarm == calm.agreed == ""
    assert float(calm.first) == pytest.approx(1e-3)
    assert calm.low < 1 < calm.high
    assert 200 < int(risen.alarm) < 250  # it rises at step 210
    assert float(risen.last) == pytest.approx(0.12)
    assert risen.low > 3


def test_the_notebook_gives_a_series_for_every_heading_that_has_one(data):
    series = published.notebook(NOTEBOOK)
    assert [*series] == ["Iteration 0 — NCCL baseline", "Iteration 1 — sent by NIXL"]
    baseline, sent = series.values()
    assert baseline == {0: 0.001, 1: 0.0012, 2: 0.0011, 3: 0.0011, 4: 0.001}
    assert len(sent) == 17
    assert sent[10] == 0.09
    verdicts = {f.run: (f.said, f.agreed) for f in published.curves(data) if f.said}
    assert [*verdicts.values()] == [("bounded", "yes"), ("drifts", "yes")]


def test_identities_and_ratios_agree_by_their_rules(data):
    mean, *kept = [f for f in published.identities(data) if f.source != published.FLASH]
    assert mean.value == pytest.approx(0.055)
    assert mean.agreed == "no"
    assert [f.agreed for f in kept] == ["yes"] * 3
    found = [*published.ratios(data, RECORDS)]
    assert all((f.agreed == "yes") == (f.low <= f.value <= f.high) for f in found)
    w8a8 = [f.value for f in found if f.quantity.startswith("KL of W8A8")]
    assert w8a8 == pytest.approx([30] * 4)


def test_a_constant_ratio_is_the_mass_that_is_kept():
    assert published.constant_ratio(0.895) == pytest.approx(0.895)


def test_a_missing_file_says_where_it_comes_from(data):
    (data / "rounds.csv").unlink()
    with pytest.raises(InputError, match=r"a folder with rounds.csv, got none in .*da6c7dab"):
        [*published.curves(data)]


@pytest.mark.parametrize("text", ["", "step,loss\n1,2\n", plotted(HEALTHY, "loss")])
def test_a_file_of_other_columns_says_which_were_expected(data, text):
    (data / "gsm8k-w8a8-sync.csv").write_text(text)
    with pytest.raises(InputError, match=r"a column _step and one that ends with vllm_kl, got the"):
        [*published.curves(data)]


def test_the_command_writes_a_record_whose_table_is_rendered(data, tmp_path):
    published.write(data, RECORDS, tmp_path)
    table = published_table.table(tmp_path)
    row = next(line for line in table.splitlines() if "sent by NIXL" in line)
    assert "| drifts |" in row
    assert "alarm at step" in row
    assert row.endswith("| yes |")
    assert json.loads((tmp_path / "published.json").read_text())["files"][0]["commit"]
    assert lab.BY_THEMSELVES["published"][0] == published.__name__


def test_the_record_that_is_committed_is_what_the_page_shows():
    table = published_table.table(RECORDS)
    page = (Path(__file__).parents[1] / "docs" / "fp16-or-correction.md").read_text("utf-8")
    assert f"<!-- lab:published -->\n{table}<!-- /lab -->" in page
    assert len(table.splitlines()) > 15


def test_without_a_record_the_table_says_so(tmp_path):
    assert "No record of `python -m benchmarks.lab published`" in published_table.table(tmp_path)
