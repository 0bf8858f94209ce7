"""The rooms of the package and who imports whom. `python -m tests.rooms` prints the graph.

A room is a folder of `iscorrect/`, or a file that lies beside the folders. The command fails where
an import goes against `ALLOWED`, upward or in a circle.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "iscorrect"
SHARED = {"errors", "ranks", "gradients", "text", "layout"}
ALLOWED = {
    "errors": set(), "ranks": {"errors"}, "gradients": set(), "text": set(),
    "layout": {"errors", "ranks"},
    "loss": SHARED,
    "head": SHARED | {"loss"},
    "loop": SHARED | {"loss"},
    "dumps": SHARED,
    "fp16": SHARED,
    "testing": SHARED | {"loss"},
    "diagnose": SHARED | {"loss", "dumps"},
    "report": SHARED | {"loss", "dumps", "diagnose", "testing"},
    "adapters": SHARED | {"loss", "head", "loop", "dumps", "fp16"},
    "cli": SHARED | {"loss", "loop", "dumps", "fp16", "testing", "diagnose", "report"},
    "__main__": {"cli"},
}
"""Which rooms may be imported from: shared ← loss ← head, and tools above."""


def files():
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """The modules of this package that a file imports, as tuples of names.

    ("",) is the root, of which the version alone is in no room.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            relative = node.level > 0
            if modules == ["iscorrect"] and [a.name for a in node.names] == ["__version__"]:
                continue
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            relative = False
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if relative or parts == ["iscorrect"]:
                yield ("",)
            elif parts[0] == "iscorrect":
                yield tuple(parts[1:])


def arrows():
    """For each room the others that its files import."""
    found = {}
    for path in files():
        here = found.setdefault(room(path), set())
        here |= {other for other, *_ in imports(path)} - {room(path)}
    return found


def floors(found):
    """The height of each room above the lowest: one more than the highest room it imports.

    Raises ValueError with the rooms of a circle.
    """
    height = {}
    while len(height) < len(found):
        ready = [r for r in found if r not in height and found[r] <= height.keys()]
        if not ready:
            raise ValueError(f"a circle among {', '.join(sorted(found.keys() - height.keys()))}")
        for here in ready:
            height[here] = 1 + max((height[other] for other in found[here]), default=-1)
    return height


def main():
    found = arrows()
    wrong = [
        f"{here} imports {other}"
        for here, others in found.items() for other in others - ALLOWED.get(here, set())
    ]
    height = floors(found)
    for floor in range(max(height.values()) + 1):
        print(f"floor {floor}")
        for here in (r for r in ALLOWED if height.get(r) == floor):
            print(f"  {here:10} ← {' '.join(r for r in ALLOWED if r in found[here]) or '·'}")
    count = sum(map(len, found.values()))
    print(f"{len(found)} rooms, {count} arrows, {max(height.values()) + 1} floors")
    return "\n".join(wrong) or None


if __name__ == "__main__":
    raise SystemExit(main())
