"""``python -m verl.trainer.main_ppo`` on a CPU, three steps, with the code of the page.

Real is all of verl but the engine and the platform, for which see verl_engine.py: Hydra, Ray, the
asynchronous v1 trainer, TransferQueue, agent loops, rewards, and the FSDP2 worker.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from outcome import record

import iscorrect
from iscorrect.dumps import read_dump

for module in ("verl", "transfer_queue", "uvicorn"):
    pytest.importorskip(module)
transformers = pytest.importorskip("transformers")

ROOT = Path(iscorrect.__file__).parents[1]
VOCABULARY, CAP = 32, 2.0
SETTINGS = """
ray_kwargs.ray_init.num_cpus=16 +ray_kwargs.ray_init.num_gpus=1
+ray_kwargs.ray_init.include_dashboard=false
data.train_files=data.parquet data.val_files=data.parquet data.train_batch_size=4
data.max_prompt_length=8 data.max_response_length=12 data.dataloader_num_workers=0
data.filter_overlong_prompts=false
actor_rollout_ref.model.path=model actor_rollout_ref.model.use_remove_padding=false
actor_rollout_ref.model.enable_gradient_checkpointing=false
+actor_rollout_ref.model.override_config.attn_implementation=eager
actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.ppo_mini_batch_size=4
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2 actor_rollout_ref.actor.optim.lr=1e-2
actor_rollout_ref.actor.policy_loss.loss_mode=iscorrect_ppo
actor_rollout_ref.actor.use_torch_compile=false
actor_rollout_ref.actor.fsdp_config.use_torch_compile=false
actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
actor_rollout_ref.actor.fsdp_config.dtype=bfloat16
actor_rollout_ref.rollout.name=cpu actor_rollout_ref.rollout.n=2
actor_rollout_ref.rollout.tensor_model_parallel_size=1
actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2
actor_rollout_ref.rollout.agent.num_workers=1
actor_rollout_ref.rollout.calculate_log_probs=true
algorithm.adv_estimator=grpo algorithm.rollout_correction.bypass_mode=false
algorithm.rollout_correction.rollout_is=null algorithm.rollout_correction.rollout_rs=null
reward.custom_reward_function.path=reward.py reward.num_workers=1
transfer_queue.backend.SimpleStorage.num_data_storage_units=1 critic.enable=false
trainer.device=cpu trainer.n_gpus_per_node=1 trainer.nnodes=1 trainer.total_training_steps=3
trainer.val_before_train=false trainer.logger=[console,file]
trainer.v1.trainer_mode=colocate_async trainer.resume_mode=disable hydra.run.dir=hydra
"""
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    words = solution_str.split()
    return sum(word.isdigit() and int(word) % 2 for word in words) / max(len(words), 1)
"""


def prepare(folder):
    """A model, prompts, a reward, and the page's corrections."""
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<eos>", *map(str, range(VOCABULARY - 2))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="0")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.3,
    )).save_pretrained(folder / "model")
    datasets.Dataset.from_list([
        dict(
            data_source="numbers", ability="numbers",
            prompt=[dict(role="user", content=f"{i % 30} {7 * i % 30} {3 * i % 30}")],
            reward_model=dict(style="rule", ground_truth=""), extra_info=dict(index=i),
        ) for i in range(64)
    ]).to_parquet(folder / "data.parquet")
    (folder / "reward.py").write_text(REWARD)
    page = (ROOT / "docs" / "trainers" / "verl.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, flags=re.S).group(1)
    steps = (ROOT / "docs" / "lab" / "real-model.md").read_text()
    steps = re.search(r"### In verl.*?```\n(.*?)```", steps, flags=re.S).group(1)
    (folder / "my_corrections.py").write_text(f"{code}\n{steps}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verl")
    prepare(folder)
    path = os.pathsep.join(map(str, (folder, Path(__file__).parent, ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *SETTINGS.split()], cwd=folder,
        capture_output=True, text=True, check=False, timeout=1800,
        env=os.environ | dict(
            VERL_USE_EXTERNAL_MODULES="verl_engine,my_corrections,verl_recorder",
            VERL_FILE_LOGGER_PATH="log.jsonl", PYTHONPATH=path, OMP_NUM_THREADS="1",
            HF_HUB_OFFLINE="1", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        ),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return folder


def steps(run):
    """verl's own log, and beside each step what its loss was given."""
    log = [json.loads(line)["data"] for line in (run / "log.jsonl").read_text().splitlines()]
    calls = [torch.load(path) for path in sorted(run.glob("loss_*.pt"))]
    each = len(calls) // len(log)
    return [(line, calls[i * each : (i + 1) * each]) for i, line in enumerate(log)]


@pytest.mark.slow
def test_the_loss_of_each_step_is_the_weighted_one(run):
    worst, corrected = 0.0, 0.0
    for line, calls in steps(run):
        advantages, weights = (
            torch.cat([call[name][call["response_mask"].bool()].double() for call in calls])
            for name in ("advantages", "rollout_is_weights")
        )
        expected, plain = (-(w * advantages).mean().item() for w in (weights, 1))
        assert line["actor/pg_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        worst = max(worst, abs(line["actor/pg_loss"] - expected))
        corrected = max(corrected, abs(expected - plain))
    assert corrected > 1e-3
    record(
        "verl", "three steps of main_ppo with an engine on the CPU", distribution="verl",
        loss=worst,
    )


@pytest.mark.slow
def test_its_weights_are_those_of_the_formula(run):
    dump = read_dump(run / "output" / "dump")
    for number, (line, calls) in enumerate(steps(run)):
        rows = dump.step == number
        d = (dump.old_log_probs - dump.rollout_log_probs)[rows][dump.mask[rows]].double()
        weights = torch.cat([
            call["rollout_is_weights"][call["response_mask"].bool()] for call in calls
        ])
        expected = d.exp().clamp(max=CAP)
        torch.testing.assert_close(weights.double().sort().values, expected.sort().values)
        assert line["is/weight/mean"] == pytest.approx(expected.mean().item(), rel=1e-5)
        assert line["is/bounded"] == pytest.approx((d.exp() > CAP).double().mean().item())


@pytest.mark.slow
def test_the_trainer_computes_with_what_its_engine_is_sent(run):
    sends = [json.loads(path.read_text()) for path in sorted(run.glob("sent_*.json"))]
    assert len(sends) >= 3
    for send in sends[1:]:  # before the first step the weights are the checkpoint's
        assert send["off_grid"] == send["not_own"] == 0 and send["not_nearest"] > 100
        assert send["farthest"] <= 2**-7


@pytest.mark.slow
def test_ages_are_in_its_log_and_versions_in_the_dump(run):
    dump, greatest = read_dump(run / "output" / "dump"), 0
    for number, (line, _) in enumerate(steps(run)):
        rows = dump.step == number
        age = number - dump.version[rows]
        worst = line["training/off_policy/trajectory_staleness_worst/max"]
        assert age[dump.mask[rows]].max() == worst
        share = (age[dump.mask[rows]] == 1).double().mean().item()
        assert line["age/1/tokens"] == pytest.approx(share)
        greatest = max(greatest, worst)
    assert greatest > 0


@pytest.mark.slow
def test_the_dump_is_reported(run):
    done = subprocess.run(
        [sys.executable, "-m", "iscorrect", "report", "output/dump"], cwd=run,
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
