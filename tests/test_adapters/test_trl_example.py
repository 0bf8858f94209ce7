"""The example runs as it stands: with ``generate``, and with vLLM where that is installed."""

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from outcome import record

import iscorrect
from iscorrect.dumps import read_dump

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl")
    from tiny_trl import save_model

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(iscorrect.__file__).parents[1]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}
# vLLM packs weights for oneDNN, after which none can be loaded into them
RUN = """
import runpy, sys
if "vllm" in sys.argv:
    import vllm._custom_ops
    vllm._custom_ops._supports_onednn = False
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ENGINES = [
    "transformers",
    pytest.param("vllm", marks=pytest.mark.skipif(not find_spec("vllm"), reason="no vLLM")),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_example_trains_three_steps_logs_metrics_and_dumps(tmp_path, engine):
    model = save_model(tmp_path / "model", torch.bfloat16)
    arguments = ["--engine", engine, "--steps", "3", "--length", "16", "--cpu"]
    done = subprocess.run(
        [
            sys.executable, "-c", RUN, str(ROOT / "examples" / "trl_grpo.py"), model,
            str(tmp_path), *arguments,
        ],
        capture_output=True, text=True, check=False, env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is/ess" in done.stdout
    dump = read_dump(tmp_path / "dump")
    assert sorted(set(dump.step.tolist())) == [0, 1, 2]
    difference = (dump.old_log_probs - dump.rollout_log_probs)[dump.mask].abs()
    # transformers samples with the model itself; vLLM with its weights in bfloat16
    assert difference.mean() < (1e-4 if engine == "transformers" else 0.1)
    if engine == "vllm":
        assert difference.mean() > 1e-5
    report = subprocess.run(
        [sys.executable, "-m", "iscorrect", "report", str(tmp_path / "dump"),
         "--out", str(tmp_path / "report")],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | ENVIRONMENT,
    )
    assert report.returncode in (0, 1), report.stderr[-3000:]
    assert "KL" in report.stdout
    record("TRL", f"examples/trl_grpo.py and its report, {engine}", distribution="trl")
