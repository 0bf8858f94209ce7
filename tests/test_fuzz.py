"""The fuzz command tries, shrinks and keeps; what it once found stays right."""

import importlib
import json

import pytest
from hypothesis import strategies as st

from tests.fuzz import __main__ as command, _search

CASES = sorted(_search.FOUND.glob("*.json"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_case_that_failed_once_is_right(path):
    area = importlib.import_module(f"tests.fuzz.{path.stem.split('-')[0]}")
    area.check(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.parametrize("area", command.AREAS)
def test_an_area_finds_nothing_in_a_second(area, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fuzz", "--area", area, "--seconds", "1", "--seed", "7"])
    assert command.main() == 0
    assert "0 failures" in capsys.readouterr().out


def test_a_case_that_fails_is_shrunk_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_search, "FOUND", tmp_path)

    def check(case):
        assert case["n"] < 17

    cases = st.fixed_dictionaries({"n": st.integers(0, 1000)})
    counts = _search.search("planted", cases, check, seed=0, seconds=30)
    assert counts["failures"] == 1
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text()) == {"n": 17}
    assert f"planted: kept as {kept}" in capsys.readouterr().out
    with pytest.raises(AssertionError):
        check(json.loads(kept.read_text()))
