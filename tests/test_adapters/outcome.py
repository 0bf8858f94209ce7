"""What the tests found, as lines that docs/trainers/table.py turns into a table."""

import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from iscorrect.dumps import read_dump


def largest(ours, theirs):
    """The largest difference, relative to 1 + |value|; inf where one is finite and one is not."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    if not torch.equal(ours.isfinite(), theirs.isfinite()):
        return float("inf")
    ours, theirs = ours[ours.isfinite()], theirs[theirs.isfinite()]
    apart = (ours - theirs).abs() / (1 + torch.maximum(ours.abs(), theirs.abs()))
    return apart.max().item() if apart.numel() else 0.0


def record(framework, what, *, distribution=None, version=None, loss=None, gradient=None):
    """Add a line to the file that ISCORRECT_OUTCOMES names, if it does.

    ``what`` is what was run, and after a comma with which settings.
    """
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


def reported(directory, batch):
    """What ``iscorrect report`` finds in a dump is what the batch holds."""
    out = Path(directory, "report")
    done = subprocess.run(
        [sys.executable, "-m", "iscorrect", "report", str(directory), "--out", str(out)],
        capture_output=True, text=True, check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    dump = read_dump(directory)
    assert dump.mask.sum() == batch.mask.sum()
    d = (batch.old_log_probs - batch.rollout_log_probs)[batch.mask].float()
    found = (dump.old_log_probs - dump.rollout_log_probs)[dump.mask]
    torch.testing.assert_close(found.sort().values.float(), d.sort().values)
