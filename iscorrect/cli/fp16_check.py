"""``iscorrect fp16-check``: whether a checkpoint may switch from BF16 to FP16."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator

from iscorrect.fp16.audit import FP16Audit, _weights
from iscorrect.fp16.checkpoints import Stored, stored


def add_fp16_check_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect fp16-check``."""
    parser.add_argument("path", metavar="PATH", help="checkpoint: a directory, .safetensors, .bin")
    parser.add_argument("--json", action="store_true", help="every tensor, for machines")


def run_fp16_check(args: argparse.Namespace) -> int:
    """``iscorrect fp16-check``: 0 safe, 1 not safe, 2 a checkpoint that cannot be read."""
    tensors = list(stored("fp16-check", args.path))
    rows, skipped = _weights("fp16-check", _with_progress(tensors))
    audit = FP16Audit(tuple(rows), skipped)
    if args.json:
        print(json.dumps(audit.to_dict(), indent=2))
    else:
        audit.show()
    return 1 if audit.harms else 0


def _with_progress(tensors: list[Stored]) -> Iterator[Stored]:
    """The same, with a bar on a terminal."""
    if not (sys.stderr.isatty() and importlib.util.find_spec("rich")):
        yield from tensors
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(tensors, "reading", console=Console(stderr=True), transient=True)
