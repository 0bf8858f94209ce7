"""Is the diagnosis right? Faults injected on purpose, clean rollouts, and how often it says what.

    python -m benchmarks.diagnose [--rollouts DIR] [--trials 100] [--clean 1000] [--write FILE]

Clean dumps are real rollouts of a real engine under every pair of precisions, and a small
transformer in two implementations; faults happen inside that transformer's engine, sampler, or
trainer, or, where they are faults of a file, in the real rollouts too. A trial is a bootstrap
sample of whole prompts (all answers to them) of the size asked for.
"""

from __future__ import annotations

import argparse
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
    VOCABULARY,
    Scenario,
    Stack,
    Weights,
    min_p,
    plain,
    quantised,
    random_weights,
    repetition_penalty,
    roll_out,
    tempered,
    top_k,
    top_p,
    updated,
)
from iscorrect.cli.rollouts import MODELS, PAIRS as SHIPPED_PAIRS, shipped_rollouts
from iscorrect.diagnose import diagnose
from iscorrect.dumps import LogProbDump, concatenate

LENGTH, ANSWERS = 128, 4
BF16 = Stack(torch.bfloat16, fused=True), Stack(torch.bfloat16, fused=False)
PAIRS = ("float32", "bfloat16", "float16", "amp_bf16", "amp_fp16", "bfloat16_eager")
NOISE = "nothing beyond numerical noise: "


@dataclass(frozen=True)
class Case:
    """One fault at one strength."""

    cause: str
    strength: str
    make: Callable[[], list[LogProbDump]]  # one for each model
    practical: bool = False


def _scale(engine: str, trainer: str) -> str:
    """What noise of two precisions should be called: after the coarser."""
    if "bf" in engine + trainer:
        return f"{NOISE}bfloat16 scale"
    return f"{NOISE}{'float32' if engine == trainer == 'float32' else 'float16'} scale"


def shipped() -> dict[str, tuple[str, LogProbDump]]:
    """The package's rollouts by name, each with what its noise should be called."""
    dumps = {}
    for model, (engine, trainer) in itertools.product(MODELS, SHIPPED_PAIRS):
        dump = shipped_rollouts(model, engine, trainer)
        dumps[f"{model}, {engine} / {trainer}"] = _scale(engine, trainer), replace(
            dump, group=torch.arange(len(dump))
        )
    return dumps


def clean_rollouts(directory: Path) -> dict[str, tuple[str, LogProbDump]]:
    """The same from files that also hold tokens, the trainer's entropy, and autocast."""
    dumps = {}
    for path in sorted(directory.glob("*_rollout_*.npz")):
        arrays = np.load(path)
        model, engine = path.stem.split("_rollout_")
        for pair in PAIRS:
            def tensor(name: str, arrays: object = arrays) -> Tensor:
                return torch.from_numpy(arrays[name])  # type: ignore[index]

            dumps[f"{model}, {engine} / {pair}"] = _scale(engine, pair), LogProbDump(
                rollout_log_probs=tensor("rollout_log_probs"),
                old_log_probs=tensor(f"trainer_log_probs_{pair}"),
                entropy=tensor(f"trainer_entropy_{pair}"),
                token_ids=tensor("token_ids").long(),
                mask=torch.ones(tensor("token_ids").shape, dtype=torch.bool),
                group=torch.arange(len(tensor("token_ids"))),
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
    return replace(dump, old_log_probs=old, rollout_log_probs=rollout)


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


def cases(lab: Lab, real: LogProbDump | None) -> Iterator[Case]:
    """Every cause at several strengths."""
    engine, trainer = BF16

    def case(cause: str, strength: str, scenario: Scenario, practical: bool = False) -> Case:
        return Case(cause, strength, lambda: lab(scenario), practical)

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
    yield case("wrong prompt template", "halves swapped", Scenario(prompt=_another_prompt), True)
    yield case("wrong prompt template", "first token",
               Scenario(prompt=lambda p: torch.cat([p[:, :1] * 0 + 7, p[:, 1:]], dim=1)))
    for share in (0.002, 0.01):
        yield case("wrong tokens", f"{share:.1%}", Scenario(tokens=_wrong(share)), share == 0.01)
    for every in (16, 4):
        yield case("different tokens from a position on", f"1 sequence in {every}",
                   Scenario(tokens=_inserted(every)), every == 4)
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

    small = lab(Scenario())
    sources = {"transformer": small}
    if real is not None:
        sources["real"] = [real]
    for where, dumps in sources.items():
        for lag in (1, -1):
            yield Case("log-probs shifted against each other", f"{lag:+d}, {where}",
                       partial(_each, dumps, lambda d, k=lag: shifted(d, k)), True)
        for share in (0.001, 0.01):
            yield Case("missing values filled with a constant", f"{share:.1%}, {where}",
                       partial(_each, dumps, lambda d, s=share: zero_filled(d, s)), share == 0.01)
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


def first_causes(
    dumps: list[LogProbDump], sequences: int, trials: int, seed: int
) -> Counter[str]:
    """How often each cause comes first, the models taking turns."""
    return Counter(
        diagnose(resample(dumps[i % len(dumps)], sequences, seed + i))[0].cause
        for i in range(trials)
    )


def interval(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.96, hits / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    return max(0.0, middle - half), min(1.0, middle + half)


def run(
    rollouts: Path | None, *, trials: int, clean: int, sequences: int, seeds: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """The tables by name, in Markdown."""
    real = clean_rollouts(rollouts) if rollouts else shipped()
    lab = Lab(sequences, seeds)
    expected = dict(real)
    for name in ("bfloat16", "float16", "float32"):
        dtype = getattr(torch, name)
        healthy = Scenario(engine=Stack(dtype, fused=True), trainer=Stack(dtype, fused=False))
        for i, dump in enumerate(lab(healthy)):
            expected[f"transformer {i}, {name} / {name}"] = f"{NOISE}{name} scale", dump

    rows, wrong, scale_wrong = [], 0, 0
    each = -(-clean // len(expected))
    for i, (name, (scale, dump)) in enumerate(expected.items()):
        found: Counter[str] = Counter()
        for trial in range(each):
            for finding in diagnose(resample(dump, sequences, 10_000 * i + trial)):
                found[finding.cause] += 1
        false = sum(n for cause, n in found.items() if not cause.startswith(NOISE[:-2]))
        scale_wrong += sum(n for c, n in found.items() if c.startswith(NOISE[:-2]) and c != scale)
        wrong += false
        whole = [finding.cause for finding in diagnose(dump)]
        shown = ", ".join(c.removeprefix(NOISE) for c in whole)
        rows.append(f"| {name} | {shown} | {false} / {each} |")
        _progress(rows[-1])
    total = each * len(expected)
    low, high = interval(wrong, total)
    yield "clean", "\n".join([
        f"{total} draws of {sequences * LENGTH:,} tokens: {wrong} false findings"
        f" ({wrong / total:.2%}, 95 % interval {low:.2%} to {high:.2%}), the scale of the noise"
        f" misjudged in {scale_wrong}.", "",
        "| rollout / trainer | findings on the whole | false findings in draws |",
        "|---|---|---|", *rows,
    ])

    bf16 = real.get("sharp, bfloat16 / bfloat16")
    sizes = [sequences // 8, sequences // 4, sequences // 2, sequences]
    table, confusion = [], {}
    for i, case in enumerate(cases(lab, bf16[1] if bf16 else None)):
        dumps = case.make()
        power = []
        for size in sizes:
            firsts = first_causes(dumps, size, trials, seed=100_000 + 1000 * i)
            power.append(firsts[case.cause] / trials)
        mark = " *" if case.practical else ""
        table.append(
            f"| {case.cause} | {case.strength}{mark} | {' | '.join(f'{p:.0%}' for p in power)} |"
        )
        if case.practical:
            confusion.setdefault(case.cause, Counter()).update(firsts)
        _progress(table[-1])
    header = " | ".join(f"{size * LENGTH:,}" for size in sizes)
    yield "power", "\n".join([
        f"| cause | strength | {header} |", "|---|---|" + "---|" * len(sizes), *table,
    ])
    lines = []
    for cause, firsts in confusion.items():
        others = ", ".join(f"{c} ({n})" for c, n in firsts.most_common() if c != cause)
        n = firsts.total()
        lines.append(f"| {cause} | {firsts[cause] / n:.1%} of {n} | {others or '–'} |")
    yield "confusion", "\n".join([
        "| injected | named first | named instead |", "|---|---|---|", *lines,
    ])


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
    """Print the tables, and write them into a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks diagnose", description=__doc__)
    parser.add_argument("--rollouts", type=Path, metavar="DIR",
                        help="*_rollout_*.npz with tokens and entropy; default: the shipped ones")
    parser.add_argument("--trials", type=int, default=100, help="draws for each fault and size")
    parser.add_argument("--clean", type=int, default=1000, help="clean draws in all")
    parser.add_argument("--sequences", type=int, default=64, help="of 128 tokens in a draw")
    parser.add_argument("--models", type=int, nargs="+", default=[0, 1], metavar="SEED",
                        help="of the transformer's weights; others than 0 and 1 are held out")
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = time.perf_counter()
    tables = run(args.rollouts, trials=args.trials, clean=args.clean, sequences=args.sequences,
                 seeds=args.models)
    for name, text in tables:
        print(f"## {name}\n\n{text}\n")
        if args.write:
            write_between_markers(args.write, name, text)
    _progress(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
