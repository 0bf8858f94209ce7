"""Steps of verl's own trainer and FSDP2 worker on a CPU; see verl_on_cpu.py for what is real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from outcome import record

from iscorrect.dumps import read_dump

for module in ("verl", "uvicorn"):
    pytest.importorskip(module)


@pytest.mark.slow
def test_three_steps_apply_the_weights_log_the_metrics_and_leave_a_dump(tmp_path):
    program = Path(__file__).with_name("verl_on_cpu.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True,
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    plain, corrected = map(json.loads, lines)
    apart = 0.0
    for run in (plain, corrected):
        assert run["losses"] == pytest.approx(run["expected"], rel=1e-5)
        pairs = zip(run["losses"], run["expected"], strict=True)
        apart = max(apart, *(abs(a - b) for a, b in pairs))
    assert all(
        abs(a - b) > 1e-3 for a, b in zip(plain["losses"], corrected["losses"], strict=True)
    )
    for metrics in corrected["metrics"]:
        assert metrics["is/bounded"] > 0
        assert metrics["rollout_corr/rollout_is_max"] == pytest.approx(1.2)
    dump = read_dump(tmp_path / "dump")
    assert sorted(set(dump.step.tolist())) == [0, 1, 2]
    report = subprocess.run(
        [sys.executable, "-m", "iscorrect", "report", str(tmp_path / "dump"),
         "--out", str(tmp_path / "report")],
        capture_output=True, text=True, check=False,
    )
    assert report.returncode in (0, 1), report.stderr[-3000:]
    record(
        "verl", "three steps of RayPPOTrainer's update with its FSDP2 worker", distribution="verl",
        loss=apart,
    )
