"""The documentation's tables come from the records and nowhere else."""

import csv

import pytest
import torch

from benchmarks import counts as operations, diagnose, report
from benchmarks.harness import COLUMNS, Setting, Times, Workload, record, summary


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.harness.RECORDS", tmp_path)
    monkeypatch.setattr(report, "RECORDS", tmp_path)
    return tmp_path


def workload(name="small"):
    made = Workload(name, "8 tokens.")
    made.add("ours", "torch", ms=0.5, ratio=1.0)
    made.add("theirs", "no-such-package", ms="not installed")
    return made


def test_a_record_holds_conditions_and_versions(records):
    path = record("case", [workload()], Setting(threads=2))
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row) for row in rows] == [COLUMNS] * 3
    assert {row["version"] for row in rows} >= {"not installed"}
    assert {(row["threads"], row["conditions"]) for row in rows} == {("2", "8 tokens.")}
    assert all(row["torch"] and row["processor"] and row["date"] for row in rows)


def test_the_report_rewrites_between_markers_and_nowhere_else(records):
    record("case", [workload("small"), workload("large")], Setting())
    page = "before\n<!-- benchmark:case/large -->\nold\n<!-- /benchmark -->\nafter\n"
    text = report.rewrite(page)
    assert text.startswith("before\n<!-- benchmark:case/large -->\n")
    assert text.endswith("<!-- /benchmark -->\nafter\n")
    assert "old" not in text
    assert "| ours | 0.500 | 1.00 |" in text
    assert "| theirs | not installed |  |" in text
    assert "8 tokens." in text
    assert "**large**" in text
    assert "**small**" not in text
    assert report.rewrite(text) == text


def test_a_device_without_a_record_is_said_to_be_one(records):
    record("case", [workload()], Setting())
    assert "Not run on a GPU" in report.tables("case", None)
    assert "Not run on a CPU" not in report.tables("case", None)
    assert report.tables("other", None).count("Not run") == 2


def test_a_ratio_is_the_median_of_the_rounds():
    slow, fast = Times([3.0, 2.0, 9.0], [3.0, 2.0, 9.0]), Times([1.0, 1.0, 3.0], [1.0, 2.0, 3.0])
    assert summary(slow, fast, "cpu") == {"wall, ms": 3000.0, "CPU, ms": 3000.0, "ratio": 3.0}
    assert summary(slow, fast, "cuda") == {"wall, ms": 3000.0, "ratio": 3.0}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("0", "0.000"), ("0.00123", "1.2e-03"), ("0.0456", "0.046"), ("1.2345", "1.23"),
        ("123.4", "123"), ("12345.6", "12,346"), ("123456", "1.2e+05"), ("fails", "fails"),
    ],
)
def test_numbers_have_three_digits(value, shown):
    assert report.pretty(value) == shown


def test_operations_on_tensors_are_counted():
    counts = operations.operations()
    assert all(counts.values())
    with operations.Operations() as seen:
        torch.ones(2).view(1, 2).expand(3, 2) + 1
    assert seen.count == 2


def test_the_tables_of_the_diagnosis_are_those_of_its_records():
    page = diagnose.PAGE.read_text(encoding="utf-8")
    for name, text in diagnose.tables():
        assert f"<!-- begin {name} -->\n{text}\n<!-- end {name} -->" in page
