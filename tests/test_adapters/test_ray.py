"""The correction inside verl's Ray workers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from outcome import record

pytest.importorskip("ray")
pytest.importorskip("tensordict")

RUN = Path(__file__).parents[2] / "examples" / "ray_verl" / "run.py"


def test_ray_workers_together_give_the_loss_of_the_whole_batch():
    done = subprocess.run([sys.executable, str(RUN)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, together = map(float, re.findall(r"[+-]\d\.\d{7}", done.stdout))
    assert together == pytest.approx(whole, rel=1e-5)
    apart = float(re.findall(r"gradient (\S+)", done.stdout)[0])
    assert apart < 1e-7
    record(
        "verl", "registered policy loss in Ray workers", distribution="verl",
        loss=abs(together - whole), gradient=apart,
    )
