"""The package's shape: floors, public names, what importing it costs, the README's code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import iscorrect

PACKAGE = Path(iscorrect.__file__).parent
README = PACKAGE.parent / "README.md"
FLOORS = [
    {"errors", "tables", "ranks"},
    {"divergences", "layout", "gradients", "ranges", "checkpoints"},
    {"ratios", "logprobs", "pareto", "aggregate"},
    {"head", "thresholds", "metrics", "reject", "objectives"},
    {"bounds", "reader"},
    {"correction", "linear"},
    {"loss", "dumps", "precision"},
    {"onepass"},
    {"fused", "testing", "diagnose"},
    {"plots", "rollouts", "compare", "adapters"},
    {"report", "demo"},
    {"cli"},
    {"__main__"},
]
FLOOR = {module: i for i, floor in enumerate(FLOORS) for module in floor}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("iscorrect."):
            yield node.module.split(".")[1]
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("iscorrect."))


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_go_strictly_downward(path):
    if path == PACKAGE / "__init__.py":
        return
    here = room(path)
    for other in imports(path):
        assert other == here or FLOOR[other] < FLOOR[here], f"{here} imports {other}"


def test_every_room_has_a_floor():
    assert {room(p) for p in PACKAGE.rglob("*.py")} - {"__init__"} == set(FLOOR)


def test_public_names_are_sorted_unique_and_there():
    names = iscorrect.__all__
    assert len(names) == len(set(names))
    assert all(hasattr(iscorrect, name) for name in names)


def test_public_functions_and_classes_are_documented():
    for name in iscorrect.__all__:
        assert getattr(iscorrect, name).__doc__, name


def test_importing_costs_torch_numpy_and_einops_only():
    code = "import sys, torch, einops, numpy; before = set(sys.modules); import iscorrect;" \
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    new = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(new) - set(sys.stdlib_module_names) <= {"iscorrect", "torch"}


@pytest.mark.parametrize("page", ["README.md", "docs/distributed.md"])
def test_the_python_of_the_documentation_runs(page):
    text = (README.parent / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert blocks
    scope = {}
    for block in blocks:
        exec(block, scope)


def test_the_readmes_table_of_corrections_lists_every_preset():
    table = re.findall(r"^\| `([a-z-]+)` \|", README.read_text(), flags=re.M)
    assert table == list(iscorrect.PRESETS)
