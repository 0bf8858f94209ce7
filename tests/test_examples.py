"""The examples run."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_minimal_loop_learns():
    main = runpy.run_path(str(EXAMPLES / "minimal_loop.py"))["main"]
    rewards = main(steps=60, prompts=8, group=16)
    assert rewards[-1] > rewards[0] + 0.2


def train(ranks, *arguments):
    """What the distributed trainer prints, the numbers of one step after the other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += [str(EXAMPLES / "train_fsdp2.py"), "--prompts", "4", "--group", "4", *arguments]
    paths = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [float(x) for x in re.findall(r" ([-+]?\d[\d.e+-]*)", done.stdout)]


@pytest.mark.slow
def test_the_distributed_trainer_prints_the_same_however_its_ranks_are_arranged():
    alone = train(1, "--steps", "2")
    assert len(alone) == 2 * len(["step", "loss", "reward", "KL", "ESS"])
    assert train(4, "--cp", "2", "--steps", "2") == pytest.approx(alone, rel=1e-2, abs=5e-6)


@pytest.mark.slow
def test_the_distributed_trainer_resumes_where_it_was(tmp_path):
    checkpoint = ["--checkpoint", str(tmp_path / "saved"), "--save-every", "2"]
    first = train(2, "--cp", "2", "--steps", "2", *checkpoint)
    resumed = train(2, "--cp", "2", "--steps", "4", *checkpoint)
    assert first + resumed == train(2, "--cp", "2", "--steps", "4")
