"""``iscorrect convert``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from iscorrect.dumps import (
    read_dump,
    write_dump,
)
from iscorrect.errors import InputError


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect convert``."""
    parser.add_argument("source", metavar="SRC", help="file or directory of any known dialect")
    parser.add_argument("target", metavar="DST", type=Path,
                        help="file: .parquet, .jsonl, .npz, .safetensors, or .pt")


def run_convert(args: argparse.Namespace) -> int:
    """``iscorrect convert``: 0 done, 2 input that cannot be used."""
    try:
        dump = read_dump(args.source)
        write_dump(dump, args.target)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{dump!r} -> {args.target}", file=sys.stderr)
    return 0
