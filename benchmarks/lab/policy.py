"""A model, the precision that it computes in, and the log-probs that it gives."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.lab.tasks import END, PAD, START, VOCABULARY, Task
from iscorrect.head.linear import linear_log_probs

State = Mapping[str, Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where models live; tokens and log-probs stay on the CPU."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """How a policy is computed.

    Attributes:
        dtype: of weights and activations, or with ``autocast`` of the products alone.
        fp32_head: whether the logits stay in float32.
        autocast: weights and residual stream in float32, products in ``dtype``.
        attention: transformers' implementation.
        compiled: run through torch.compile.
    """

    dtype: str
    fp32_head: bool = False
    autocast: bool = False
    attention: str = "sdpa"
    compiled: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def name(self) -> str:
        parts = [("amp-" if self.autocast else "") + self.dtype]
        parts += [self.attention] if self.attention != "sdpa" else []
        parts += ["compiled"] if self.compiled else []
        parts += ["FP32 head"] if self.fp32_head and self.dtype != "fp32" else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Size:
    """Of a model: 128 × 2 has 0.5 M parameters, 768 × 12 about 100 M."""

    width: int = 128
    layers: int = 2

    def config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=self.width, intermediate_size=4 * self.width,
            num_hidden_layers=self.layers, num_attention_heads=self.width // 32,
            num_key_value_heads=max(1, self.width // 64), max_position_embeddings=1024,
            tie_word_embeddings=False, bos_token_id=START, eos_token_id=END, pad_token_id=PAD,
        )


def sharp(size: Size, seed: int) -> Qwen2ForCausalLM:
    """Random weights and a scaled head: peaked distributions from large activations, untrained."""
    torch.manual_seed(seed)
    config = size.config()
    config.initializer_range = config.hidden_size**-0.5
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.5)
    return model


def open_policy(path: Path, precision: Precision) -> Qwen2ForCausalLM:
    """A saved model in a precision; weights come in its dtype, or in float32 under autocast."""
    dtype = torch.float32 if precision.autocast else precision.torch_dtype
    model = Qwen2ForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=precision.attention
    )
    model.to(DEVICE).train(False)
    if precision.compiled:
        model.model.compile()
    return model


def log_probs(model: nn.Module, precision: Precision, ids: Tensor, answer: int) -> Tensor:
    """Log-probs "b t" of the last ``answer`` tokens of "b p+t", padding at the end allowed."""
    dtype = precision.torch_dtype
    ids = ids.to(DEVICE)
    with torch.autocast(DEVICE.type, dtype) if precision.autocast else nullcontext():
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[:, -answer:]
    weight = model.lm_head.weight
    if precision.autocast and not precision.fp32_head:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    head = torch.float32 if precision.fp32_head else dtype
    return linear_log_probs(hidden, weight, ids[:, -answer:], head_dtype=head).cpu()


def prompts_of(task: Task, n: int, seed: int) -> Tensor:
    """Different prompts, as long as the task has that many; "n p"."""
    generator = random.Random(seed)
    found = dict.fromkeys(tuple(task.problem(generator)[0]) for _ in range(4 * n))
    return torch.tensor(list(found)[:n])
