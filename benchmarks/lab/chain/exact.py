"""``python -m benchmarks.lab exact``: learning by the expected update of each correction, no seeds.

Every token-level expectation on the chain is a finite sum, so gradient ascent along an estimator's
*expected* gradient can be followed without sampling. The weights are the library's, evaluated on
every token of every context.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.lab.chain.arms import ARMS, SIGNED, TOKEN_LOCAL, slopes
from benchmarks.lab.chain.engines import BITS, ENGINES, LAGS
from benchmarks.lab.chain.learner import Learner, Optimizer, State, View, state_of
from benchmarks.lab.chain.policy import Parameters, warm_start
from benchmarks.lab.chain.records import append, due, numbers, refuse_other_steps
from benchmarks.lab.chain.world import WORLDS, World, credit

STEPS = 100
RATES: dict[Optimizer, float] = {"adam": 1e-3, "sgd": 0.1}
PROMPTS = {64: 4, 256: 4, 1024: 2, 4096: 1}
"""By length: fewer where contexts are many."""
TASKS = (10, 11, 12)
SEED = 7
"""Of the features' nuisance; the same in every run."""
CORE = ("uncorrected", "token-tis", "icepop")
CRITIC, HALF = (
    tuple(name for name in TOKEN_LOCAL if ARMS[name].baseline == of) for of in ("critic", "half")
)
"""With other baselines; a critic knows what is to be expected here."""
KINDS = (
    "exact", "activations-10", "activations-7", "activations-4", "weights-7", "weights-4",
    "both-7", "both-5", "int8", "int4", "int3", "noise-0.3", "noise-1", "behind-1", "behind-2",
    "behind-4", "behind-8", "temperature-1.3", "top-p-0.9",
)
"""Of every kind of mismatch, some sizes."""


class Run(NamedTuple):
    """One engine and one arm; what its record is found by.

    Attributes:
        world: a name in ``WORLDS``.
        length: T.
        task: a seed.
        optimizer: "adam" or "sgd".
        engine: a name in ``ENGINES``.
        arm: a name in ``TOKEN_LOCAL``, or "sequence-is".
    """

    world: str
    length: int
    task: int
    optimizer: Optimizer
    engine: str
    arm: str


def design(length: int | None = None) -> list[Run]:
    """Every run, in the order in which they are done; of one length, if one is given."""
    arms = (*CORE, *(name for name in TOKEN_LOCAL if name not in CORE + CRITIC + HALF))
    first, *others = TASKS
    finer = [f"{kind}-{m}" for kind in ("activations", "both") for m in BITS]
    lags = [f"behind-{lag}" for lag in LAGS]
    blocks = [
        block("chain", 256, first, "adam", KINDS, CORE),
        block("chain", 256, first, "adam", ["exact", "behind-8", "int3"], ["sequence-is"]),
        *(block(world, 256, first, "adam", KINDS, CORE) for world in ("mended", "dense")),
        block("chain", 256, first, "adam", ["behind-8", "behind-4", "int3"], arms),
        *(block("chain", size, first, "adam", ["exact", *finer], CORE[:2])
          for size in (64, 256, 1024)),
        block("chain", 256, first, "sgd", KINDS, CORE),
        *(block("chain", 256, task, "adam", KINDS, CORE) for task in others),
        block("chain", 4096, first, "adam", ["exact", *finer], CORE[:2]),
        block("chain", 256, first, "adam", ENGINES, CORE),
        block("chain", 256, first, "adam", lags, arms),
        block("chain", 256, first, "adam", ENGINES, arms),
        *(block(world, 256, first, "adam", KINDS, CRITIC) for world in WORLDS),
        block("chain", 256, first, "sgd", KINDS, CRITIC),
        *(block("chain", 256, task, "adam", KINDS, CRITIC) for task in others),
        *(block("chain", size, first, "adam", ["exact", *finer], CRITIC[:1]) for size in PROMPTS),
        *(block(world, 256, first, "adam", KINDS, HALF) for world in WORLDS),
    ]
    runs = dict.fromkeys(run for part in blocks for run in part)
    return [run for run in runs if length in (None, run.length) and defined(run)]


def block(
    world: str, length: int, task: int, optimizer: Optimizer, engines: Iterable[str],
    arms: Iterable[str],
) -> list[Run]:
    return [
        Run(world, length, task, optimizer, engine, arm) for engine in engines for arm in arms
    ]


def defined(run: Run) -> bool:
    """Whether it is exact and says something of its own.

    Where rewards are dense, the sign of an advantage is not known from context and token. Where
    the engine is not behind, π_old is π, and PPO and CISPO are REINFORCE.
    """
    if run.world == "dense" and run.arm in SIGNED:
        return False
    arm = ARMS[run.arm]
    return arm.old != "rollout" or ENGINES[run.engine].behind > 0


def expected_gain(world: World, arm: str, view: View) -> Tensor:
    """The scalar whose gradient is E_μ[−∇loss], per prompt; of ``sequence-is``, ∇J(π).

        Σ_{c,v} C(c, v) log π(v|c),  C = d_μ(c) μ(v|c) E[(R − b) w | c, v]
    """
    policy = view.policy.detach()
    if arm == "sequence-is":
        positive, negative = credit(world, policy.exp())
        coefficient = positive - negative
    else:
        rewarded, punished = slopes(ARMS[arm], policy, view.rollout, view.engine)
        positive, negative = credit(world, view.engine.exp(), ARMS[arm].baseline)
        coefficient = positive * rewarded + negative * punished
    return (coefficient * view.policy).sum() / world.prompts


def learn(run: Run, steps: int) -> Iterator[State]:
    """The state before each step, and at the end."""
    world, start = at_start(run.world, run.length, run.task)
    learner = Learner(
        world, start, ENGINES[run.engine], optimizer=run.optimizer, rate=RATES[run.optimizer],
        seed=SEED,
    )
    for _ in range(steps):
        view = learner.look()
        yield state_of(world, view)
        learner.ascend(expected_gain(world, run.arm, view))
    yield state_of(world, learner.look())


@cache
def at_start(name: str, length: int, task: int) -> tuple[World, Parameters]:
    """A world and the policy that every run in it starts from."""
    world = WORLDS[name](length=length, task=task, prompts=PROMPTS.get(length, 4))
    return world, warm_start(world)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab exact", description=__doc__)
    parser.add_argument("--records", type=Path, default=Path(__file__).parents[1] / "records")
    parser.add_argument("--length", type=int, help="of sequences; without it, all lengths")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--engines", nargs="*", choices=ENGINES, help="some of the engines")
    parser.add_argument("--arms", nargs="*", choices=[*TOKEN_LOCAL, "sequence-is"])
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = [
        run for run in design(given.length)
        if (not given.engines or run.engine in given.engines)
        and (not given.arms or run.arm in given.arms)
    ]
    path = given.records / "exact.csv"
    refuse_other_steps(runs, path, given.steps + 1)
    left = due(runs, path)
    for i, run in enumerate(left, 1):
        began = time.process_time()
        states = [*learn(run, given.steps)]
        append(path, {**run._asdict(), "steps": given.steps, **numbers(states)})
        print(f"{i}/{len(left)} {' '.join(map(str, run))}: J(π) {states[-1].j_policy:.3f}, "
              f"{time.process_time() - began:.1f} s", flush=True)
