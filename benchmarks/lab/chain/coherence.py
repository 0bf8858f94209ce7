"""``python -m benchmarks.lab coherence``: n* as a training loop can estimate it, and exact.

The library's :func:`iscorrect.coherence` is given sketches of sampled gradients, uncorrected and
with token weights, of batches whose contexts are drawn anew. On the chain the difference of the two
is also known exactly for every draw, so that n* is known but for the number of draws. The policy is
that of the start; where the engine is behind, that after 20 exact updates, and then held.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.lab.chain.arms import ARMS
from benchmarks.lab.chain.engines import ENGINES
from benchmarks.lab.chain.exact import expected_gain
from benchmarks.lab.chain.learner import Learner, View, state_of
from benchmarks.lab.chain.policy import Parameters, logits, warm_start
from benchmarks.lab.chain.records import append, known
from benchmarks.lab.chain.world import World, sample
from iscorrect import Coherence, GradientSketch, coherence, group_advantages

SHOWN = ("activations-7", "int4", "int3", "behind-2", "behind-4", "behind-8")
LEARNT = 20
"""Exact updates before the policy of a lag is held."""
ANSWERS = 16
TASK = 10
BATCHES = 200


class Found(NamedTuple):
    """Of one engine.

    Attributes:
        kl: nats per sequence.
        estimated: from sketches of sampled gradients.
        exact: from exact expectations of their difference, over the same draws of the features.
    """

    kl: float
    estimated: Coherence
    exact: Coherence


def measure(engine: str, *, world: World, batches: int) -> Found:
    """Both, over batches of new features."""
    learner = held(world, start_of(world), engine)
    generator = torch.Generator().manual_seed(world.task)
    sketch = GradientSketch()
    expected: list[tuple[Tensor, Tensor]] = []
    sampled: list[tuple[Tensor, Tensor]] = []
    sketches: list[tuple[Tensor, Tensor]] = []
    kls = []
    for _ in range(batches):
        view = learner.look()
        exactly: list[Tensor] = []
        drawn: list[list[Tensor]] = []
        gains = sampled_gains(("uncorrected", "token-is"), world, view, generator)
        for arm, gain in gains.items():
            exactly.append(flat(gradients(learner, expected_gain(world, arm, view))))
            drawn.append(gradients(learner, gain))
        expected.append((exactly[0], exactly[1]))
        sampled.append((flat(drawn[0]), flat(drawn[1])))
        sketches.append((sketch(drawn[0]), sketch(drawn[1])))
        kls.append(state_of(world, view).kl)
    sequences = world.prompts * ANSWERS
    return Found(
        sum(kls) / batches, of_pairs(sketches, sequences), known_bias(expected, sampled, sequences),
    )


def known_bias(
    expected: Sequence[tuple[Tensor, Tensor]], sampled: Sequence[tuple[Tensor, Tensor]],
    sequences: int,
) -> Coherence:
    """n* with the noise of the samples, and the exact difference in the place of theirs."""
    uncorrected = torch.stack([g for g, _ in sampled])
    bias = torch.stack([g - c for g, c in expected])
    return coherence(uncorrected, uncorrected - bias, sequences=sequences)


def of_pairs(pairs: Sequence[tuple[Tensor, Tensor]], sequences: int) -> Coherence:
    uncorrected, corrected = zip(*pairs, strict=True)
    return coherence(torch.stack(uncorrected), torch.stack(corrected), sequences=sequences)


@cache
def start_of(world: World) -> Parameters:
    """The policy that every engine is tried on."""
    return warm_start(world)


def held(world: World, start: Parameters, engine: str) -> Learner:
    """A learner that does not learn, and its engine; one that is behind holds older weights."""
    of = ENGINES[engine]
    if not of.behind:
        return Learner(world, start, of, optimizer="sgd", rate=0.0, seed=world.task)
    learner = Learner(world, start, of, optimizer="adam", rate=1e-3, seed=world.task)
    for _ in range(LEARNT):
        learner.ascend(expected_gain(world, "sequence-is", learner.look()))
    policy = {name: x.detach().clone() for name, x in learner.weights.items()}
    older = learner.hold()
    stale = replace(of, behind=0, sampler=of_weights(older))
    return Learner(world, policy, stale, optimizer="sgd", rate=0.0, seed=world.task + 1)


def of_weights(weights: Parameters) -> Callable[..., Tensor]:
    """A sampler that has these weights whatever the trainer has."""
    return lambda _, features, generator: logits(weights, features)


def sampled_gains(
    arms: Sequence[str], world: World, view: View, generator: torch.Generator
) -> dict[str, Tensor]:
    """−loss of each arm on the same sequences of the engine; the other answers are the baseline."""
    drawn = sample(world, view.engine.exp(), ANSWERS, generator)
    policy, _, engine = (x.reshape(-1)[drawn.places] for x in view)
    group = torch.arange(world.prompts).repeat_interleave(ANSWERS)
    advantages = group_advantages(drawn.reward.flatten(), group, estimator="rloo")
    return {
        arm: -ARMS[arm].loss(
            policy, rollout_log_probs=engine, advantages=advantages,
            mask=torch.ones_like(engine, dtype=torch.bool),
        ).loss
        for arm in arms
    }


def gradients(learner: Learner, gain: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(gain, [*learner.weights.values()], retain_graph=True))


def flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts]).double()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab coherence", description=__doc__)
    parser.add_argument("--records", type=Path, default=Path(__file__).parents[1] / "records")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=SHOWN)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batches", type=int, default=BATCHES)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = given.records / "coherence.csv"
    done = known(path, ("engine", "length", "batches"))
    world = World(length=given.length, task=TASK)
    for engine in given.engines:
        if (engine, str(given.length), str(given.batches)) in done:
            continue
        found = measure(engine, world=world, batches=given.batches)
        row: dict[str, object] = {
            "engine": engine, "length": given.length, "batches": given.batches,
            "kl": f"{found.kl:.4g}",
        }
        for name, of in (("estimated", found.estimated), ("exact", found.exact)):
            row |= {
                f"{name}_{field}": f"{getattr(of, field):.4g}"
                for field in ("n_star", "low", "high", "share", "error")
            }
        append(path, row)
        print(engine, found, flush=True)
