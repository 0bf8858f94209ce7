"""A platform "cpu" and an engine "cpu" for verl, which has neither.

verl imports this file in every process, as ``VERL_USE_EXTERNAL_MODULES`` says. The engine is a Ray
actor that samples from the model in bfloat16, token by token, and may be interrupted between two.
"""

import asyncio
import contextlib
import types
import warnings

import ray
import torch
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")
from verl.plugin.platform import platform_base, platform_manager  # noqa: E402
from verl.workers.rollout import base  # noqa: E402
from verl.workers.rollout.replica import (  # noqa: E402
    RolloutReplica,
    RolloutReplicaRegistry,
    TokenOutput,
)

EOS = 1


class Device(types.ModuleType):
    """``torch.cpu`` with the names that ``torch.cuda`` has beside it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        known = {"mem_get_info": lambda *_: (0, 1), "get_device_name": lambda *_: "CPU"}
        return known.get(name) or getattr(torch.cpu, name, lambda *_, **__: 0)


def cpu_platform():
    """A platform whose device is the CPU; what it does not say, it does not do."""
    kind = platform_base.PlatformBase
    nothing = {name: lambda self, *_, **__: None for name in kind.__abstractmethods__}
    return type("CPU", (kind,), nothing | dict(
        device_name="cpu", vendor_name="cpu", device_module=Device("cpu"),
        is_available=lambda self: True, is_platform_available=lambda self, **_: True,
        current_device=lambda self: "cpu", device_count=lambda self: 1,
        get_device_capability=lambda self, *_: (None, None),
        communication_backend_name=lambda self: "gloo",
        nvtx_range=lambda self, _: contextlib.nullcontext(),
        visible_devices_envvar=lambda self: "NONE", ray_resource_name=lambda self: "GPU",
        ray_noset_envvars=lambda self: [], ray_resource_options=lambda self, n: {"num_gpus": n},
        rollout_env_vars=lambda self: {},
    ))()


class Server:
    """An engine; the trainer's weights come with the number of the step that made them."""

    def __init__(self, path, response_length):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.response_length, self.version = response_length, None
        self.draw = torch.Generator().manual_seed(0)
        self.open = asyncio.Event()
        self.open.set()

    async def generate(self, prompt_ids, sampling_params, request_id, **_):
        await self.open.wait()
        tokens, log_probs = list(prompt_ids), []
        most = sampling_params.get("max_tokens", self.response_length)
        done = False
        while not done and self.open.is_set():
            with torch.no_grad():
                logits = self.model(torch.tensor([tokens])).logits[0, -1].float()
            scores = logits.log_softmax(-1)
            token = torch.multinomial(scores.exp(), 1, generator=self.draw).item()
            tokens.append(token)
            log_probs.append(scores[token].item())
            done = token == EOS or len(log_probs) == most
            await asyncio.sleep(0.02)
        return TokenOutput(
            token_ids=tokens[len(prompt_ids):], log_probs=log_probs,
            stop_reason="completed" if done else "aborted",
            extra_fields={"global_steps": self.version},
        )

    async def load(self, weights, version):
        self.model.load_state_dict(weights, strict=False)
        self.version = version

    async def abort_all_requests(self, **_):
        self.open.clear()

    async def resume_generation(self):
        self.open.set()

    async def sleep(self): ...

    async def wake_up(self, **_): ...


class Replica(RolloutReplica):
    """One such engine for each replica."""

    async def launch_servers(self):
        server = ray.remote(Server).options(
            name=f"cpu_server_{self.replica_rank}", max_concurrency=100
        ).remote(self.model_config.path, self.config.response_length)
        self.servers, self._server_handle = [server], server
        self._server_address = f"cpu:{self.replica_rank}"


class Adapter(base.BaseRollout):
    """The trainer's end: sends its weights."""

    async def update_weights(self, weights, global_steps=None, **_):
        state = {name: x.detach().to(torch.bfloat16).clone() for name, x in weights}
        await ray.get_actor("cpu_server_0").load.remote(state, global_steps)

    async def resume(self, tags): ...

    async def release(self): ...


def install():
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    start = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend, **k: start("gloo", **k)  # not twice
    EngineRegistry.register("language_model", ["fsdp2"], ["cpu"])(FSDPEngineWithLMHead)
    base._ROLLOUT_REGISTRY["cpu", "async"] = f"{__name__}.Adapter"
    RolloutReplicaRegistry.register("cpu", lambda: Replica)


platform_manager.set_platform(cpu_platform())
install()
