"""The example that audits other libraries' losses runs with what is installed."""

import importlib.util
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "audit_other_losses.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_loss_that_is_installed_is_one_of_ours(capsys):
    runpy.run_path(str(EXAMPLE))["main"]()
    sections = capsys.readouterr().out.split("\n\n")[1:]
    assert len(sections) == 2
    for framework, section in zip(("verl", "trl"), sections, strict=True):
        title, *rows = section.strip().splitlines()
        assert title.startswith(framework)
        if importlib.util.find_spec(framework) is None:
            assert title.endswith("is not installed")
        else:
            assert len(rows) > 4
            assert not any(row.endswith("–") for row in rows)
