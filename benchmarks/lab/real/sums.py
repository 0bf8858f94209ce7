"""The task: sums of two digits, right where the answer's last number is the sum."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from benchmarks.lab.real.model import ask
from benchmarks.lab.real.packed import Answers

LONGEST = 12
"""Tokens of an answer."""


class Sums:
    """All questions about a + b for a and b up to ``largest``, of one length each.

    Attributes:
        prompts: "n p".
        right: the sums.
    """

    def __init__(self, tokenizer, largest: int = 9):
        self._tokenizer = tokenizer
        pairs = [(a, b) for a in range(1, largest + 1) for b in range(1, largest + 1)]
        self.prompts = torch.tensor([
            ask(tokenizer, f"What is {a} + {b}? Answer with the number only.") for a, b in pairs
        ])
        self.right = [a + b for a, b in pairs]
        self.end = tokenizer.eos_token_id

    def rewards(self, which: list[int], answers: Answers) -> Tensor:
        """1 or 0 for each answer "g n" to the prompts of these numbers."""
        found = []
        for row, answer, mask in zip(which, answers.token_ids, answers.mask, strict=True):
            for ids, kept in zip(answer, mask, strict=True):
                text = self._tokenizer.decode(ids[kept], skip_special_tokens=True)
                numbers = re.findall(r"\d+", text)
                found.append(float(bool(numbers) and int(numbers[-1]) == self.right[row]))
        return torch.tensor(found).reshape(answers.mask.shape[:2])
