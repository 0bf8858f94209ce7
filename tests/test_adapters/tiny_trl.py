"""A tiny model, a rollout engine that is a little wrong, and GRPO runs with them on a CPU."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

LENGTH = 6
WORDS = ["<pad>", "<eos>", *map(str, range(30))]


def save_model(path, dtype=torch.float32):
    """A Llama of 2 layers with a vocabulary of 32 words."""
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="0"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def reward(completions, **_):
    return [sum(map(int, text.split())) / 50 for text in completions]


def rollout(model, prompt_ids, noise=0.3):
    """Completions that depend on the prompts alone, and log-probs that are a little wrong."""
    completions, log_probs = [], []
    for index, prompt in enumerate(prompt_ids):
        generator = torch.Generator().manual_seed(1000 * prompt[-1] + index % 2)
        length = int(torch.randint(2, LENGTH + 1, (), generator=generator))
        tokens = torch.randint(2, len(WORDS), (length,), generator=generator)
        ids = torch.cat([torch.tensor(prompt), tokens])[None]
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        error = noise * torch.randn(length, generator=generator)
        completions.append(tokens.tolist())
        log_probs.append((exact + error).tolist())
    return completions, log_probs


class SimulatedEngine:
    """Makes a GRPOTrainer believe that vLLM sampled."""

    noise = 0.3

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.use_vllm = self.args.use_vllm = True
        self.losses = []

    def _generate_single_turn(self, prompt_ids, *_, **__):
        return rollout(self.accelerator.unwrap_model(self.model), prompt_ids, self.noise)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


class Plain(SimulatedEngine, GRPOTrainer):
    pass


def arguments(output, **changes):
    defaults = dict(
        output_dir=str(output), use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        max_steps=3, logging_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        num_generations=2, max_completion_length=LENGTH, learning_rate=1e-3, seed=0,
        # Some gradients are zero but for rounding, which a small epsilon would turn into steps.
        adam_epsilon=1e-5, disable_tqdm=True, beta=0.0, temperature=1.0, shuffle_dataset=False,
        top_k=0,
    )
    return GRPOConfig(**(defaults | changes))


def dataset():
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [f"{i} {i + 1}" for i in range(20)]})


def run(trainer_class, path, output, *, changes=None, **keywords):
    """Train; the trainer, with what it lost at every micro-step."""
    torch.manual_seed(0)
    trainer = trainer_class(
        model=path, reward_funcs=reward, args=arguments(output, **(changes or {})),
        train_dataset=dataset(), **keywords,
    )
    trainer.train()
    return trainer
