"""``python -m benchmarks.lab bias``: how far each expected update is from the gradient, by length.

The policy is that of the start, J = 0.5. For one draw of nuisance and noise ‖bias‖/‖∇J‖ is the root
of its mean square over draws. The part of the bias that draws *share* is the mean inner product of
different draws: the rest averages out over a large batch of contexts that are never seen twice.
n* = tr Cov(gradient of one sequence)/shared² is the batch from which the shared part exceeds the
sampling noise; there is one where shared² is above twice its jackknife error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.lab.chain.arms import ARMS
from benchmarks.lab.chain.behind import sampled_gain
from benchmarks.lab.chain.engines import ENGINES
from benchmarks.lab.chain.exact import expected_gain
from benchmarks.lab.chain.learner import Learner, View, state_of
from benchmarks.lab.chain.policy import warm_start
from benchmarks.lab.chain.records import append, known, note
from benchmarks.lab.chain.world import World

LENGTHS = (8, 32, 128, 256, 1024)
SHOWN = ("uncorrected", "token-is", "token-tis", "icepop")
BY_LENGTH = "noise-0.3"
"""The engine whose bias is followed through all lengths."""
BY_KIND = (
    "activations-10", "activations-7", "weights-7", "weights-4", "int8", "int4", "int3",
    "temperature-1.1",
)
"""Engines at T = 256."""
DRAWS = 12
TASK = 10


class Found(NamedTuple):
    """Of one engine at one length.

    Attributes:
        kl: nats per sequence.
        relative: ‖bias‖/‖∇J‖ of one draw, by arm.
        shared: mean inner product of the uncorrected bias of different draws over ‖∇J‖².
        error: its standard error, by the jackknife over draws.
        n_star: sequences; None where ``shared`` is below two errors.
    """

    kl: float
    relative: dict[str, float]
    shared: float
    error: float
    n_star: float | None


def measure(length: int, engine: str, *, task: int = TASK, draws: int = DRAWS) -> Found:
    """Biases at the start, over some draws of the features."""
    world = World(length=length, task=task)
    learner = Learner(
        world, warm_start(world), ENGINES[engine], optimizer="sgd", rate=0.0, seed=task
    )
    generator = torch.Generator().manual_seed(task)
    gradients, sampled, kls = [], [], []
    biases: dict[str, list[Tensor]] = {arm: [] for arm in SHOWN}
    for _ in range(draws):
        view = learner.look()
        exact = flat(learner, expected_gain(world, "sequence-is", view))
        for arm, found in biases.items():
            found.append(flat(learner, expected_gain(world, arm, view)) - exact)
        own = View(view.policy, view.rollout, view.policy.detach())
        sampled.append(flat(learner, sampled_gain(ARMS["uncorrected"], world, own, generator)))
        gradients.append(exact)
        kls.append(state_of(world, view).kl)
    size = torch.stack(gradients).mean(0).norm().item()
    each = torch.stack(biases["uncorrected"]) / size
    shared, error = between(each @ each.T)
    # a sample is the mean over the batch's sequences
    batch = world.prompts * 16
    noise = (torch.stack(sampled) - torch.stack(gradients)).square().sum(1).mean().item() * batch
    return Found(
        sum(kls) / draws,
        {arm: (torch.stack(found).square().sum(1).mean().sqrt() / size).item()
         for arm, found in biases.items()},
        shared, error, noise / size**2 / shared if shared > 2 * error else None,
    )


def between(products: Tensor) -> tuple[float, float]:
    """Mean of the products "d d" of different draws, and its error by leaving out each draw."""
    draws = len(products)
    apart = products - products.diag().diag()
    total = apart.sum()
    without = (total - 2 * apart.sum(1)) / ((draws - 1) * (draws - 2))
    error = ((draws - 1) / draws * (without - without.mean()).square().sum()).sqrt()
    return (total / (draws * (draws - 1))).item(), error.item()


def flat(learner: Learner, gain: Tensor) -> Tensor:
    """The gradient in all parameters, float64."""
    parts = torch.autograd.grad(gain, [*learner.weights.values()], retain_graph=True)
    return torch.cat([part.flatten() for part in parts]).double()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab bias", description=__doc__)
    parser.add_argument("--records", type=Path, default=Path(__file__).parents[1] / "records")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=BY_KIND)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = given.records / "bias.csv"
    wanted = [(BY_LENGTH, length) for length in given.lengths]
    wanted += [(engine, 256) for engine in given.engines]
    done = known(path, ("engine", "length"))
    for engine, length in wanted:
        if (engine, str(length)) in done:
            continue
        note(path)
        found = measure(length, engine)
        append(path, {
            "engine": engine, "length": length, "kl": f"{found.kl:.4g}",
            **{arm: f"{value:.4g}" for arm, value in found.relative.items()},
            "shared": f"{found.shared:.4g}", "error": f"{found.error:.2g}",
            "n_star": "" if found.n_star is None else f"{found.n_star:.3g}",
        })
        print(engine, length, found, flush=True)
