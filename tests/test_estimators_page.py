"""The page of estimators says what its script writes, and speaks of every preset."""

import re
import sys
from pathlib import Path

import pytest

from iscorrect import PRESETS

DOCS = Path(__file__).parents[1] / "docs"
NUMBER = re.compile(r"\d+\.\d+(?:e-?\d+)?")


@pytest.fixture(scope="module")
def estimators():
    sys.path.insert(0, str(DOCS))
    try:
        import estimators
    finally:
        sys.path.remove(str(DOCS))
    return estimators


@pytest.mark.slow
def test_the_page_is_what_its_script_writes(estimators):
    page = estimators.PAGE.read_text(encoding="utf-8")
    again = estimators.render(page)
    assert NUMBER.sub("#", again) == NUMBER.sub("#", page)
    numbers = [list(map(float, NUMBER.findall(text))) for text in (again, page)]
    # Platforms may round the last digit differently.
    assert numbers[0] == pytest.approx(numbers[1], rel=2e-3, abs=2e-3)


def test_the_page_speaks_of_every_preset(estimators):
    page = estimators.PAGE.read_text(encoding="utf-8")
    for section in ("## Estimands and bounds", "## Numbers"):
        text = page.partition(section)[2].partition("\n## ")[0]
        assert all(f"`{preset}`" in text for preset in PRESETS)


def test_every_preset_but_the_sampled_ones_has_a_checked_estimand_and_bound(estimators):
    sampled = {name for name, preset in PRESETS.items() if preset().scope == "batch"}
    assert set(PRESETS) - set(estimators.ESTIMANDS) == sampled == {"pareto-is", "m2po"}
    assert set(PRESETS) - set(estimators.BOUNDS) == sampled


@pytest.mark.slow
def test_the_code_of_the_page_runs(estimators, capsys):
    page = estimators.PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(estimators.PAGE), "exec"), {})
    printed = capsys.readouterr().out
    assert "True\n" in printed
    assert "check_unbiased: the expected gradient is" in printed
