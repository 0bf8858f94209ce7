"""The task: sums of two numbers, right where the answer's last number is the sum."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from benchmarks.lab.real.model import ask
from benchmarks.lab.real.packed import Answers

LONGEST = 12
"""Tokens of an answer."""
DIGITS = [(a, b) for a in range(1, 10) for b in range(1, 10)]
PAIRS = {
    "one digit": DIGITS,
    "two digits": random.Random(0).sample(
        [(a, b) for a in range(10, 50) for b in range(10, 50)], len(DIGITS)
    ),
}
"""What is to be added, by task; as many pairs in each."""


class Sums:
    """Questions about a + b, of one length each.

    Args:
        tokenizer: of the model.
        pairs: of a and b.

    Attributes:
        prompts: "n p".
        right: the sums.
    """

    def __init__(self, tokenizer, pairs: Iterable[tuple[int, int]] = DIGITS):
        pairs = [*pairs]
        self._piece = cache(lambda i: tokenizer.decode([i], skip_special_tokens=True))
        self.prompts = torch.tensor([
            ask(tokenizer, f"What is {a} + {b}? Answer with the number only.") for a, b in pairs
        ])
        self.right = [a + b for a, b in pairs]
        self.end = tokenizer.eos_token_id

    def rewards(self, which: Sequence[int], answers: Answers) -> Tensor:
        """1 or 0 for each answer "g n" to the prompts of these numbers."""
        found = []
        for row, answer, mask in zip(
            which, answers.token_ids.tolist(), answers.mask.tolist(), strict=True
        ):
            for ids, kept in zip(answer, mask, strict=True):
                text = "".join(self._piece(i) for i, ok in zip(ids, kept, strict=True) if ok)
                numbers = re.findall(r"\d+", text)
                found.append(float(bool(numbers) and int(numbers[-1]) == self.right[row]))
        return torch.tensor(found).reshape(answers.mask.shape[:2])
