"""Whether a checkpoint may switch from BF16 to FP16, and what of an update an engine sees."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable, Iterator

import torch

from iscorrect.cli.terminal import progress, say
from iscorrect.fp16.arrival import arrivals, summary, to_grid
from iscorrect.fp16.audit import audit_weights
from iscorrect.fp16.checkpoints import Stored, stored

HELP = "whether a checkpoint may switch from BF16 to FP16"

GRIDS = {
    "bfloat16": functools.partial(to_grid, dtype=torch.bfloat16, scaling="none"),
    "float16": functools.partial(to_grid, dtype=torch.float16, scaling="none"),
    "float8_e4m3fn by row": functools.partial(
        to_grid, dtype=torch.float8_e4m3fn, scaling="row"
    ),
}
"""Formats that engines hold weights in."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect fp16-check``."""
    parser.add_argument("path", metavar="PATH", help="checkpoint: a directory, .safetensors, .bin")
    parser.add_argument("--since", metavar="EARLIER", help="an earlier checkpoint of the same run,"
                        " as the trainer holds it: what of the update arrives in each format")
    parser.add_argument("--json", action="store_true", help="every tensor, for machines")


def run(options: argparse.Namespace) -> int:
    """0 safe, 1 not safe."""
    audit = audit_weights("fp16-check", _with_progress(list(stored("fp16-check", options.path))))
    update = [] if options.since is None else arrivals(
        "fp16-check", options.since, options.path, GRIDS, _with_progress, ("--since", "source")
    )
    if options.json:
        found = audit.to_dict()
        if update:
            found["update"] = [x.to_dict() for x in update]
        say(json.dumps(found, indent=2))
    else:
        if update:
            say(summary(update), *update[0].blocks()[1:])
            earlier = stored("fp16-check", options.since, "--since")
            if not {x.dtype for x in earlier} & {"float32", "float64"}:
                say("The earlier checkpoint is stored in 16 bits: what its own rounding took is in"
                    " neither number. Compare checkpoints of the float32 weights.")
            say("")
        say(*audit.blocks())
    return 1 if audit.harms else 0


def _with_progress(tensors: Iterable[Stored]) -> Iterator[Stored]:
    listed = list(tensors)
    with progress(len(listed)) as show:
        for done, tensor in enumerate(listed):
            show(done, tensor.name)
            yield tensor
