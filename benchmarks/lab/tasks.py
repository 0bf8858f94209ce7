"""Tasks whose answers a few lines of Python verify.

A problem is a prompt and an answer that ends with ``END``. All prompts of a task have one length,
so that a batch of them needs no padding.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

PAD, START, END, PLUS, EQUALS = range(10, 15)
OPENING, CLOSING = (15, 16, 17), (18, 19, 20)
VOCABULARY = 64
"""Larger than the symbols: unused ids are part of any real vocabulary."""


@dataclass(frozen=True)
class Task:
    """What is asked and what counts as an answer.

    Attributes:
        name: of the task.
        longest: tokens of the longest answer that can be right, END among them.
        problem: draws a prompt and one right answer.
        solves: whether an answer is right.
    """

    name: str
    longest: int
    problem: Callable[[random.Random], tuple[list[int], list[int]]]
    solves: Callable[[list[int], list[int]], bool]

    def stream(self, generator: random.Random, length: int) -> list[int]:
        """Problems and their answers one after the other, for training a model on."""
        ids: list[int] = []
        while len(ids) < length:
            prompt, answer = self.problem(generator)
            ids += prompt + answer
        return ids[:length]


def addition(digits: int = 4) -> Task:
    """a+b=, answered least digit first."""

    def numerals(number: int, width: int) -> list[int]:
        return [number // 10**i % 10 for i in range(width)]

    def answer_to(prompt: list[int]) -> list[int]:
        a, b = prompt[1 : 1 + digits], prompt[2 + digits : 2 + 2 * digits]
        total = sum((x + y) * 10**i for i, (x, y) in enumerate(zip(a, b, strict=True)))
        return [*numerals(total, digits + 1), END]

    def problem(generator: random.Random) -> tuple[list[int], list[int]]:
        a, b = (numerals(generator.randrange(10**digits), digits) for _ in range(2))
        prompt = [START, *a, PLUS, *b, EQUALS]
        return prompt, answer_to(prompt)

    return Task(f"add-{digits}", digits + 2, problem, lambda p, a: a == answer_to(p))


def sorting(digits: int = 8) -> Task:
    """Digits, answered in ascending order."""

    def problem(generator: random.Random) -> tuple[list[int], list[int]]:
        drawn = [generator.randrange(10) for _ in range(digits)]
        return [START, *drawn, EQUALS], [*sorted(drawn), END]

    def solves(prompt: list[int], answer: list[int]) -> bool:
        return answer == [*sorted(prompt[1:-1]), END]

    return Task(f"sort-{digits}", digits + 1, problem, solves)


def brackets(length: int = 24) -> Task:
    """The beginning of a word of three kinds of brackets, answered by ``length`` more that close all.

    Many answers are right, so a policy that has learnt the task still draws, and mismatch does not
    vanish as it does where one answer is right.
    """
    given = 6

    def depth(word: list[int]) -> list[int] | None:
        """Kinds still open, or None if a closing bracket does not fit."""
        stack: list[int] = []
        for token in word:
            if token in OPENING:
                stack.append(OPENING.index(token))
            elif token not in CLOSING or not stack or stack.pop() != CLOSING.index(token):
                return None
        return stack

    def problem(generator: random.Random) -> tuple[list[int], list[int]]:
        word: list[int] = []
        stack: list[int] = []
        for left in range(given + length, 0, -1):
            if stack and (len(stack) == left or generator.random() < 0.5):
                word.append(CLOSING[stack.pop()])
            else:
                stack.append(generator.randrange(len(OPENING)))
                word.append(OPENING[stack[-1]])
        return [START, *word[:given]], [*word[given:], END]

    def solves(prompt: list[int], answer: list[int]) -> bool:
        return (
            answer[-1:] == [END] and len(answer) == length + 1
            and depth(prompt[1:] + answer[:-1]) == []
        )

    return Task(f"brackets-{length}", length + 1, problem, solves)


TASKS = {"add": addition, "sort": sorting, "brackets": brackets}


def parse(name: str) -> Task:
    """The task of a name such as "add-4": what it is, and how long."""
    kind, _, size = name.partition("-")
    if kind not in TASKS or not size.isdigit():
        raise SystemExit(
            f"no task {name!r}: give one of {', '.join(TASKS)}, a dash and a length, as in add-4"
        )
    return TASKS[kind](int(size))
