"""What corrections do to given rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from einops import repeat
from torch import Tensor

from iscorrect.dumps import LogProbDump
from iscorrect.errors import InputError
from iscorrect.layout import Layout, masked
from iscorrect.loss.correction import Correction, Weights
from iscorrect.loss.metrics import Metrics
from iscorrect.loss.ratios import at_level, log_ratio, ratio, units
from iscorrect.text import number, percent

HEADER = (
    "correction", "ESS", "kept weight", "max weight", "bounded", "rejected", "bias mass",
)


def _age(dump: LogProbDump) -> Tensor | None:
    """The trainer's version less the token's, "b t"; None where the dump does not have both."""
    version = dump.version
    if version is None and dump.policy_version is not None:
        version = dump.policy_version[:, None].expand_as(dump.mask)
    if version is None or dump.step is None or {"version", "policy_version"} & dump.names.keys():
        return None
    return dump.step[:, None] - version


@dataclass
class Effects:
    """What each of some corrections does to the pieces of a dump, taken in one after the other.

    Args:
        corrections: by name. One that looks at a whole batch looks at each piece.

    >>> from iscorrect import sequence_tis
    >>> from iscorrect.cli.rollouts import shipped_rollouts
    >>> effects = Effects({"mine": sequence_tis()})
    >>> effects.add(shipped_rollouts("sharp", "bfloat16", "bfloat16"))
    >>> 0.5 < effects.floats()["mine"]["is/ess"] < 0.9
    True
    """

    corrections: Mapping[str, Correction]
    pieces: int = 0
    metrics: dict[str, Metrics] = field(default_factory=dict)
    distance: dict[str, float] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    signed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def add(self, dump: LogProbDump) -> None:
        """Take a piece in."""
        self.pieces += 1
        finite = dump.old_log_probs.isfinite() & dump.rollout_log_probs.isfinite()
        layout = Layout(dump.mask & finite, segment_ids=dump.turn)
        d = log_ratio(dump.old_log_probs, dump.rollout_log_probs, layout)
        signs = None if dump.advantages is not None else self._random_signs(dump.mask)
        for name, correction in self.corrections.items():
            out = self._weigh(name, dump, signs)
            level = correction.level
            ones = units(layout, level)
            raw = ratio(at_level(d, layout, level))
            weight = out.weights
            if level not in ("token", "prefix"):
                of_unit = layout.segment_max if level == "segment" else layout.sequence_max
                weight = of_unit(weight)
            distance = masked((raw - weight).abs(), ones).sum(dtype=torch.float64)
            self.distance[name] = self.distance.get(name, 0.0) + float(distance)
            self.units[name] = self.units.get(name, 0) + int(torch.count_nonzero(ones))
            before = self.metrics.get(name)
            self.metrics[name] = out.metrics if before is None else before + out.metrics

    def _weigh(self, name: str, dump: LogProbDump, signs: Tensor | None) -> Weights:
        def weigh(advantages: Tensor | None) -> Weights:
            return self.corrections[name](
                old_log_probs=dump.old_log_probs, rollout_log_probs=dump.rollout_log_probs,
                mask=layout, advantages=advantages,
            )

        layout = Layout(dump.mask, segment_ids=dump.turn, age=_age(dump))
        try:
            return weigh(dump.advantages)
        except InputError:
            if signs is None:
                raise
        weights = weigh(signs)  # it looks at advantages, which this dump does not have
        if name not in self.signed:
            self.signed.append(name)
        return weights

    def _random_signs(self, mask: Tensor) -> Tensor:
        """+1 or −1 for each row of a mask; "b t"."""
        signs = 2 * torch.randint(2, (len(mask),), generator=self.generator) - 1
        return repeat(signs.float(), "b -> b t", t=mask.shape[1])

    def floats(self) -> dict[str, dict[str, float]]:
        """The metrics of each correction, and `is/bias_mass`.

        The bias mass is the mean distance between the ratio at the correction's level and the
        weight that the correction gives in its place.
        """
        return {
            name: metrics.to_floats()
            | {"is/bias_mass": self.distance[name] / max(self.units[name], 1)}
            for name, metrics in self.metrics.items()
        }

    def notes(self) -> list[str]:
        """What a reader must know of how they were applied."""
        notes = []
        if self.signed:
            notes.append(
                f"No advantages in the dump: {', '.join(self.signed)} got a sign at random for"
                " each sequence."
            )
        whole = [name for name, c in self.corrections.items() if c.scope == "batch"]
        if whole and self.pieces > 1:
            notes.append(
                f"{', '.join(whole)} looks at a whole batch: here at each of {self.pieces:,} pieces"
                " of the dump."
            )
        return notes


def effects(pieces: Iterable[LogProbDump], corrections: Mapping[str, Correction]) -> Effects:
    """What corrections do to the pieces of a dump.

    Args:
        pieces: at least one.
        corrections: by name.
    """
    seen = Effects(corrections)
    for piece in pieces:
        seen.add(piece)
    return seen


def effect_row(name: str, values: Mapping[str, float]) -> list[str]:
    """A line of the table under :data:`HEADER`.

    Args:
        name: what the line is called.
        values: what :meth:`Effects.floats` has for it.
    """
    bounded = values.get("is/bounded")
    return [
        name, number(values["is/ess"]), number(values["is/kept_weight"]),
        number(values["is/weight/max"]), "–" if bounded is None else percent(bounded),
        percent(values["is/rejected"]), number(values["is/bias_mass"]),
    ]
