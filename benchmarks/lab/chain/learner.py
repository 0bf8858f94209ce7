"""A policy that learns on the chain from an engine that may be behind, or round."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.lab.chain.engines import Engine, plain
from benchmarks.lab.chain.policy import Parameters, logits, to_bits
from benchmarks.lab.chain.world import World, ahead, divergence

Optimizer = Literal["adam", "sgd"]


class View(NamedTuple):
    """The three policies on all contexts, log-probs in nats, float64 "s p t v".

    Attributes:
        policy: log π, with gradient.
        rollout: log π_old, the trainer's at the weights that the engine holds.
        engine: log μ.
    """

    policy: Tensor
    rollout: Tensor
    engine: Tensor


class Holder:
    """Weights, their optimiser, and those of earlier steps for the engine.

    Args:
        start: weights to start from.
        engine: what samples.
        optimizer: "adam", with the settings that FP16 runs need (ε = 1e-15), or plain "sgd".
        rate: the learning rate.
    """

    def __init__(self, start: Parameters, engine: Engine, *, optimizer: Optimizer, rate: float):
        self.engine = engine
        self.weights = {name: x.clone().requires_grad_() for name, x in start.items()}
        self.held: deque[Parameters] = deque(maxlen=engine.behind + 1)
        parameters = [*self.weights.values()]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, lr=rate) if optimizer == "sgd" else
            torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), eps=1e-15, weight_decay=0)
        )

    def hold(self) -> Parameters:
        """The weights that the engine has at this step; call once a step."""
        self.held.append({name: x.detach().clone() for name, x in self.weights.items()})
        return self.held[0]

    def ascend(self, gain: Tensor, clip: float | None = None) -> None:
        """One step of the optimiser; ``clip`` bounds the gradient's norm."""
        self.optimizer.zero_grad()
        (-gain).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.weights.values(), clip)
        self.optimizer.step()


class Learner(Holder):
    """A policy in a world, and the engine that samples for it.

    Args:
        world: where it learns.
        start: weights to start from.
        engine: what samples.
        optimizer: as in :class:`Holder`.
        rate: the learning rate.
        seed: of the features' nuisance and of the engine's noise.
    """

    def __init__(
        self, world: World, start: Parameters, engine: Engine, *, optimizer: Optimizer,
        rate: float, seed: int,
    ):
        super().__init__(start, engine, optimizer=optimizer, rate=rate)
        self.world = world
        self.features = torch.empty(0)
        self.features_seed = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator().manual_seed(seed + 1)

    def look(self) -> View:
        """All contexts, their nuisance drawn anew, as trainer and engine see them now."""
        features = self.features = self.world.features(self.features_seed)
        held = self.hold()
        policy = logits(self._on_grid(self.weights), features).double().log_softmax(-1)
        with torch.no_grad():
            stale = self._on_grid(held)
            rollout = (
                logits(stale, features).double().log_softmax(-1) if self.engine.behind
                else policy.detach()
            )
            engine = (
                rollout if self.engine.sampler is plain
                else self.engine.sampler(stale, features, self.noise).double().log_softmax(-1)
            )
        return View(policy, rollout, engine)

    def _on_grid(self, weights: Mapping[str, Tensor]) -> Parameters:
        """Rounded to the engine's bits, the gradient as if they were not."""
        if self.engine.bits is None:
            return {**weights}
        return {
            name: x + (to_bits(x.detach(), self.engine.bits) - x.detach())
            for name, x in weights.items()
        }


class State(NamedTuple):
    """What is recorded of a step.

    Attributes:
        j_policy: J(π).
        j_engine: J(μ).
        kl: KL(μ‖π), nats per sequence.
    """

    j_policy: float
    j_engine: float
    kl: float


def state_of(world: World, view: View) -> State:
    """Means over the prompts, exact."""
    policy, engine = view.policy.detach(), view.engine
    return State(
        ahead(world, policy.exp()).reward.mean().item(),
        ahead(world, engine.exp()).reward.mean().item(),
        divergence(world, engine, policy).mean().item(),
    )
