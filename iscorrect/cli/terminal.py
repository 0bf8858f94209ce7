"""What is printed: text and tables on standard output, the rest on standard error."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from iscorrect.text import Table


def encode_anything() -> None:
    """Let both streams escape what their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(*blocks: str | Table) -> None:
    """Print lines and tables; tables by rich where it is installed and somebody looks.

    A reader that closes the pipe has seen enough: the command goes on, and so its exit code stays.
    """
    if sys.stdout is None:  # it was closed before the program began
        return
    try:
        for block in blocks:
            if isinstance(block, Table) and sys.stdout.isatty() and _rich():
                _draw(block)
            else:
                print(block)
        sys.stdout.flush()
    except OSError as error:
        # what is left in the buffer would fail again when the interpreter ends
        with suppress(io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def tell(text: str) -> None:
    """Print a line on standard error."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _draw(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=Text(table.title), title_justify="left", title_style="bold", box=None)
    for i, name in enumerate(table.header):
        drawn.add_column(
            Text(name), justify="right" if i else "left", no_wrap=bool(i), overflow="fold"
        )
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    Console().print(drawn)


@contextmanager
def progress(total: int | None = None) -> Iterator[Callable[[int, str], None]]:
    """A function that takes steps done and a description, and shows them on a terminal."""
    if not (sys.stderr is not None and sys.stderr.isatty() and _rich()):
        yield lambda done, text: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=total)
        yield lambda done, text: bar.update(task, completed=done, description=escape(text))


def _rich() -> bool:
    return importlib.util.find_spec("rich") is not None
