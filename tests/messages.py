"""Every message of the library as the tests saw it: `pytest --messages FILE` writes the file."""

import ast
import sys
from pathlib import Path

import iscorrect
from iscorrect import errors

PACKAGE = Path(iscorrect.__file__).parent


def places():
    """Where the library makes a message: (file, first line, last line) of each `input_error(…)`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "input_error":
                yield path.relative_to(PACKAGE), node.lineno, node.end_lineno


class Messages:
    """The first message that came from each line, and the places that none came from."""

    def __init__(self):
        self.seen = {}

    def record(self):
        """Note every `InputError` from now on."""
        seen = self.seen

        def note(error, *args):
            frame = sys._getframe(1)
            while frame.f_code.co_filename == errors.__file__:
                frame = frame.f_back
            where = Path(frame.f_code.co_filename)
            if PACKAGE in where.parents:
                where = where.relative_to(PACKAGE)
            seen.setdefault((str(where), frame.f_lineno), str(args[0]) if args else "")
            ValueError.__init__(error, *args)

        iscorrect.InputError.__init__ = note

    def write(self, path):
        lines = [f"{file}:{line}\n    {text}" for (file, line), text in sorted(self.seen.items())]
        for file, first, last in places():
            if not any((str(file), line) in self.seen for line in range(first, last + 1)):
                lines.append(f"{file}:{first}\n    (no test saw this one)")
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
