"""Engines that sample and say with which probability: vLLM, or transformers' own generation."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.lab.policy import DEVICE, Precision, State, open_policy
from benchmarks.lab.products import Product, missing
from benchmarks.lab.tasks import PAD


class Rollouts(NamedTuple):
    """What was sampled.

    Attributes:
        token_ids: int "b t", PAD after the end.
        log_probs: "b t", nats, as the engine reports them.
        mask: bool "b t".
    """

    token_ids: Tensor
    log_probs: Tensor
    mask: Tensor


class Engine(Protocol):
    """What samples. Its random numbers are torch's, so ``torch.manual_seed`` fixes them."""

    name: str

    def generate(self, prompts: Tensor, max_tokens: int, stop: int | None) -> Rollouts:
        """One answer to each prompt "b p", at temperature 1 from the whole vocabulary."""
        ...

    def load(self, state: State) -> None:
        """Take other weights, under the names of the transformers model."""
        ...

    def parameters(self) -> Iterator[Tensor]:
        """The weights as they are held, merged ones included."""
        ...

    def close(self) -> None:
        """Give back what it holds; nothing can be asked of it afterwards."""
        ...


def open_engine(path: Path, precision: Precision, max_length: int, kind: str) -> Engine:
    """The engine of a kind, "vllm" or "transformers", serving a saved model."""
    if kind == "vllm":
        return Vllm(path, precision, max_length)
    return Transformers(path, precision)


def default_kind() -> str:
    return "vllm" if importlib.util.find_spec("vllm") else "transformers"


class Vllm:
    """vLLM in this process.

    Args:
        options: of ``vllm.LLM``, in place of what it is given here.
    """

    def __init__(self, path: Path, precision: Precision, max_length: int, **options: object):
        os.environ |= {
            "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1",
        }
        import vllm
        import vllm._custom_ops

        # Its oneDNN products repack the weights, after which none can be loaded.
        vllm._custom_ops._supports_onednn = False
        self.name = f"vLLM {vllm.__version__}"
        self._llm = vllm.LLM(str(path), **{
            "dtype": str(precision.torch_dtype).removeprefix("torch."), "seed": 0,
            "hf_overrides": {"head_dtype": "float32"} if precision.fp32_head else {},
            "enforce_eager": True, "max_model_len": max_length, "max_num_seqs": 256,
            "logprobs_mode": "processed_logprobs", "enable_prefix_caching": False,
            "skip_tokenizer_init": True, **self._room(), **options,
        })
        self._sampling = vllm.SamplingParams
        worker = self._llm.llm_engine.model_executor.driver_worker.worker
        self._model: nn.Module = worker.model_runner.model
        self._products = _products(self._model, precision.torch_dtype)

    def _room(self) -> dict[str, float]:
        # on a GPU the trainer needs some, too
        return {"gpu_memory_utilization": 0.4} if DEVICE.type == "cuda" else {}

    def generate(
        self, prompts: Tensor | list[list[int]], max_tokens: int, stop: int | None,
        **options: object,
    ) -> Rollouts:
        """Answers; ``options`` are sampling parameters in place of temperature 1."""
        sampling = self._sampling(**{
            "max_tokens": max_tokens, "temperature": 1.0, "logprobs": 0, "detokenize": False,
            "ignore_eos": stop is None, "stop_token_ids": [] if stop is None else [stop],
            **options,
        })
        rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
        requests = [{"prompt_token_ids": ids} for ids in rows]
        answers = [r.outputs[0] for r in self._llm.generate(requests, sampling, use_tqdm=False)]
        token_ids = torch.full((len(answers), max_tokens), PAD)
        found = torch.zeros(len(answers), max_tokens)
        mask = torch.zeros(len(answers), max_tokens, dtype=torch.bool)
        for i, answer in enumerate(answers):
            n = len(answer.token_ids)
            pairs = zip(answer.logprobs, answer.token_ids, strict=True)
            token_ids[i, :n] = torch.tensor(answer.token_ids)
            found[i, :n] = torch.tensor([step[token].logprob for step, token in pairs])
            mask[i, :n] = True
        return Rollouts(token_ids, found, mask)

    def load(self, state: State) -> None:
        self._model.load_weights(state.items())
        for product in self._products:
            product.forget()

    def forget(self) -> None:
        """Compute prefixes anew that were kept, if any are: they are of the weights before."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(f"{self.name} did not empty its prefix cache; restart the engine")

    def parameters(self) -> Iterator[Tensor]:
        return self._model.parameters()

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        del self._llm, self._model
        cleanup_dist_env_and_memory()


def _products(model: nn.Module, dtype: torch.dtype) -> list[Product]:
    """What computes a vLLM model's layers from now on, where the processor cannot."""
    if not missing(dtype):
        return []
    layers = [layer for layer in model.modules() if hasattr(layer, "cpu_linear")]
    for layer in layers:
        layer.cpu_linear = Product()
    return [layer.cpu_linear for layer in layers]


class Transformers:
    """``generate`` of transformers, with its key-value cache."""

    def __init__(self, path: Path, precision: Precision):
        self._serve(open_policy(path, precision))
        if precision.fp32_head:
            self._model.lm_head.forward = self._wide_head

    @classmethod
    def of(cls, model: nn.Module) -> Transformers:
        """An engine that samples from a model as it is at that moment."""
        engine = cls.__new__(cls)
        engine._serve(model)
        return engine

    def _serve(self, model: nn.Module) -> None:
        self.name = f"transformers {transformers.__version__}"
        self._model = model

    def _wide_head(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden.float(), self._model.lm_head.weight.float())

    @torch.no_grad()
    def generate(self, prompts: Tensor, max_tokens: int, stop: int | None) -> Rollouts:
        prompts = prompts.to(DEVICE)
        made = self._model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, max_new_tokens=max_tokens, eos_token_id=stop, pad_token_id=PAD,
            return_dict_in_generate=True, output_logits=True,
        )
        token_ids = made.sequences[:, prompts.shape[1] :].cpu()
        every = torch.stack(made.logits, 1).float().log_softmax(-1).cpu()
        found = every.gather(-1, token_ids[..., None])[..., 0]
        ended = torch.zeros_like(token_ids) if stop is None else (token_ids == stop).int()
        mask = ended.cumsum(1) - ended == 0
        short = max_tokens - token_ids.shape[1]
        return Rollouts(
            functional.pad(token_ids, (0, short), value=PAD),
            functional.pad(found.where(mask, 0), (0, short)), functional.pad(mask, (0, short)),
        )

    def load(self, state: State) -> None:
        self._model.load_state_dict(state)

    def parameters(self) -> Iterator[Tensor]:
        return self._model.parameters()

    def close(self) -> None:
        del self._model
