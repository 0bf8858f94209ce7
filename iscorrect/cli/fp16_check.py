"""Whether a checkpoint may switch from BF16 to FP16."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from iscorrect.cli.terminal import progress, say
from iscorrect.fp16.audit import audit_weights
from iscorrect.fp16.checkpoints import Stored, stored

HELP = "whether a checkpoint may switch from BF16 to FP16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect fp16-check``."""
    parser.add_argument("path", metavar="PATH", help="checkpoint: a directory, .safetensors, .bin")
    parser.add_argument("--json", action="store_true", help="every tensor, for machines")


def run(options: argparse.Namespace) -> int:
    """0 safe, 1 not safe."""
    audit = audit_weights("fp16-check", _with_progress(list(stored("fp16-check", options.path))))
    if options.json:
        say(json.dumps(audit.to_dict(), indent=2))
    else:
        say(*audit.blocks())
    return 1 if audit.harms else 0


def _with_progress(tensors: list[Stored]) -> Iterator[Stored]:
    with progress(len(tensors)) as show:
        for done, tensor in enumerate(tensors):
            show(done, tensor.name)
            yield tensor
