"""GRPO with TRL, a correction of this library, and a dump for ``iscorrect report``.

    python examples/trl_grpo.py Qwen/Qwen2.5-0.5B-Instruct output --engine vllm
    iscorrect report output/dump

Runs on a CPU too, given a small model: --engine transformers samples with ``generate``, which needs
no further package. The task is to add two numbers.
"""

import argparse
import random
import re
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from iscorrect import parse
from iscorrect.adapters.trl import CorrectedGRPO
from iscorrect.dumps import DumpWriter


class Trainer(CorrectedGRPO, GRPOTrainer):
    """TRL's trainer with corrected weights."""


def sums(size: int) -> Dataset:
    """Prompts and their answers."""
    numbers = random.Random(0)
    pairs = [(numbers.randint(1, 9), numbers.randint(1, 9)) for _ in range(size)]
    return Dataset.from_dict(
        {"prompt": [f"{a} + {b} =" for a, b in pairs], "answer": [a + b for a, b in pairs]}
    )


def correct(completions: list[str], answer: list[int], **_: object) -> list[float]:
    """1 where the last number is the sum, a little for any number."""
    numbers = [re.findall(r"\d+", text) for text in completions]
    return [
        0.0 if not found else 1.0 if int(found[-1]) == right else 0.1
        for found, right in zip(numbers, answer, strict=True)
    ]


@torch.no_grad()
def generate(prompts: list[str], trainer: Trainer) -> dict[str, list[list[float]]]:
    """Rollouts of ``generate`` and the log-probs that it sampled with."""
    tokenizer, config = trainer.processing_class, trainer.generation_config
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    # without checkpointing, under which a training model generates with no memory of its prompt
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        out = model.generate(
            **inputs.to(model.device), generation_config=config, return_dict_in_generate=True,
            output_scores=True,
        )
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    log_probs = torch.stack(out.scores, 1).float().log_softmax(-1).gather(-1, tokens[..., None])
    ended = (tokens == tokenizer.eos_token_id).cumsum(-1)
    lengths = ((ended - (tokens == tokenizer.eos_token_id).long()) == 0).sum(-1).tolist()
    return {
        "prompt_ids": tokenizer(prompts)["input_ids"],
        "completion_ids": [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)],
        "logprobs": [row[:n, 0].tolist() for row, n in zip(log_probs, lengths, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--correction", default="token-tis:cap=2", help="as for iscorrect compare")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()

    settings = GRPOConfig(
        output_dir=str(options.output), max_steps=options.steps, logging_steps=1,
        save_strategy="no", report_to=[], per_device_train_batch_size=8, num_generations=8,
        beta=0.0, top_k=0, max_completion_length=options.length, use_cpu=options.cpu,
        bf16=not options.cpu, use_vllm=options.engine == "vllm",
        vllm_mode="colocate", vllm_max_model_length=options.length + 64,
        vllm_gpu_memory_utilization=0.3, model_init_kwargs={"dtype": "float32"},
    )
    trainer = Trainer(
        model=options.model, reward_funcs=correct, args=settings, train_dataset=sums(1000),
        correction=parse(options.correction), dumps=DumpWriter(options.output / "dump"),
        rollout_func=generate if options.engine == "transformers" else None,
    )
    trainer.train()
    trainer.log_metrics("train", trainer.state.log_history[-2])


if __name__ == "__main__":
    main()
