"""Is the diagnosis right? Faults injected on purpose, clean rollouts, and how often it says what.

    python -m benchmarks diagnose faults [--models 10 11 12 13] [--trials 32] [--part 1/4]
    python -m benchmarks diagnose clean  [--rollouts DIR] [--dumps DIR] [--trials 24]
    python -m benchmarks diagnose tables

Clean dumps are real rollouts of a real engine under every pair of precisions, and a small
transformer in two implementations; faults happen inside that transformer's engine, sampler, or
trainer, or, where they are faults of a file, in the real rollouts too. A trial is a bootstrap
sample of whole prompts (all answers to them) of the size asked for. What was counted lies in
``benchmarks/records/diagnose``; ``tables`` writes the page from it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.faulty import (
    PROMPT,
    VOCABULARY,
    Scenario,
    Stack,
    Weights,
    attention_scaled,
    low_rank,
    min_p,
    noisy,
    plain,
    prompts_of,
    quantised,
    random_weights,
    repetition_penalty,
    roll_out,
    scaled_head,
    scored_after,
    stretched,
    tempered,
    top_k,
    top_p,
    updated,
)
from iscorrect.cli.rollouts import MODELS, PAIRS as SHIPPED_PAIRS, shipped_rollouts
from iscorrect.diagnose import NOISE, diagnose
from iscorrect.dumps import LogProbDump, concatenate, read_dump

LENGTH, ANSWERS = 128, 4
BF16 = Stack(torch.bfloat16, fused=True), Stack(torch.bfloat16, fused=False)
PAIRS = ("float32", "bfloat16", "float16", "amp_bf16", "amp_fp16", "bfloat16_eager")
RECORDS = Path(__file__).parent / "records" / "diagnose"
PAGE = Path(__file__).parents[1] / "docs" / "diagnosis.md"
LOOKED_AT = (0, 1)
"""Seeds of the weights that thresholds were set on."""


@dataclass(frozen=True)
class Case:
    """One fault at one strength."""

    cause: str
    strength: str
    make: Callable[[], list[LogProbDump]]  # one for each model
    practical: bool = False


def shipped() -> dict[str, LogProbDump]:
    """The package's rollouts by name."""
    dumps = {}
    for model, (engine, trainer) in itertools.product(MODELS, SHIPPED_PAIRS):
        dump = shipped_rollouts(model, engine, trainer)
        dumps[f"{model}, {engine} / {trainer}"] = replace(dump, group=torch.arange(len(dump)))
    return dumps


def clean_rollouts(directory: Path) -> dict[str, LogProbDump]:
    """The same from files that also hold tokens, the trainer's entropy, and autocast."""
    dumps = {}
    for path in sorted(directory.glob("*_rollout_*.npz")):
        arrays = np.load(path)
        model, engine = path.stem.split("_rollout_")
        for pair in PAIRS:
            def tensor(name: str, arrays: object = arrays) -> Tensor:
                return torch.from_numpy(arrays[name])  # type: ignore[index]

            dumps[f"{model}, {engine} / {pair}"] = LogProbDump(
                rollout_log_probs=tensor("rollout_log_probs"),
                old_log_probs=tensor(f"trainer_log_probs_{pair}"),
                entropy=tensor(f"trainer_entropy_{pair}"),
                token_ids=tensor("token_ids").long(),
                mask=torch.ones(tensor("token_ids").shape, dtype=torch.bool),
                group=torch.arange(len(tensor("token_ids"))),
            )
    return dumps


def clean_dumps(directory: Path) -> dict[str, LogProbDump]:
    """Dumps of healthy runs by the names of their files."""
    dumps = {}
    for path in sorted(directory.glob("*.npz")):
        dump = read_dump(path)
        dumps[f"{directory.name}, {path.stem.replace('-', ' / ')}"] = replace(
            dump, group=torch.arange(len(dump))
        )
    return dumps


def resample(dump: LogProbDump, sequences: int, seed: int) -> LogProbDump:
    """A bootstrap sample of whole groups, each copy a group of its own."""
    rng = np.random.default_rng(seed)
    assert dump.group is not None
    groups = dump.group.numpy()
    members = {g: np.flatnonzero(groups == g) for g in np.unique(groups)}
    each = len(groups) // len(members)
    drawn = rng.choice(list(members), size=-(-sequences // each))
    rows = np.concatenate([members[g] for g in drawn])[:sequences]
    sample = dump.rows(torch.from_numpy(rows))
    return replace(sample, group=torch.arange(sequences) // each)


class Lab:
    """The small transformer, with several sets of random weights."""

    def __init__(self, sequences: int, seeds: Sequence[int]) -> None:
        self.sequences = sequences
        self.seeds = tuple(seeds)
        self.models = [random_weights(seed) for seed in seeds]

    def __call__(self, scenario: Scenario) -> list[LogProbDump]:
        return [
            roll_out(scenario, weights=w, sequences=self.sequences, length=LENGTH, seed=100 + i)
            for i, w in enumerate(self.models)
        ]

    def after(self, rate: float, steps: int = 1) -> Callable[[Weights], Weights]:
        """Weights as they were before an update of this size, for each model."""
        memory: dict[int, Weights] = {}

        def older(weights: Weights) -> Weights:
            if id(weights) not in memory:
                memory[id(weights)] = updated(weights, rate, seed=7, steps=steps)
            return memory[id(weights)]

        return older


def _wrong(share: float) -> Callable[[Tensor], Tensor]:
    def change(tokens: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(3)
        which = torch.rand(tokens.shape, generator=g) < share
        return torch.where(which, torch.randint(0, VOCABULARY, tokens.shape, generator=g), tokens)

    return change


def _inserted(every: int) -> Callable[[Tensor], Tensor]:
    def change(tokens: Tensor) -> Tensor:
        tokens = tokens.clone()
        for i in range(0, len(tokens), every):
            at = 20 + (17 * i) % 60
            tokens[i, at:] = tokens[i, at:].roll(-1)
        return tokens

    return change


def _another_prompt(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, 3:], tokens[:, :3]], dim=1)


def shifted(dump: LogProbDump, lag: int) -> LogProbDump:
    return replace(dump, rollout_log_probs=dump.rollout_log_probs.roll(lag, dims=1))


def zero_filled(dump: LogProbDump, share: float) -> LogProbDump:
    g = torch.Generator().manual_seed(5)
    missing = torch.rand(dump.mask.shape, generator=g) < share
    return replace(dump, rollout_log_probs=dump.rollout_log_probs.masked_fill(missing, 0.0))


def stored(dump: LogProbDump, dtype: torch.dtype) -> LogProbDump:
    return replace(dump, rollout_log_probs=dump.rollout_log_probs.to(dtype).float())


def with_environment(dump: LogProbDump, length: int, scored: bool) -> LogProbDump:
    """A tool's answer in the middle of each fourth answer, inside the mask.

    The engine reports zeros for it, or scores it as a prompt; its tokens are unlikely to both.
    """
    g = torch.Generator().manual_seed(5)
    old, rollout = dump.old_log_probs.clone(), dump.rollout_log_probs.clone()
    for i in range(0, len(old), 4):
        at = 16 + int(torch.randint(0, 64, (), generator=g))
        noise = rollout[i, at : at + length] - old[i, at : at + length]
        old[i, at : at + length] = -8.5 - 2 * torch.rand(length, generator=g)
        rollout[i, at : at + length] = old[i, at : at + length] + noise if scored else 0.0
    return replace(  # a prompt's candidates are not asked for
        dump, old_log_probs=old, rollout_log_probs=rollout, top_k_ids=None, top_k_log_probs=None
    )


def over_steps(lab: Lab, rates: list[float]) -> list[LogProbDump]:
    """One batch for each step, its engine older by so much."""
    small = Lab(max(8, lab.sequences // len(rates)), lab.seeds)
    by_step = []
    for step, rate in enumerate(rates):
        batches = small(Scenario(engine_weights=small.after(rate)) if rate else Scenario())
        by_step.append([
            replace(b, step=torch.full((len(b),), step), group=b.group + 1000 * step)
            for b in batches if b.group is not None
        ])
    return [concatenate(steps) for steps in zip(*by_step, strict=True)]


def served_by(
    lab: Lab, other: Scenario, share: float, named: bool = False
) -> list[LogProbDump]:
    """Some of the sequences from another engine; ``named`` says which engine served which."""
    dumps = []
    for i, (good, bad) in enumerate(zip(lab(Scenario()), lab(other), strict=True)):
        g = torch.Generator().manual_seed(i)
        chosen = torch.zeros(len(good), dtype=torch.bool)
        chosen[torch.randperm(len(good), generator=g)[: round(share * len(good))]] = True
        picked = {
            name: torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), getattr(bad, name), x)
            for name, x in good.given().items()
        }
        count = round(1 / share)
        engine = torch.where(chosen, 0, 1 + torch.arange(len(good)) % (count - 1))
        dump = LogProbDump(**picked)
        dumps.append(replace(dump, engine=engine) if named else dump)
    return dumps


def continued(lab: Lab, rate: float, cut: int, dated: bool) -> list[LogProbDump]:
    """Answers that were begun under older weights; ``dated`` gives each token's version."""
    dumps = lab(Scenario(
        engine_weights=lab.after(rate), later_weights=lambda weights: weights, cut=cut
    ))
    version = torch.where(torch.arange(LENGTH) < cut, 3, 5).expand(len(dumps[0]), LENGTH)
    step = torch.full((len(dumps[0]),), 5)
    return [replace(d, version=version, step=step) if dated else d for d in dumps]


def stop_tokens(dump: LogProbDump, low: float, value: float = 0.0) -> LogProbDump:
    """Answers that end early, their last token's log-prob a placeholder of the engine's."""
    g = torch.Generator().manual_seed(5)
    b, t = dump.mask.shape
    lengths = torch.randint(t // 2, t + 1, (b, 1), generator=g)
    last = torch.arange(t) == lengths - 1
    p = (low + (0.97 - low) * torch.rand(b, 1, generator=g)).log()
    return replace(
        dump, mask=torch.arange(t) < lengths, entropy=None, varentropy=None, top_k_ids=None,
        top_k_log_probs=None, old_log_probs=torch.where(last, p, dump.old_log_probs),
        rollout_log_probs=torch.where(last, value, dump.rollout_log_probs),
    )


def sentinels(dump: LogProbDump, share: float, value: float) -> LogProbDump:
    g = torch.Generator().manual_seed(5)
    missing = torch.rand(dump.mask.shape, generator=g) < share
    return replace(dump, rollout_log_probs=dump.rollout_log_probs.masked_fill(missing, value))


def lowered(dump: LogProbDump, share: float, nats: float) -> LogProbDump:
    """The engine's log-probs too low on some tokens, each by another amount."""
    g = torch.Generator().manual_seed(5)
    some = torch.rand(dump.mask.shape, generator=g) < share
    by = nats * (0.75 + 0.5 * torch.rand(dump.mask.shape, generator=g))
    return replace(dump, rollout_log_probs=dump.rollout_log_probs - some * by)


def closed_turns(dump: LogProbDump) -> LogProbDump:
    """Turns of 32 tokens, the last of each with a placeholder."""
    t = dump.mask.shape[1]
    ends = torch.arange(t) % 32 == 31
    turn = (torch.arange(t) // 32).expand(dump.mask.shape)
    return replace(
        dump, turn=turn, rollout_log_probs=dump.rollout_log_probs.masked_fill(ends, 0.0)
    )


def first_candidates(dump: LogProbDump, listed: bool) -> LogProbDump:
    """The first candidate's log-prob in place of the sampled token's."""
    assert dump.top_k_log_probs is not None
    other = {} if listed else {"top_k_ids": None, "top_k_log_probs": None}
    return replace(dump, rollout_log_probs=dump.top_k_log_probs[..., 0], **other)


def entropy_of(dump: LogProbDump, change: Callable[[Tensor], Tensor]) -> LogProbDump:
    assert dump.entropy is not None
    return replace(dump, entropy=change(dump.entropy))


def leaking(lab: Lab) -> list[LogProbDump]:
    """Rows packed by fours; the last eight tokens of a neighbour are attended to."""
    dumps = []
    for i, (weights, dump) in enumerate(zip(lab.models, lab(Scenario()), strict=True)):
        prompts = prompts_of(len(dump), torch.Generator().manual_seed(100 + i))
        assert dump.token_ids is not None
        tokens = torch.cat([prompts, dump.token_ids], dim=1)
        leaked = scored_after(weights, tokens.roll(1, 0)[:, -8:], tokens, start=-8)
        pack = torch.arange(len(dump)) % 4
        dumps.append(replace(dump, pack=pack, old_log_probs=torch.where(
            pack[:, None] > 0, leaked[:, PROMPT - 1 :], dump.old_log_probs
        )))
    return dumps


def other_histories(lab: Lab, told: bool) -> list[LogProbDump]:
    """Turns of 32 tokens; from the second on the trainer sees a first one without eight tokens."""
    dumps = []
    for i, (weights, dump) in enumerate(zip(lab.models, lab(Scenario()), strict=True)):
        prompts = prompts_of(len(dump), torch.Generator().manual_seed(100 + i))
        assert dump.token_ids is not None
        tokens = torch.cat([prompts, dump.token_ids], dim=1)
        first = PROMPT + 31  # the last of the first turn is the context of the second's first
        before = torch.cat([tokens[:, :PROMPT], tokens[:, PROMPT + 8 : first]], dim=1)
        later = scored_after(weights, before, tokens[:, first:], start=0)
        old = torch.cat([dump.old_log_probs[:, :32], later], dim=1)
        turn = (torch.arange(LENGTH) // 32).expand(len(dump), LENGTH)
        other = replace(dump, old_log_probs=old, entropy=None, varentropy=None)
        dumps.append(replace(other, turn=turn) if told else other)
    return dumps


def prescribed(dump: LogProbDump, length: int, scored: bool) -> LogProbDump:
    """Every answer begins with text that the request gave; the engine scores it, or says 0."""
    g = torch.Generator().manual_seed(5)
    old, rollout = dump.old_log_probs.clone(), dump.rollout_log_probs.clone()
    noise = (rollout - old)[:, :length]
    old[:, :length] = -5 - 5 * torch.rand(len(old), length, generator=g)
    rollout[:, :length] = old[:, :length] + noise if scored else 0.0
    return replace(
        dump, old_log_probs=old, rollout_log_probs=rollout, top_k_ids=None, top_k_log_probs=None
    )


def drafted(lab: Lab, share: float) -> list[LogProbDump]:
    """Of accepted tokens the engine reports what a small draft model thought of them."""
    dumps = []
    for i, (weights, dump) in enumerate(zip(lab.models, lab(Scenario()), strict=True)):
        prompts = prompts_of(len(dump), torch.Generator().manual_seed(100 + i))
        assert dump.token_ids is not None
        tokens = torch.cat([prompts, dump.token_ids], dim=1)
        draft = scored_after(quantised(3)(weights), tokens[:, :1], tokens[:, 1:], start=0)
        g = torch.Generator().manual_seed(i)
        accepted = torch.rand(dump.mask.shape, generator=g) < share
        dumps.append(replace(
            dump, top_k_ids=None, top_k_log_probs=None, rollout_log_probs=torch.where(
                accepted, draft[:, -LENGTH:], dump.rollout_log_probs
            ),
        ))
    return dumps


def candidates_of(dump: LogProbDump, lag: int) -> LogProbDump:
    """Each position lists the candidates of another."""
    assert dump.top_k_ids is not None and dump.top_k_log_probs is not None
    return replace(dump, top_k_ids=dump.top_k_ids.roll(lag, 1),
                   top_k_log_probs=dump.top_k_log_probs.roll(lag, 1))


def cases(lab: Lab, real: LogProbDump | None) -> Iterator[Case]:
    """Every cause at several strengths."""
    yield from of_the_sampler(lab)
    yield from of_the_weights(lab)
    yield from of_the_tokens(lab)
    healthy = lab(Scenario())
    yield from of_the_fields(healthy)
    yield from of_rivals(lab, healthy)
    yield from of_the_values("transformer", healthy)
    if real is not None:
        yield from of_the_values("real", [real])


def _case(
    lab: Lab, cause: str, strength: str, scenario: Scenario, practical: bool = False
) -> Case:
    return Case(cause, strength, partial(lab, scenario), practical)


def of_the_sampler(lab: Lab) -> Iterator[Case]:
    case = partial(_case, lab)
    honest = "temperature: engine divides its logits, trainer does not"
    for tau in (0.98, 0.95, 0.9, 0.7):
        yield case(honest, f"τ = {tau}", Scenario(sampler=tempered(tau)), tau == 0.9)
    for tau in (0.98, 0.9):
        yield case("temperature: trainer divides its logits, engine does not", f"τ = {tau}",
                   Scenario(trainer_temperature=tau), tau == 0.9)
    for tau in (0.98, 0.9, 0.7):
        yield case(
            "temperature: raw log-probs reported, tempered sampler and trainer", f"τ = {tau}",
            Scenario(sampler=tempered(tau), report=plain, trainer_temperature=tau), tau == 0.9,
        )
    hidden = "raw log-probs reported by a tempered or truncated sampler"
    for tau in (0.98, 0.95, 0.9):
        yield case(hidden, f"τ = {tau}", Scenario(sampler=tempered(tau), report=plain), tau == 0.9)
    yield case(hidden, "top-p = 0.95", Scenario(sampler=top_p(0.95), report=plain), True)
    yield case(hidden, "penalty 1.1", Scenario(sampler=repetition_penalty(1.1), report=plain))
    cut = "top-p/top-k truncation"
    for mass in (0.999, 0.99, 0.95, 0.8):
        yield case(cut, f"top-p = {mass}", Scenario(sampler=top_p(mass)), mass == 0.95)
    for count in (200, 50):
        yield case(cut, f"top-k = {count}", Scenario(sampler=top_k(count)), count == 50)
    yield case(cut, "min-p = 0.01", Scenario(sampler=min_p(0.01)))
    for penalty in (1.01, 1.02, 1.05, 1.2):
        yield case("repetition penalty", f"{penalty}",
                   Scenario(sampler=repetition_penalty(penalty)), penalty == 1.05)


def of_the_weights(lab: Lab) -> Iterator[Case]:
    engine, trainer = BF16
    case = partial(_case, lab)
    for rate in (2e-5, 5e-5, 2e-4):
        yield case("stale weights", f"one step, {rate:g} per weight",
                   Scenario(engine_weights=lab.after(rate)), rate == 2e-4)
    yield Case("stale weights", "one step of eight",
               lambda: over_steps(lab, [0, 0, 0, 2e-4, 0, 0, 0, 0]))
    yield Case("weights never synchronised", "eight steps",
               lambda: over_steps(lab, [0, 5e-5, 1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4, 3.5e-4]))
    for rate in (1e-4, 2e-4, 1e-3):
        yield case("stale prefix cache", f"half the prompts, {rate:g} per weight",
                   Scenario(prompt_weights=lab.after(rate)), rate == 1e-3)
    for bits in (8, 6, 4):
        yield case("quantised rollout", f"{bits} bits", Scenario(engine_weights=quantised(bits)),
                   bits == 8)
    for name, stack in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        experts = Stack(stack, fused=True, experts=True)
        yield case("heavy tail, as from MoE routing", f"two experts, {name}",
                   Scenario(engine=experts, trainer=replace(experts, fused=False)),
                   name == "bfloat16")
    yield case("16-bit LM head in the engine", "bfloat16",
               Scenario(engine=replace(engine, head=torch.bfloat16)), True)
    yield case("16-bit LM head in the trainer", "bfloat16",
               Scenario(trainer=replace(trainer, head=torch.bfloat16)), True)

    yield Case("updates lost in the engine's number format", "twelve steps, level from the fifth",
               lambda: over_steps(lab, [0, 5e-5, 1e-4, 1.5e-4, *[2e-4] * 8]), True)
    for rate in (5e-5, 2e-4):
        stale = Scenario(engine_weights=lab.after(rate))
        for share in (1 / 8, 1 / 4):
            yield Case("one engine or rank of many", f"1 of {1 / share:.0f}, {rate:g} per weight",
                       partial(served_by, lab, stale, share), rate == 2e-4)
        yield Case("one engine or rank of many", f"1 of 4 by name, {rate:g} per weight",
                   partial(served_by, lab, stale, 1 / 4, True), rate == 2e-4)
    yield Case("one engine or rank of many", "1 of 4 by name, 4 bits", partial(
        served_by, lab, Scenario(engine_weights=quantised(4)), 1 / 4, True), True)
    yield Case("stale weights", "versions inside answers, dated, 0.0002 per weight",
               partial(continued, lab, 2e-4, 48, True), True)
    yield Case("weight versions inside an answer", "undated, 0.0002 per weight",
               partial(continued, lab, 2e-4, 48, False), True)
    yield case("another model definition, by position", "pressed by 1.2 from the 64th on",
               Scenario(trainer_weights=stretched(64, 1.2)), True)
    for factor in (1.02, 1.1):
        yield case("another model definition", f"attention scale × {factor}",
                   Scenario(trainer_weights=attention_scaled(factor)))
    for size in (0.05, 0.2):
        yield case("an adapter not served or not merged", f"rank 4, {size} of the weights",
                   Scenario(engine_weights=low_rank(4, size)))
    yield case("a cache of the shared system prompt that outlives the weights", "0.001 per weight",
               Scenario(prompt_weights=lab.after(1e-3), prompts_affected=1))


def of_the_tokens(lab: Lab) -> Iterator[Case]:
    case = partial(_case, lab)
    yield case("wrong prompt template", "halves swapped", Scenario(prompt=_another_prompt), True)
    yield case("wrong prompt template", "first token",
               Scenario(prompt=lambda p: torch.cat([p[:, :1] * 0 + 7, p[:, 1:]], dim=1)))
    for share in (0.002, 0.01):
        yield case("wrong tokens", f"{share:.1%}", Scenario(tokens=_wrong(share)), share == 0.01)
    for every in (16, 4):
        yield case("different tokens from a position on", f"1 sequence in {every}",
                   Scenario(tokens=_inserted(every)), every == 4)
    for bits in (8, 6):
        yield case("two passes of the trainer that disagree", f"{bits}-bit weights in the second",
                   Scenario(second_weights=quantised(bits)), bits == 6)
    yield case("candidates reported before temperature and penalties, the sampled token after",
               "τ = 0.9", Scenario(sampler=tempered(0.9), trainer_temperature=0.9,
                                   candidates=plain), True)
    yield Case("state that leaks between neighbours of a packed row", "eight tokens",
               partial(leaking, lab), True)
    yield Case("conversation histories rendered differently", "eight tokens, turns given",
               partial(other_histories, lab, True), True)
    yield Case("conversation histories rendered differently", "eight tokens, turns not given",
               partial(other_histories, lab, False))


def of_the_fields(healthy: list[LogProbDump]) -> Iterator[Case]:
    yield Case("log-probs of another candidate of the position", "the first, candidates given",
               partial(_each, healthy, lambda d: first_candidates(d, True)), True)
    yield Case("log-probs of another candidate of the position", "the first",
               partial(_each, healthy, lambda d: first_candidates(d, False)))
    yield Case("entropy of another position", "of the next", partial(
        _each, healthy, lambda d: entropy_of(d, lambda h: h.roll(-1, dims=1))), True)
    yield Case("entropy in other units or of other logits", "bits", partial(
        _each, healthy, lambda d: entropy_of(d, lambda h: h / math.log(2))), True)
    yield Case("entropy in other units or of other logits", "always 0", partial(
        _each, healthy, lambda d: entropy_of(d, torch.zeros_like)), True)
    yield Case("end-of-turn tokens added by the template", "four turns",
               partial(_each, healthy, closed_turns), True)


def of_rivals(lab: Lab, healthy: list[LogProbDump]) -> Iterator[Case]:
    """Causes that a dump cannot tell from others: they are named beside these, with a control."""
    case = partial(_case, lab)
    yield case("another scale of the logits", "× 1.1 in the engine",
               Scenario(engine_weights=scaled_head(1.1)), True)
    yield case("kernels that differ by more than 16-bit rounding", "logits off by 0.5",
               Scenario(sampler=noisy(0.5)), True)
    yield Case("engine and trainer that agree to the bit", "all", partial(
        _each, healthy, lambda d: replace(d, old_log_probs=d.rollout_log_probs)), True)
    yield case("a sampler that keeps one token", "top-k = 1", Scenario(sampler=top_k(1)), True)
    for rate in (5e-5, 2e-4):
        yield case("log_probs taken after optimizer steps", f"one step, {rate:g} per weight",
                   Scenario(second_weights=lab.after(rate)), rate == 2e-4)
    yield Case("sequences preempted and resumed", "1 answer in 4, 4 bits from its 48th token",
               partial(served_by, lab, Scenario(later_weights=quantised(4), cut=48), 1 / 4), True)
    yield Case("a part of the batch from elsewhere", "1 answer in 8, other weights",
               partial(served_by, lab, Scenario(engine_weights=lab.after(1e-3)), 1 / 8), True)
    yield Case("candidates of another position", "of the next", partial(
        _each, healthy, lambda d: candidates_of(d, -1)), True)
    for share in (0.1, 0.7):
        yield Case("speculative decoding that reports the draft's log-probs",
                   f"{share:.0%} of tokens", partial(drafted, lab, share), share == 0.7)
    for scored in (False, True):
        yield Case("forced or prefilled tokens in the mask",
                   f"16 tokens, {'scored' if scored else 'zeros'}",
                   partial(_each, healthy, lambda d, s=scored: prescribed(d, 16, s)), True)


def of_the_values(where: str, dumps: list[LogProbDump]) -> Iterator[Case]:
    for lag in (1, -1):
        yield Case("log-probs shifted against each other", f"{lag:+d}, {where}",
                   partial(_each, dumps, lambda d, k=lag: shifted(d, k)), True)
    for share in (0.001, 0.01):
        yield Case("missing values filled with a constant", f"{share:.1%}, {where}",
                   partial(_each, dumps, lambda d, s=share: zero_filled(d, s)), share == 0.01)
    for low in (0.01, 0.55):
        yield Case("stop token appended, not sampled", f"of probability {low:g} up, {where}",
                   partial(_each, dumps, lambda d, p=low: stop_tokens(d, p)), True)
    for value, share in ((-9999.0, 5e-4), (-100.0, 0.01), (-1.0, 0.01)):
        yield Case("a sentinel in place of −inf", f"{value:g} on {share:.2%}, {where}",
                   partial(_each, dumps, lambda d, s=share, v=value: sentinels(d, s, v)),
                   True)
    for share, nats in ((0.002, 3.0), (0.01, 1.0), (0.01, 8.0)):
        yield Case("values lost or overwritten on one side",
                   f"{nats:g} nats lower on {share:.1%}, {where}",
                   partial(_each, dumps, lambda d, s=share, n=nats: lowered(d, s, n)),
                   share == 0.01)
    yield Case("negative log-likelihoods in place of log-probs", where, partial(
        _each, dumps, lambda d: replace(d, rollout_log_probs=-d.rollout_log_probs)), True)
    yield Case("one side copied from the other", f"all, {where}", partial(
        _each, dumps, lambda d: replace(d, old_log_probs=d.rollout_log_probs)), True)
    for dtype in (torch.bfloat16, torch.float16):
        yield Case("log-probs stored in 16 bits", f"{str(dtype)[6:]}, {where}",
                   partial(_each, dumps, lambda d, t=dtype: stored(d, t)), True)
    for scored in (False, True):
        yield Case(
            "environment tokens in the mask",
            f"12 tokens in 1 answer of 4, {'scored' if scored else 'zeros'}, {where}",
            partial(_each, dumps, lambda d, s=scored: with_environment(d, 12, s)), True,
        )


def _each(
    dumps: list[LogProbDump], spoil: Callable[[LogProbDump], LogProbDump]
) -> list[LogProbDump]:
    return [spoil(dump) for dump in dumps]


def interval(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.96, hits / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    return max(0.0, middle - half), min(1.0, middle + half)


FAULTS = (
    "models", "cause", "strength", "practical", "tokens", "draws", "first", "named", "instead"
)
CLEAN = ("models", "rollouts", "tokens", "draws", "false", "said")


def count_faults(
    lab: Lab, real: LogProbDump | None, *, trials: int, starred: bool, part: tuple[int, int],
    record: Path,
) -> None:
    """How often each fault is named first, and at all; every size, the models taking turns."""
    models = " ".join(map(str, lab.seeds))
    sizes = [lab.sequences // 8, lab.sequences // 4, lab.sequences // 2, lab.sequences]
    chosen = (case for case in cases(lab, real) if case.practical or not starred)
    for i, case in enumerate(chosen):
        if i % part[1] != part[0] - 1:
            continue
        dumps = case.make()
        for size in sizes:
            firsts: Counter[str] = Counter()
            named = 0
            for trial in range(trials):
                seed = 100_000 + 1000 * i + trial
                findings = diagnose(resample(dumps[trial % len(dumps)], size, seed))
                firsts[findings[0].cause] += 1
                named += any(c.name == case.cause for f in findings for c in f.causes)
            others = "; ".join(f"{c} ({n})" for c, n in firsts.most_common() if c != case.cause)
            append(record, FAULTS, (
                models, case.cause, case.strength, int(case.practical), size * LENGTH, trials,
                firsts[case.cause], named, others,
            ))
        _progress(f"{case.cause}, {case.strength}: {firsts[case.cause]} of {trials}; {others}")


def count_clean(
    lab: Lab, rollouts: dict[str, LogProbDump], *, trials: int, record: Path
) -> None:
    """How often anything but noise is said of clean dumps, and of draws from them."""
    models = " ".join(map(str, lab.seeds))
    expected = dict(rollouts)
    for name in ("bfloat16", "float16", "float32"):
        dtype = getattr(torch, name)
        healthy = Scenario(engine=Stack(dtype, fused=True), trainer=Stack(dtype, fused=False))
        for seed, dump in zip(lab.seeds, lab(healthy), strict=True):
            expected[f"transformer {seed}, {name} / {name}"] = dump
    for i, (name, dump) in enumerate(expected.items()):
        false: Counter[str] = Counter()
        for trial in range(trials):
            found = diagnose(resample(dump, len(dump), 10_000 * i + trial))
            wrong = [f.pattern for f in found if f.pattern != NOISE]
            false.update(wrong[:1])
        (said, *_) = diagnose(dump)
        append(record, CLEAN, (
            models, name, dump.num_tokens, trials, false.total(),
            said.evidence if said.pattern == NOISE else said.pattern,
        ))
        _progress(f"{name}: {false.total()} of {trials} {dict(false) or ''}")


def append(path: Path, header: Sequence[str], row: Sequence[object]) -> None:
    """Add a row to a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(header)
        writer.writerow(row)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a record; a part that was run again replaces what it said before."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = ("models", "cause", "strength", "rollouts", "tokens")
    return list({tuple(row.get(k) for k in keys): row for row in rows}.values())


def tables() -> Iterator[tuple[str, str]]:
    """The tables of the page by name, in Markdown, from the records."""
    clean = read(RECORDS / "clean.csv")
    draws, false = (sum(int(r[k]) for r in clean) for k in ("draws", "false"))
    # draws from one dump are not independent: the interval is over dumps
    wrong = sum(int(r["false"]) > 0 for r in clean)
    low, high = interval(wrong, len(clean))
    yield "clean", "\n".join([
        f"{draws} draws from {len(clean)} clean dumps: {false} false findings"
        f" ({false / draws:.2%}); dumps that have one: {wrong} (95 % interval {low:.1%} to"
        f" {high:.1%}).", "",
        "| rollout / trainer | tokens | said of the whole | false findings in draws |",
        "|---|---|---|---|",
        *(f"| {r['rollouts']} | {int(r['tokens']):,} | {r['said']} | {r['false']} / {r['draws']} |"
          for r in clean),
    ])
    faults = read(RECORDS / "faults.csv")
    looked_at = " ".join(map(str, LOOKED_AT))
    held_out = [r for r in faults if r["models"] != looked_at]
    sizes = sorted({int(r["tokens"]) for r in faults})
    cells: dict[tuple[str, ...], dict[int, dict[str, str]]] = {}
    for r in held_out:
        mark = " *" if int(r["practical"]) else ""
        key = r["cause"], r["strength"] + mark
        cells.setdefault(key, {})[int(r["tokens"])] = r
    yield "power", "\n".join([
        "| cause | strength | " + " | ".join(f"{n:,}" for n in sizes) + " | named |",
        "|---|---|" + "---|" * (len(sizes) + 1),
        *(f"| {cause} | {strength} | "
          + " | ".join(_share(of.get(n), "first") for n in sizes)
          + f" | {_share(of.get(sizes[-1]), 'named')} |"
          for (cause, strength), of in cells.items()),
    ])
    lines = ["| weights | counts of starred faults | draws | right cause first | named at all |",
             "|---|---|---|---|---|"]
    for name, rows in (("held out", held_out),
                       ("looked at", [r for r in faults if r["models"] == looked_at])):
        starred = [r for r in rows if int(r["practical"]) and int(r["tokens"]) == sizes[-1]]
        n = sum(int(r["draws"]) for r in starred)
        if not n:
            lines.append(f"| {name} | not run | – | – | – |")
            continue
        models = "; ".join(sorted({r["models"] for r in starred}))
        hits = [sum(int(r[k]) for r in starred) for k in ("first", "named")]
        lines.append(
            f"| {name} (seeds {models}) | {len(starred)} | {n} | "
            + " | ".join(f"{h / n:.1%}" for h in hits) + " |"
        )
    missed = [r for r in held_out if int(r["practical"]) and int(r["tokens"]) == sizes[-1]
              and int(r["first"]) < int(r["draws"])]
    yield "confusion", "\n".join([
        *lines, "", "| injected, held-out weights | seeds | first | named | first instead |",
        "|---|---|---|---|---|",
        *(f"| {r['cause']}, {r['strength']} | {r['models']} | {_share(r, 'first')} |"
          f" {_share(r, 'named')} | {r['instead']} |" for r in missed),
    ])
    yield "real", real_table(RECORDS / "real.csv")


def real_table(record: Path) -> str:
    """How faults on the real model are named, by the seed of the prompts."""
    if not record.exists():
        return "No record of `python -m benchmarks.lab.real faults`."
    rows = read(record)
    whose = list(dict.fromkeys(r["models"] for r in rows))
    cells: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for r in rows:
        mark = " *" if int(r["practical"]) and r["cause"] != "numerical noise" else ""
        cells.setdefault((r["cause"], r["strength"] + mark), {})[r["models"]] = r
    sums = []
    for name in whose:
        of = [r for r in rows if r["models"] == name and r["cause"] != "numerical noise"
              and int(r["practical"])]
        first, named = (
            sum(int(r[k]) for r in of) / sum(int(r["draws"]) for r in of)
            for k in ("first", "named")
        )
        sums.append(f"{name}: {len(of)} starred faults, {first:.1%} of the draws right first,"
                    f" {named:.1%} named.")
    head = ["fault", "strength"]
    for name in whose:
        head += [f"{name}: first", "named", "first instead"]
    return "\n".join([
        *sums, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|",
        *("| " + " | ".join([cause, strength, *(
            cell for name in whose for cell in (
                _share(of.get(name), "first"), _share(of.get(name), "named"),
                of[name]["instead"] if name in of else "",
            )
        )]) + " |" for (cause, strength), of in cells.items()),
    ])


def _share(row: dict[str, str] | None, of: str) -> str:
    return f"{int(row[of]) / int(row['draws']):.0%}" if row else "not run"


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Replace what stands between a table's two markers."""
    page = path.read_text()
    pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
    changed, count = re.subn(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{path} has no pair of markers for {name!r}")
    path.write_text(changed)


def main(argv: list[str] | None = None) -> int:
    """Count, or write the page from what was counted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks diagnose", description=__doc__)
    parser.add_argument("what", choices=("faults", "clean", "tables"))
    parser.add_argument("--rollouts", type=Path, metavar="DIR",
                        help="*_rollout_*.npz with tokens and entropy; default: the shipped ones")
    parser.add_argument("--dumps", type=Path, action="append", default=[], metavar="DIR",
                        help="clean dumps besides; repeatable")
    parser.add_argument("--trials", type=int, default=32, help="draws from each dump and size")
    parser.add_argument("--sequences", type=int, default=64, help="of 128 tokens in a draw")
    parser.add_argument("--models", type=int, nargs="+", default=list(LOOKED_AT), metavar="SEED",
                        help="of the transformer's weights; others than 0 and 1 are held out")
    parser.add_argument("--starred", action="store_true",
                        help="only the strengths that a practitioner meets")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N",
                        help="the i-th of n parts of the faults")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.what == "tables":
        for name, text in tables():
            write_between_markers(PAGE, name, text)
        return 0
    start = time.perf_counter()
    lab = Lab(args.sequences, args.models)
    real = clean_rollouts(args.rollouts) if args.rollouts else shipped()
    if args.what == "faults":
        count_faults(lab, real.get("sharp, bfloat16 / bfloat16"), trials=args.trials,
                     starred=args.starred, part=args.part, record=RECORDS / "faults.csv")
    else:
        for directory in args.dumps:
            real |= clean_dumps(directory)
        count_clean(lab, real, trials=args.trials, record=RECORDS / "clean.csv")
    _progress(f"{time.perf_counter() - start:.0f} s")
    return 0


def _part(text: str) -> tuple[int, int]:
    i, n = map(int, text.split("/"))
    return i, n


if __name__ == "__main__":
    raise SystemExit(main())
