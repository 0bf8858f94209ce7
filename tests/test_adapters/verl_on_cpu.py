"""Three steps of verl's trainer with its FSDP2 worker on a CPU: python verl_on_cpu.py DIRECTORY.

Real are ``RayPPOTrainer._compute_old_log_prob`` and ``_update_actor``, the correction's hook, and
``TrainingWorker`` with its FSDP engine, model and optimizer. Made up are the rollouts and their
rewards, which need an engine, and a platform "cpu", which verl has no class for. Prints a line of
JSON for each correction.
"""

import contextlib
import json
import os
import sys
import types
import warnings
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from tensordict import TensorDict
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

warnings.simplefilter("ignore")
from verl.plugin.platform import platform_base, platform_manager  # noqa: E402

from iscorrect import PPOClip, token_tis, uncorrected  # noqa: E402
from iscorrect.adapters.verl import install, register_loss  # noqa: E402
from iscorrect.dumps import DumpWriter  # noqa: E402

ROWS, PROMPT, RESPONSE, VOCABULARY = 6, 3, 8, 32


class Device(types.ModuleType):
    """``torch.cpu`` with the names that ``torch.cuda`` has beside it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        known = {"mem_get_info": lambda *_: (0, 1), "get_device_name": lambda *_: "CPU"}
        return known.get(name) or getattr(torch.cpu, name, lambda *_, **__: 0)


def cpu_platform():
    """A platform whose device is the CPU; what it does not say, it does not do."""
    base = platform_base.PlatformBase
    nothing = {name: lambda self, *_, **__: None for name in base.__abstractmethods__}
    return type("CPU", (base,), nothing | dict(
        device_name="cpu", vendor_name="cpu", device_module=Device("cpu"),
        is_available=lambda self: True, is_platform_available=lambda self, **_: True,
        current_device=lambda self: "cpu", device_count=lambda self: 1,
        get_device_capability=lambda self, *_: (None, None),
        communication_backend_name=lambda self: "gloo",
        nvtx_range=lambda self, _: contextlib.nullcontext(),
        visible_devices_envvar=lambda self: "NONE", ray_resource_name=lambda self: "CPU",
        ray_noset_envvars=lambda self: [], ray_resource_options=lambda self, _: {},
    ))()


def save_model(path):
    words = ["<pad>", "<eos>", *map(str, range(VOCABULARY - 2))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.3,
    )).save_pretrained(path)


def worker_of(path):
    """verl's worker with its FSDP2 engine and AdamW."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        ActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        PolicyLossConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    precision = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    worker = TrainingWorker(TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=path, use_remove_padding=False, enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "eager"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", dtype="float32", model_dtype="fp32", use_torch_compile=False,
            mixed_precision=precision, use_dynamic_bsz=False, micro_batch_size_per_gpu=2,
            infer_micro_batch_size_per_gpu=2,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    ))
    worker.reset()
    config = ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=2, use_dynamic_bsz=False,
        policy_loss=PolicyLossConfig(loss_mode="iscorrect_ppo"),
    )
    worker.set_loss_fn(lambda *a, **k: ppo_loss(config, *a, **k))
    return worker


def trainer_of(worker):
    """What the trainer's methods read of it."""
    trainer = MagicMock()
    settings = trainer.config.actor_rollout_ref
    actor, rollout = settings.actor, settings.rollout
    actor.get = lambda _, default: default
    actor.calculate_entropy, actor.entropy_coeff = False, 0.0
    actor.ppo_mini_batch_size, actor.ppo_epochs = ROWS, 1
    actor.data_loader_seed, actor.shuffle = 0, False
    rollout.n, rollout.temperature, rollout.multi_turn.enable = 1, 1.0, False
    trainer.config.get = lambda *_: None
    trainer.actor_rollout_wg.compute_log_prob = lambda data: worker.infer_batch(data).cpu()
    trainer.actor_rollout_wg.update_actor = lambda data: worker.train_mini_batch(data=data).cpu()
    return trainer


def rollouts(step):
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(2, VOCABULARY, (ROWS, PROMPT + RESPONSE), generator=draw)
    mask = torch.arange(RESPONSE) < torch.randint(2, RESPONSE + 1, (ROWS, 1), generator=draw)
    attention = torch.cat([torch.ones(ROWS, PROMPT, dtype=torch.bool), mask], dim=1)
    advantages = torch.randn(ROWS, 1, generator=draw).expand(ROWS, RESPONSE)
    return dict(
        prompts=tokens[:, :PROMPT], responses=tokens[:, PROMPT:], input_ids=tokens,
        attention_mask=attention.long(), response_mask=mask.long(),
        position_ids=(attention.long().cumsum(-1) - 1).clamp(min=0),
        advantages=torch.where(mask, advantages, 0),
    ), 0.3 * torch.randn(ROWS, RESPONSE, generator=draw)


def train(correction, path, dumps, steps=3):
    from verl import DataProto
    from verl.trainer.ppo import rollout_corr_helper
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    install(correction, dumps)
    trainer = trainer_of(worker_of(path))
    losses, expected, logged = [], [], []
    for step in range(steps):
        tensors, noise = rollouts(step)
        batch = DataProto(batch=TensorDict(tensors, batch_size=ROWS))
        tokens = tensors["attention_mask"].sum(-1).tolist()
        batch.meta_info = {"global_steps": step, "temperature": 1.0, "global_token_num": tokens}
        scored, _ = RayPPOTrainer._compute_old_log_prob(trainer, batch)
        batch.batch["old_log_probs"] = scored.batch["old_log_probs"]
        batch.batch["rollout_log_probs"] = scored.batch["old_log_probs"] + noise
        hook = rollout_corr_helper.compute_rollout_correction_and_add_to_batch
        batch, metrics = hook(batch, {})
        output = RayPPOTrainer._update_actor(trainer, batch)
        weighted = batch.batch["rollout_is_weights"] * batch.batch["advantages"]
        # one update per rollout, so that the objective's own ratio is 1
        expected.append(-(weighted * tensors["response_mask"]).sum().item()
                        / tensors["response_mask"].sum().item())
        losses.append(float(torch.tensor(output.meta_info["metrics"]["actor/pg_loss"]).sum()))
        logged.append(metrics)
    return dict(losses=losses, expected=expected, metrics=logged)


def main(directory):
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    platform_manager.set_platform(cpu_platform())
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    EngineRegistry.register("language_model", ["fsdp2"], ["cpu"])(FSDPEngineWithLMHead)
    register_loss("iscorrect_ppo", PPOClip(low=0.8, high=1.28))
    path = f"{directory}/model"
    save_model(path)
    for correction in (uncorrected(), token_tis(cap=1.2)):
        dumps = DumpWriter(f"{directory}/{'dump' if correction.bound else 'none'}")
        print(json.dumps(train(correction, path, dumps)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
