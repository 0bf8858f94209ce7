"""Numbers and folders on the command line."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from pathlib import Path

from iscorrect.errors import input_error
from iscorrect.text import visible


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if not 1 <= value < 2**63:
        raise ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def comma_separated(text: str) -> list[float]:
    """Numbers with commas between them.

    >>> comma_separated("1,2.5")
    [1.0, 2.5]
    """
    try:
        return [float(x) for x in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"must be numbers with commas between, got {text!r}") from None


def seconds(text: str) -> float:
    """A number of at least 0."""
    value = float(text)
    if not value >= 0:
        raise ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def seed(text: str) -> int:
    """A whole number that random generators take."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise ArgumentTypeError(f"must be at least 0 and below 2**63, got {value}")
    return value


def check_folder(caller: str, folder: Path) -> None:
    """Raise before the work for a folder of results that is not there and cannot be made."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise input_error(
            caller, "--out", expected="a folder that can be written to, or made",
            got=visible(folder) + (f", and {visible(there)} is a file" if there.is_file() else ""),
            fix="pass --out with the name of a folder of yours, or a name that nothing has",
        )
