"""A dump into another format."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from iscorrect.cli.terminal import tell
from iscorrect.dumps import LogProbDump, stream_dump, write_dump
from iscorrect.text import visible

HELP = "a dump into another format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect convert``."""
    parser.add_argument("source", metavar="SRC", help="file or directory of any known dialect")
    parser.add_argument("target", metavar="DST", type=Path,
                        help="file: .parquet, .jsonl, .npz, .safetensors, or .pt")


def run(options: argparse.Namespace) -> int:
    """0."""
    sequences = tokens = 0
    given: dict[int, set[str]] = {}  # from which sequence on

    def counted() -> Iterator[LogProbDump]:
        nonlocal sequences, tokens
        for piece in stream_dump(options.source):
            given[sequences] = set(piece.given())
            sequences += len(piece)
            tokens += piece.num_tokens
            yield piece

    write_dump(counted(), options.target)
    for name in sorted(set().union(*given.values())):
        without = [first for first, names in given.items() if name not in names]
        if without:
            tell(f"{name} is left out, for not all sequences have it: the first without is"
                 f" sequence {without[0]}, counted from 0")
    tell(f"{sequences} sequences, {tokens} tokens -> {visible(options.target)}")
    return 0
