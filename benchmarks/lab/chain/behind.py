"""``python -m benchmarks.lab behind``: an engine some updates behind, sampled, with seeds.

What is run, in which order, and how it is judged was written down before: ``PLAN.md``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.lab.chain import attention
from benchmarks.lab.chain.arms import ARMS, Arm
from benchmarks.lab.chain.baselines import (
    Critic,
    beyond_half,
    beyond_the_mean,
    layer,
    of_layer,
)
from benchmarks.lab.chain.engines import Engine, plain
from benchmarks.lab.chain.learner import Learner, View, state_of
from benchmarks.lab.chain.policy import Parameters, warm_start
from benchmarks.lab.chain.records import append, due, numbers, refuse_other_steps, rows
from benchmarks.lab.chain.world import WORLDS, Samples, World, ahead, sample

LENGTH, PROMPTS, ANSWERS, STEPS, WARMUP, CLIP = 256, 4, 16, 150, 5, 1.0
RATES = (3e-4, 1e-3, 3e-3)
"""Of Adam; the control chooses among them."""
ATTENTION = "attention"
"""The world of :mod:`benchmarks.lab.chain.attention`."""
TASKS, UNTOUCHED = (20, 21, 22), 23
SEEDS, CALIBRATION_SEEDS = 20, 3
LAGS = (8, 16, 4, 2, 1, 32)
MAIN = ("uncorrected", "token-tis", "icepop", "ppo", "token-tis-critic", "token-tis-half")
FIRST = (
    "uncorrected", "token-tis", "icepop", "ppo", "token-mis", "sequence-tis", "sequence-mis",
    "cispo", "gspo", "dppo", "confidence-is", "geometric-rs", "topr", "off-policy-negative",
)
"""The arms that were meant before a better one was looked for."""
MEANT = tuple(dict.fromkeys((
    *MAIN, "uncorrected-critic", "icepop-critic", "uncorrected-half", "icepop-half", "past-tis",
    *FIRST,
)))
"""The arms of the plan. With one update a batch, PPO on a π_old that is recomputed at the weights
of the update has a ratio of 1: it is ``uncorrected``, and with token-TIS it is ``token-tis``."""
LAST = 20
"""Steps that the end is a mean over."""
EVERY = 5
"""Steps from one number of a curve to the next."""
AFTER = 10
"""Step after which the lowest J(π) is looked for."""
FELL, ZERO = 0.3, 0.1
"""A run fell if its lowest J(π) is below the one, and is at zero if its end is below the other."""


class Run(NamedTuple):
    """One run; what its record is found by.

    Attributes:
        world: a name in ``WORLDS``, or "attention".
        task: a seed.
        lag: updates that the engine is behind.
        arm: a name in ``ARMS``.
        rate: learning rate of Adam.
        seed: of samples and features.
    """

    world: str
    task: int
    lag: int
    arm: str
    rate: float
    seed: int


def calibration(world: str) -> list[Run]:
    """The control at every rate, on the first task."""
    return [
        Run(world, TASKS[0], 0, "uncorrected", rate, seed)
        for seed in range(CALIBRATION_SEEDS) for rate in RATES
    ]


def control_ends(path: Path, world: str) -> dict[float, list[float]]:
    """Of the control that is on record, the ends at each rate."""
    ends: dict[float, list[float]] = {rate: [] for rate in RATES}
    wanted = {tuple(map(str, run)) for run in calibration(world)}
    for row in rows(path):
        if tuple(row[name] for name in Run._fields) in wanted:
            ends[float(row["rate"])].append(float(row["end"]))
    return ends


def by_the_control(path: Path, world: str) -> list[float]:
    """Rates on record, from the one at which the control ends highest."""
    ends = control_ends(path, world)
    return sorted(RATES, key=lambda rate: -sum(ends[rate]) / len(ends[rate]))


def design(rates: Sequence[float], *, world: str = "chain", untouched: bool = False) -> list[Run]:
    """Every run, in the order in which they are done: the control and the main claim first.

    Args:
        rates: of which the first two are run, alike.
        world: a name in ``WORLDS``.
        untouched: the fourth task in place of the three.
    """
    tasks = (UNTOUCHED,) if untouched else TASKS
    first, second, *_ = rates
    control = ("uncorrected", "token-tis-critic", "token-tis-half")
    parts = [((0,), control), ((8,), (*MAIN, "past-tis"))]
    most, last = [], []
    if world != ATTENTION:
        parts += [(LAGS, MAIN), ((8,), MEANT)]
        most, last = [(LAGS, FIRST)], [(LAGS, MEANT)]
    blocks = [
        (rate, lags, arms, seeds)
        for seeds, some in ((SEEDS // 2, parts), (SEEDS, most), (SEEDS, parts), (SEEDS, last))
        for lags, arms in some for rate in (first, second)
    ]
    return listed(blocks, world, tasks)


def listed(
    blocks: Iterable[tuple[float, Sequence[int], Sequence[str], int]], world: str,
    tasks: Sequence[int],
) -> list[Run]:
    """The runs of blocks of a rate, lags, arms and seeds, each once."""
    return [*dict.fromkeys(
        Run(world, task, lag, arm, rate, seed)
        for rate, lags, arms, seeds in blocks
        for seed, task, lag, arm in product(range(seeds), tasks, lags, arms)
    )]


def of_mean(drawn: Samples) -> Tensor:
    return beyond_the_mean(drawn.reward)


def of_half(drawn: Samples) -> Tensor:
    return beyond_half(drawn.reward)


def of_critic(critic: Critic, learner: Learner, drawn: Samples) -> Tensor:
    """The critic is shown the features of each context and how far into the answer it is."""
    world = learner.world
    context = drawn.places // world.vocab
    position = (context % world.length)[..., None] / world.length
    features = learner.features.flatten(0, 2)[context]
    return critic.beyond((torch.cat([features, position], -1),), drawn.reward)


def sampled_gain(
    arm: Arm, world: World, view: View, generator: torch.Generator,
    advantages: Callable[[Samples], Tensor] = of_mean,
) -> Tensor:
    """−loss on sequences that the engine samples."""
    drawn = sample(world, view.engine.exp(), ANSWERS, generator)
    policy, rollout, engine = (x.reshape(-1)[drawn.places] for x in view)
    loss, _ = arm.loss(
        policy, rollout_log_probs=engine, old_log_probs=arm.old_log_probs(rollout, engine),
        advantages=advantages(drawn), mask=torch.ones_like(engine, dtype=torch.bool),
    )
    return -loss


def learn(run: Run, world: World, start: Parameters, steps: int) -> Iterator[View]:
    """What is seen before each step, whose update is sampled."""
    learner = Learner(
        world, start, Engine(plain, behind=run.lag), optimizer="adam", rate=run.rate,
        seed=1000 * (run.seed + 1),
    )
    generator = torch.Generator().manual_seed(run.seed)
    arm = ARMS[run.arm]
    drawn = layer(world.width + 1, torch.Generator().manual_seed(run.seed))
    advantages = {
        "mean": of_mean, "half": of_half,
        "critic": partial(of_critic, Critic(drawn, of_layer), learner),
    }[arm.baseline]
    for step in range(steps):
        view = learner.look()
        yield view
        learner.optimizer.param_groups[0]["lr"] = run.rate * min(1, (step + 1) / WARMUP)
        learner.ascend(sampled_gain(arm, world, view, generator, advantages), CLIP)


@cache
def at_start(name: str, task: int) -> tuple[World, Parameters]:
    """A world and the policy that every run in it starts from."""
    world = WORLDS[name](length=LENGTH, task=task, prompts=PROMPTS)
    return world, warm_start(world)


def measures(policy: Sequence[float], every: int = 1) -> dict[str, str]:
    """What a run is judged by, from J(π) at every so many steps."""
    if not all(map(math.isfinite, policy)):
        raise ArithmeticError("the run has diverged: J(π) is not finite, so it has no end")
    last = policy[-LAST // every :]
    lowest = min(policy[-(-AFTER // every) :])
    return {"end": f"{sum(last) / len(last):.4f}", "lowest": f"{lowest:.4f}"}


def record(run: Run, steps: int) -> dict[str, str]:
    """Measures and curves of a run, which is carried out; J(π) alone where there is attention."""
    if run.world == ATTENTION:
        found = [*attention.learn(
            task=run.task, lag=run.lag, arm=run.arm, rate=run.rate, seed=run.seed, steps=steps,
            each=ANSWERS, warmup=WARMUP, clip=CLIP, every=EVERY,
        )]
        curve = " ".join(f"{value:.4g}" for value in found)
        return {**measures(found, EVERY), "j_policy": curve, "j_engine": "", "kl": ""}
    world, start = at_start(run.world, run.task)
    rewards, states = [], []
    for step, view in enumerate(learn(run, world, start, steps)):
        rewards.append(ahead(world, view.policy.detach().exp()).reward.mean().item())
        if step % EVERY == 0:
            states.append(state_of(world, view))
    return {**measures(rewards), **numbers(states)}


def carry_out(runs: Sequence[Run], path: Path, steps: int, jobs: int = 1) -> None:
    """Do what is not on record, some at a time, and say how far it is."""
    refuse_other_steps(runs, path, math.ceil(steps / EVERY))
    left = due(runs, path)
    workers = ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    asked = {workers.submit(record, run, steps): run for run in left}
    try:
        for i, done in enumerate(as_completed(asked), 1):
            run, found = asked[done], done.result()
            append(path, {**run._asdict(), **found})
            print(f"{i}/{len(left)} {' '.join(map(str, run))}: end {found['end']}, lowest "
                  f"{found['lowest']}", flush=True)
    finally:
        workers.shutdown(cancel_futures=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab behind", description=__doc__)
    parser.add_argument("--records", type=Path, default=Path(__file__).parents[1] / "records")
    parser.add_argument("--untouched", action="store_true", help="the fourth task alone")
    parser.add_argument("--world", choices=[*WORLDS, ATTENTION], default="chain")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at most so many of each cell")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    given = parser.parse_args(arguments)
    path = given.records / "behind.csv"
    carry_out(calibration(given.world), path, given.steps, given.jobs)
    rates = by_the_control(path, given.world)
    runs = design(rates, world=given.world, untouched=given.untouched)
    carry_out([run for run in runs if run.seed < given.seeds], path, given.steps, given.jobs)
