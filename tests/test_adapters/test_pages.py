"""The pages for the trainers: short, and their code is about names that exist."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import iscorrect

PAGES = sorted((Path(iscorrect.__file__).parents[1] / "docs" / "trainers").glob("*.md"))


@pytest.fixture(params=PAGES, ids=lambda path: path.stem)
def page(request):
    return request.param.read_text()


def test_there_is_a_page_for_every_adapter():
    modules = {p.stem for p in (Path(iscorrect.__file__).parent / "adapters").glob("*.py")}
    shared = {"__init__", "averages", "bands", "dialects", "methods", "ragged", "replay"}
    assert modules - shared <= {p.stem for p in PAGES}


def test_a_page_fits_on_a_screen(page):
    assert len(page.splitlines()) <= 50


def test_what_a_page_imports_from_here_exists(page):
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        if ">>>" in block:
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("iscorrect"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module}.{name.name}"


def test_a_page_says_what_was_run_and_how_to_check_and_change_precision(page):
    if page.startswith("# In your trainer"):
        return
    assert re.search(r"\b(Run against|Not run)\b", page)
    assert "dump" in page.lower()
    assert "FP16" in page
    assert "FP32 head" in page


def test_the_table_of_what_was_run_is_what_the_tests_found():
    folder = PAGES[0].parent
    spec = importlib.util.spec_from_file_location("table", folder / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    outcomes = (folder / "outcomes.jsonl").read_text()
    page = (folder / "README.md").read_text()
    assert table.with_table(page, outcomes) == page
    on_the_index = ("AReaL", "OpenRLHF", "SkyRL", "ms-swift", "tinker")
    for line in outcomes.splitlines():
        if any(f'"{name}"' in line for name in on_the_index):
            assert "contract" not in line


def test_the_example_configurations_name_what_exists(monkeypatch):
    tomllib = pytest.importorskip("tomllib")
    examples = Path(iscorrect.__file__).parents[1] / "examples"
    settings = tomllib.loads((examples / "prime_rl.toml").read_text())["trainer"]["loss"]
    module, name = settings["import_path"].rsplit(".", 1)
    assert callable(getattr(importlib.import_module(module), name))
    iscorrect.parse(settings["kwargs"]["correction"])
    monkeypatch.syspath_prepend(str(examples))
    assert callable(importlib.import_module("slime_corrections").token_tis)
    assert callable(importlib.import_module("skyrl_corrections").register_corrections)
