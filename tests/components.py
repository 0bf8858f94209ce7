"""The parts that a loss is made of: the one place from which tests take their lists.

A new part stands here as soon as it is in its module and its table. Parts without defaults have
their arguments in `ARGUMENTS`; variants that deserve the same tests stand beside the tables.
"""

import dataclasses
import inspect

import iscorrect as ic
from iscorrect.loss import aggregate, bounds, caps, objectives, presets, rules

ARGUMENTS = {
    "seq-mean-token-sum-norm": {"horizon": 20}, "DivergenceAbove": {"limit": 0.1},
    "ByAge": {"limit": 2, "fresh": ic.Truncate(2.0), "stale": ic.Mask(0.5, 1.5)},
}
"""Of the parts that have no defaults."""


def parts(module):
    """The frozen specs that a module defines, by the names of their classes."""
    return {
        name: value for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__
        and dataclasses.is_dataclass(value)
    }


def made(table):
    """Each part of a table with its defaults, or with its `ARGUMENTS`."""
    return {name: make(**ARGUMENTS.get(name, {})) for name, make in table.items()}


OBJECTIVES = made(ic.OBJECTIVES) | {
    "dual-ppo-clip": ic.PPOClip(dual=3.0),
    "gspo": ic.PPOClip(level="geometric"),
    "sequence-ppo-clip": ic.PPOClip(level="sequence"),
    "prefix-ppo-clip": ic.PPOClip(level="prefix"),
    "capped-ppo-clip": ic.PPOClip(low=None, high=None, cap=1.2),
}
AGGREGATIONS = made(ic.AGGREGATIONS)
DIVIDED = {name: how for name, how in AGGREGATIONS.items() if name != "sum"}
"""Those that take a normalizer."""
BOUNDS, RULES, CAPS = (made(parts(module)) for module in (bounds, rules, caps))
CORRECTIONS = made(ic.PRESETS) | {
    "normalised": ic.Correction(level="sequence", normalize=True),
    "prefix": ic.Correction(level="prefix", bound=ic.Truncate(1.5)),
    "veto": ic.Correction(reject=(ic.Veto(low=0.9),)),
    "ionides": ic.Correction(level="sequence", bound=ic.Truncate(ic.IonidesCap())),
    "mse": ic.Correction(bound=ic.Truncate(ic.MSEOptimalCap())),
    "ess": ic.Correction(level="sequence", bound=ic.Mask(high=ic.ESSCap(0.7))),
}

TABLES = {
    "OBJECTIVES": (ic.OBJECTIVES, set(parts(objectives).values())),
    "AGGREGATIONS": (ic.AGGREGATIONS, set(parts(aggregate).values())),
    "PRESETS": (ic.PRESETS, {
        value for name, value in vars(presets).items()
        if inspect.isfunction(value) and value.__module__ == presets.__name__
        and not name.startswith("_")
    }),
}
"""Each table of the library, and what its module defines to be in it."""


def losses():
    """Every preset, and every objective with a penalty and means over sequences."""
    for name, preset in ic.PRESETS.items():
        yield name, ic.PolicyLoss(correction=preset())
    for name, objective in {
        "ppo": ic.PPOClip(dual=3.0), "gspo": ic.PPOClip(level="geometric"), "cispo": ic.CISPO(),
        "prefix": ic.PPOClip(level="prefix"), "sapo": ic.SAPO(), "gmpo": ic.GMPO(),
        "vespo": ic.VESPO(), "aspo": ic.ASPO(),
    }.items():
        yield name, ic.PolicyLoss(
            correction=ic.token_tis(), objective=objective, reference_kl=ic.ReferenceKL(),
            aggregation="seq-mean-token-mean",
        )


LOSSES = dict(losses())
