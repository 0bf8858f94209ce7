"""The precision settings that the trainers' pages name are settings of these trainers."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "trainers"


def says(page, *texts):
    written = (PAGES / page).read_text(encoding="utf-8")
    for text in texts:
        assert text in written, text


def fields_of(configuration):
    return {field.name for field in dataclasses.fields(configuration)}


def source(package, path):
    """Read, not imported: these modules need a GPU's packages."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    return (Path(found.origin).parent / path).read_text(encoding="utf-8")


def test_trl():
    trl = pytest.importorskip("trl")
    says("trl.md", "GRPOConfig(fp16=True, bf16=False)", "GRPOConfig(cast_lm_head_to_fp32=True)")
    assert {"fp16", "bf16"} <= fields_of(trl.GRPOConfig)
    if "cast_lm_head_to_fp32" not in fields_of(trl.GRPOConfig):
        pytest.skip("TRL before 1.0")


def test_verl():
    pytest.importorskip("verl")
    hydra = pytest.importorskip("hydra")
    settings = [
        f"actor_rollout_ref.{x}.dtype=float16"
        for x in ("actor.fsdp_config", "ref.fsdp_config", "rollout")
    ]
    says("verl.md", settings[0], settings[2])
    folder = Path(importlib.util.find_spec("verl").origin).parent / "trainer" / "config"
    with hydra.initialize_config_dir(str(folder), version_base=None):
        # without a leading +, so that an unknown name is an error
        found = hydra.compose("ppo_trainer", overrides=settings).actor_rollout_ref
    assert found.actor.fsdp_config.dtype == found.ref.fsdp_config.dtype == "float16"
    assert found.rollout.dtype == "float16"
    assert not [name for name in found.actor if "head" in name and "32" in name]


def test_areal():
    arguments = pytest.importorskip("areal.api.cli_args")
    says("areal.md", "actor.dtype=float16", "vllm.dtype=float16", "sglang.dtype=float16")
    for part in (arguments.PPOActorConfig, arguments.vLLMConfig, arguments.SGLangConfig):
        assert "dtype" in fields_of(part)


def test_ms_swift():
    says("ms_swift.md", "--torch_dtype float16")
    assert "torch_dtype: " in source("swift", "arguments/base_args/model_args.py")


def test_openrlhf():
    says("openrlhf.md", "--ds.param_dtype fp16", "`vllm_engine.py`")
    assert '"--ds.param_dtype"' in source("openrlhf", "cli/train_ppo_ray.py")
    assert '"dtype": "bfloat16"' in source("openrlhf", "trainer/ray/vllm_engine.py")


def test_skyrl_has_no_setting():
    says("skyrl.md", "bfloat16 autocast whatever the configuration says")
    worker = source("skyrl", "backends/skyrl_train/workers/worker.py")
    assert "torch.autocast(dtype=torch.bfloat16" in worker
