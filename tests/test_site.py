"""Pages of the site: every block of code runs, every link leads somewhere, every name is there."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import iscorrect

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OURS = [page for page in PAGES if "trainers" not in page.parts]
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MODULES = (
    "iscorrect", "iscorrect.testing", "iscorrect.testing.checks", "iscorrect.testing.mismatch",
    "iscorrect.testing.strategies", "iscorrect.dumps", "iscorrect.diagnose",
)


def name(path):
    return str(path.relative_to(DOCS))


def anchors(text):
    """Headings as links name them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", OURS, ids=name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    blocks = [code for kind, code in FENCE.findall(page.read_text("utf-8")) if kind == "python"]
    if page.stem == "diagnosis":
        pytest.skip("needs a dump; tests/test_diagnose.py runs it")
    monkeypatch.chdir(tmp_path)
    space = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, str(page), "exec"), space)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_runs_as_a_script(path, tmp_path, monkeypatch):
    notebook = json.loads(path.read_text("utf-8"))
    monkeypatch.chdir(tmp_path)
    space = {"__name__": path.stem}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), str(path), "exec"), space)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found.read_text("utf-8")), f"{page.name} links to {target}"


def shown():
    """What the API reference documents: names, and whole modules."""
    text = "\n".join(page.read_text("utf-8") for page in DOCS.glob("api/*.md"))
    return set(re.findall(r"^::: ([\w.]+)", text, re.MULTILINE))


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name(module):
    names = shown()
    listed = importlib.import_module(module).__all__
    missing = [
        public for public in listed
        if f"{module}.{public}" not in names
        and not (module in names and module.startswith("iscorrect.testing."))
        and f"{module}.{public}" not in MODULES
    ]
    assert not missing


def test_the_reference_has_the_public_names_of_every_adapter():
    names = shown()
    for path in sorted((ROOT / "iscorrect" / "adapters").glob("*.py")):
        if path.stem in ("__init__", "bands"):
            continue
        public = re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", path.read_text("utf-8"), re.MULTILINE)
        missing = {f"iscorrect.adapters.{path.stem}.{x}" for x in public} - names
        assert not missing


def test_every_documented_name_exists():
    for dotted in shown():
        module, _, attribute = dotted.rpartition(".")
        if module.startswith("iscorrect.adapters."):
            continue  # imports its framework
        try:
            assert hasattr(importlib.import_module(module), attribute), dotted
        except ModuleNotFoundError:
            importlib.import_module(dotted)


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = set(re.findall(r"([\w/-]+\.md)$", text.partition("\nnav:")[2], re.MULTILINE))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES}


def test_the_page_of_metrics_explains_every_metric():
    page = (DOCS / "metrics.md").read_text("utf-8")
    explained = set(re.findall(r"`((?:batch|mismatch|is|policy)/[\w/]+)`", page))
    loss_fn = iscorrect.PolicyLoss(
        correction=iscorrect.sequence_tis(), objective=iscorrect.PPOClip()
    )
    import torch

    x = torch.full((1, 2), -1.0)
    metrics = loss_fn(
        x.clone().requires_grad_(), old_log_probs=x, rollout_log_probs=x, advantages=x,
        mask=torch.ones(1, 2, dtype=torch.bool),
    ).metrics
    assert set(metrics) == explained


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    inventory = importlib.import_module("mkdocstrings").Inventory
    with (tmp_path / "objects.inv").open("rb") as file:
        seen = inventory.parse_sphinx(file)
    for public in iscorrect.__all__:
        assert f"iscorrect.{public}" in seen
