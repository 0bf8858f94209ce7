"""Numbers on the command line."""

from __future__ import annotations

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if not 1 <= value < 2**63:
        raise ArgumentTypeError(f"must be at least 1, got {value}")
    return value


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
