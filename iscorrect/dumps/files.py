"""Files that appear whole or not at all."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name beside a path, to write to; it takes the path's place at the end.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with replacing(target) as unfinished:
    ...     _ = unfinished.write_text("1 2 3")
    ...     target.exists()
    False
    >>> target.read_text()
    '1 2 3'
    """
    unfinished = _hidden(path)
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        if error.filename == str(unfinished):
            error.filename = str(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def add_file(path: Path, write: Callable[[Path], None]) -> Path:
    """Write a file under a name that no other has.

    Args:
        path: the name that is wanted; where it is taken, ``_1``, ``_2`` … is put before its suffix.
        write: writes to a path.

    Returns:
        The name that was free.
    """
    unfinished = _hidden(path)
    try:
        write(unfinished)
        names = (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(1))
        return next(name for name in itertools.chain([path], names) if _claim(unfinished, name))
    finally:
        unfinished.unlink(missing_ok=True)


def _claim(unfinished: Path, path: Path) -> bool:
    """Give a file a name; False where another process was first."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            path.open("xb").close()
        except FileExistsError:
            return False
        unfinished.replace(path)
    return True


def _hidden(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex}")
