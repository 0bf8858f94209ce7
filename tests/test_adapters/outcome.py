"""What the tests found, as lines that docs/trainers/table.py turns into a table."""

import datetime
import importlib.metadata
import json
import os
from pathlib import Path

import torch


def largest(ours, theirs):
    """The largest difference, relative to 1 + |value|; inf where one is finite and one is not."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    if not torch.equal(ours.isfinite(), theirs.isfinite()):
        return float("inf")
    ours, theirs = ours[ours.isfinite()], theirs[theirs.isfinite()]
    apart = (ours - theirs).abs() / (1 + torch.maximum(ours.abs(), theirs.abs()))
    return apart.max().item() if apart.numel() else 0.0


def record(framework, what, *, distribution=None, version=None, loss=None, gradient=None):
    """Add a line to the file that ISCORRECT_OUTCOMES names, if it does."""
    path = os.environ.get("ISCORRECT_OUTCOMES")
    if path is None:
        return
    line = {
        "framework": framework, "version": version or importlib.metadata.version(distribution),
        "what": what, "loss": loss, "gradient": gradient,
        "date": datetime.date.today().isoformat(),
    }
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")
