"""The package's shape: floors, public names, what importing it costs, the README's code."""

import re
import subprocess
import sys

import pytest
from rooms import ALLOWED, PACKAGE, arrows, files, floors, imports, room

import iscorrect

README = PACKAGE.parent / "README.md"
FILES = files()
PARTS = {"bounds", "rules", "objectives", "terms", "aggregate", "advantages", "metrics"}
"""What one step of a loss is made of; none imports another."""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path):
    here = room(path)
    for other, *_ in imports(path):
        assert other == here or other in ALLOWED[here], f"{here} imports {other}"


def test_the_table_has_every_room_and_no_other():
    assert {room(p) for p in FILES} == set(ALLOWED)


def test_what_may_be_imported_lies_below():
    order = list(ALLOWED)
    for here, others in ALLOWED.items():
        assert all(order.index(other) < order.index(here) for other in others)


def test_the_rooms_have_no_circle():
    assert floors(arrows())["__main__"] == max(floors(arrows()).values())
    with pytest.raises(ValueError, match="a circle among a, b"):
        floors({"a": {"b"}, "b": {"a", "c"}, "c": set()})


def test_of_the_head_only_the_fused_loss_knows_the_loss():
    for path in (PACKAGE / "head").glob("*.py"):
        if any(other[0] == "loss" for other in imports(path)):
            assert path.stem in ("onepass", "fused")


def test_parts_of_a_loss_do_not_import_each_other():
    for part in PARTS:
        path = PACKAGE / "loss" / f"{part}.py"
        others = {other[1] for other in imports(path) if other[0] == "loss"}
        assert not others & (PARTS - {part}), part


def test_public_names_are_sorted_unique_and_there():
    names = iscorrect.__all__
    assert len(names) == len(set(names))
    assert all(hasattr(iscorrect, name) for name in names)


def test_public_functions_and_classes_are_documented():
    for name in iscorrect.__all__:
        assert getattr(iscorrect, name).__doc__, name


def test_importing_costs_torch_numpy_and_einops_only_and_the_figures_no_matplotlib():
    code = "import sys, torch, einops, numpy; before = set(sys.modules); import iscorrect;" \
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}));" \
        "import iscorrect.report.figures; assert 'matplotlib' not in sys.modules"
    new = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(new) - set(sys.stdlib_module_names) <= {"iscorrect", "torch"}


@pytest.mark.parametrize(
    "page", ["README.md", "docs/distributed.md", "docs/async.md", "docs/monitor.md"]
)
def test_the_python_of_the_documentation_runs(page):
    text = (README.parent / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert blocks
    scope = {}
    for block in blocks:
        exec(block, scope)


def test_the_readmes_table_of_corrections_lists_every_preset():
    table = re.findall(r"^\| `([a-z0-9-]+)` \|", README.read_text(), flags=re.M)
    assert table == list(iscorrect.PRESETS)


def test_the_readmes_table_of_objectives_lists_every_one():
    table = re.findall(r"^\| `([A-Z]\w+)` \|", README.read_text(), flags=re.M)
    assert table == [make.__name__ for make in iscorrect.OBJECTIVES.values()]


def test_every_promise_names_a_test_that_is_there():
    page = (README.parent / "docs" / "promises.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "promise |" not in line]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", row)
        assert named, row
        for file, test in named:
            text = (README.parent / file).read_text()
            assert f"def {test.split('::')[-1]}(" in text, test
