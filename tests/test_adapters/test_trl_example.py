"""The example runs as it stands: with ``generate``, and with vLLM where that is installed."""

import math
import os
import re
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
    assert f"24 sequences · {dump.num_tokens} tokens" in report.stdout
    assert "nats per token" in report.stdout
    record("TRL", f"examples/trl_grpo.py with {engine} and its report", distribution="trl")


# what docs/trainers/trl.md says, with a look at what the engine holds afterwards
PAGE = (ROOT / "docs" / "trainers" / "trl.md").read_text()
AFTER_THE_STEP = re.search(r"```\n(class Trainer.*?)```", PAGE, flags=re.S).group(1)
PLAIN = "class Trainer(CorrectedGRPO, GRPOTrainer): ..."
AT_THE_SEND = """
generation = trainer.vllm_generation
masters = generation._iter_named_params
generation._iter_named_params = lambda: stochastic_round_weights(masters(), torch.bfloat16)
"""
SEND = """
import sys, warnings
warnings.simplefilter("ignore")
import vllm._custom_ops
vllm._custom_ops._supports_onednn = False
import torch
from tiny_trl import arguments, dataset, reward
from trl import GRPOTrainer
from iscorrect import round_after_step, stochastic_round_weights, token_tis
from iscorrect.adapters.trl import CorrectedGRPO

%s

trainer = Trainer(
    model=sys.argv[1], reward_funcs=reward, train_dataset=dataset(), correction=token_tis(),
    args=arguments(
        sys.argv[2], use_vllm=True, vllm_mode="colocate", vllm_max_model_length=64,
        vllm_gpu_memory_utilization=0.3, learning_rate=1e-5,
        model_init_kwargs={"dtype": "float32"}, bf16=%s,
    ),
    engine_dtype=torch.bfloat16,
)
%s
trainer.train()
trainer.vllm_generation.sync_weights()
engine = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner
held = {name: w.float() for name, w in engine.model.named_parameters()}
state = trainer.optimizer.state
differ = own = 0
for name, w in trainer.model.named_parameters():
    if name in held and held[name].shape == w.shape:
        master = w.detach() + state[w].get("rest", 0)
        assert ((held[name] - master).abs() <= master.abs() * 2**-7).all(), name
        differ += int((held[name] != master.bfloat16().float()).sum())
        own += int((held[name] != w.detach()).sum())
arrival = [x["weights/arrival"] for x in trainer.state.log_history if "weights/arrival" in x]
print("FOUND", differ, own, *arrival)
"""


def sent(model, folder, autocast, kind=PLAIN, lines=""):
    """Entries that are not the nearest to the masters, those that are not the trainer's, and
    what its log says of arrival."""
    done = subprocess.run(
        [sys.executable, "-c", SEND % (kind, autocast, lines), model, str(folder)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    differ, own, *arrival = done.stdout.split("FOUND ")[1].splitlines()[0].split()
    return int(differ), int(own), [float(x) for x in arrival]


@pytest.mark.skipif(not find_spec("vllm"), reason="no vLLM")
def test_weights_can_be_rounded_stochastically_where_trl_sends_them(tmp_path):
    model = save_model(tmp_path / "model", torch.bfloat16)
    differ, own, arrival = sent(model, tmp_path, False, lines=AT_THE_SEND)
    assert differ > 100 and own > 100 and arrival


@pytest.mark.skipif(not find_spec("vllm"), reason="no vLLM")
def test_trl_can_compute_with_what_it_sends(tmp_path):
    model = save_model(tmp_path / "model", torch.bfloat16)
    differ, own, arrival = sent(model, tmp_path, True, AFTER_THE_STEP)
    assert differ > 100 and own == 0
    measured = [x for x in arrival if not math.isnan(x)]
    assert measured == pytest.approx([1] * len(measured)) and measured
    _, own, arrival = sent(model, tmp_path, True)
    assert own > 100 and any(x < 0.9 for x in arrival)
