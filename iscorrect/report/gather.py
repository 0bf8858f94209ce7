"""One pass over a dump: sums over every token, and a sample of whole sequences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iscorrect.diagnose import Advice, Finding, Tokens, advise, diagnose
from iscorrect.dumps import (
    LogProbDump,
    concatenate,
)
from iscorrect.errors import input_error
from iscorrect.layout import Layout, masked
from iscorrect.loss.correction import Correction
from iscorrect.loss.metrics import Metrics
from iscorrect.loss.pareto import pareto_tail
from iscorrect.loss.presets import uncorrected
from iscorrect.loss.ratios import at_level, ratio, units
from iscorrect.loss.specs import parse

SAMPLE = 2**20

CORRECTIONS = (
    "uncorrected", "token-tis:cap=2", "icepop", "sequence-tis:cap=2", "sequence-mis:high=3",
)

WORST_GROUPS = 5

MOST_PLACES = 12  # steps and versions that are listed: those with the largest k3

EDGES = {
    "position": (0, 16, 64, 256, 1024, 4096),
    "length": (0, 64, 256, 1024, 4096, 16384),
    "rollout probability": (0.0, 0.1, 0.5, 0.9, 0.99),
}


@dataclass(frozen=True)
class Report:
    """What is known about a dump.

    Attributes:
        source: the files, as one phrase.
        sequences: how many.
        metrics: by flat name; `mismatch/…` and `tail/…` of every token, `batch/…` counts.
        corrections: for each, its `is/…` and `is/bias_mass`.
        places: where the mismatch is; rows of place, share of tokens, k3, share outside [0.5, 2].
        findings: likely causes.
        advice: what to do.
        sample: the sequences that findings and figures rest on.
    """

    source: str
    sequences: int
    metrics: dict[str, float]
    corrections: dict[str, dict[str, float]]
    places: list[dict[str, Any]]
    findings: list[Finding]
    advice: list[Advice]
    sample: LogProbDump

    def to_json(self) -> dict[str, Any]:
        """Everything but the sample, as JSON can hold it; what is not finite becomes None."""
        content = {
            "source": self.source,
            "sequences": self.sequences,
            "metrics": self.metrics,
            "corrections": self.corrections,
            "places": self.places,
            "findings": [asdict(finding) for finding in self.findings],
            "advice": [asdict(advice) for advice in self.advice],
            "sample": {"sequences": len(self.sample), "tokens": self.sample.num_tokens},
        }
        finite: dict[str, Any] = _finite(content)
        return finite


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, list):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


@dataclass
class _Sums:
    """Sums over one place: tokens, k3, and tokens whose ratio lies outside [0.5, 2]."""

    tokens: float = 0.0
    k3: float = 0.0
    outside: float = 0.0

    def add(self, tokens: float, k3: float, outside: float) -> None:
        self.tokens += tokens
        self.k3 += k3
        self.outside += outside


@dataclass
class _Pass:
    """What one pass over the pieces of a dump accumulates."""

    corrections: dict[str, Correction]
    seed: int = 0
    metrics: dict[str, Metrics] = field(default_factory=dict)
    distance: dict[str, float] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)
    moments: Any = field(default_factory=lambda: np.zeros(6))
    outside: float = 0.0
    lengths: list[Any] = field(default_factory=list)
    log_ratios: list[Any] = field(default_factory=list)
    places: dict[tuple[str, int], _Sums] = field(default_factory=dict)
    kept: list[LogProbDump] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    chance: float = 1.0
    sequences: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def add(self, dump: LogProbDump) -> None:
        """Take a piece in."""
        layout = Layout(dump.mask)
        old, rollout = dump.old_log_probs, dump.rollout_log_probs
        d = masked(old - rollout, dump.mask)
        for name, correction in self.corrections.items():
            out = correction(
                old_log_probs=old, rollout_log_probs=rollout, mask=layout,
                advantages=dump.advantages,
            )
            level = correction.level
            ones = units(layout, level)
            raw = ratio(at_level(d, layout, level))
            weight = out.weights
            if level not in ("token", "prefix"):
                weight = layout.sequence_max(weight)
            distance = masked((raw - weight).abs(), ones).sum(dtype=torch.float64)
            self.distance[name] = self.distance.get(name, 0.0) + float(distance)
            self.units[name] = self.units.get(name, 0.0) + float(torch.count_nonzero(ones))
            self.metrics[name] = (
                self.metrics[name] + out.metrics if name in self.metrics else out.metrics
            )
        self._sums(dump, d)
        self._sample(dump)

    def _sums(self, dump: LogProbDump, d: Tensor) -> None:
        mask = dump.mask
        counts = torch.count_nonzero(mask, dim=1)
        some = counts > 0
        self.sequences += len(mask)
        self.lengths.append(counts[some].numpy())
        self.log_ratios.append(d.sum(1, dtype=torch.float64)[some].numpy())
        p, q = masked(dump.rollout_log_probs, mask).exp(), masked(dump.old_log_probs, mask).exp()
        p, q = masked(p, mask), masked(q, mask)
        self.moments += [
            float(torch.count_nonzero(mask)),
            *(float(x.sum(dtype=torch.float64)) for x in (p, q, p * p, q * q, p * q)),
        ]
        k3 = torch.expm1(d.clamp(max=30)) - d
        outside = (d.abs() > math.log(2)).float()
        self.outside += float(outside.sum(dtype=torch.float64))
        position = dump.mask.cumsum(1) - 1
        self._bin("position", position, mask=mask, k3=k3, outside=outside)
        length = counts[:, None].expand_as(mask)
        self._bin("length", length, mask=mask, k3=k3, outside=outside)
        self._bin("rollout probability", p, mask=mask, k3=k3, outside=outside)
        for name in ("step", "policy_version"):
            values = getattr(dump, name)
            if values is None:
                continue
            for value in values.unique().tolist():
                rows = values == value
                self._place(name, value, mask[rows], k3[rows], outside[rows])

    def _bin(
        self, name: str, x: Tensor, *, mask: Tensor, k3: Tensor, outside: Tensor
    ) -> None:
        edges = EDGES[name]
        inner = torch.tensor(edges[1:], dtype=torch.float32)
        index = torch.bucketize(x.float(), inner, right=True)
        index = torch.where(mask, index, len(edges)).flatten()

        def total(values: Tensor) -> list[float]:
            sums = torch.bincount(index, weights=values.flatten().double(), minlength=len(edges))
            result: list[float] = sums.tolist()
            return result

        sums = list(zip(total(mask), total(k3), total(outside), strict=True))
        for i, of_bin in enumerate(sums[: len(edges)]):
            if of_bin[0]:
                self.places.setdefault((name, i), _Sums()).add(*of_bin)

    def _place(self, name: str, key: int, mask: Tensor, k3: Tensor, outside: Tensor) -> None:
        self.places.setdefault((name, key), _Sums()).add(
            float(torch.count_nonzero(mask)), float(k3.sum(dtype=torch.float64)),
            float(outside.sum(dtype=torch.float64)),
        )

    def _sample(self, dump: LogProbDump) -> None:
        """Keep every sequence whose random key is below a bar that falls as the sample fills."""
        keys = torch.rand(len(dump), generator=self.generator)
        self.kept.append(dump.rows(keys < self.chance))
        self.keys.append(keys[keys < self.chance])
        while sum(part.mask.numel() for part in self.kept) > SAMPLE and self.chance > 1e-9:
            self.chance /= 2
            self.kept = [
                part.rows(key < self.chance) for part, key in zip(self.kept, self.keys, strict=True)
            ]
            self.keys = [key[key < self.chance] for key in self.keys]

    def pearson(self) -> float:
        """Correlation of the probabilities; NaN where one side is constant."""
        n, p, q, pp, qq, pq = self.moments
        spread = (n * pp - p * p) * (n * qq - q * q)
        return float((n * pq - p * q) / math.sqrt(spread)) if spread > 0 else math.nan

    def slope(self) -> float:
        """Of log-ratio on length, nats per 1,000 tokens; through the origin where lengths agree."""
        length = np.concatenate(self.lengths).astype(float)
        total = np.concatenate(self.log_ratios)
        if len(length) > 2 and length.std() > 0.05 * length.mean():
            return float(1000 * np.cov(length, total)[0, 1] / length.var(ddof=1))
        return float(1000 * total.sum() / length.sum())


def summarise(
    pieces: Iterable[LogProbDump],
    *,
    source: str = "dump",
    corrections: Sequence[str] = CORRECTIONS,
    null: LogProbDump | None = None,
    samples: int | None = None,
    length: int | None = None,
) -> Report:
    """Gather a report in one pass.

    Args:
        pieces: of the dump, as :func:`iscorrect.dumps.stream_dump` yields them.
        source: what the report calls the dump.
        corrections: to compare, as :func:`iscorrect.parse` reads them.
        null: the same policy scored twice.
        samples: sequences in one update; None: all of the dump's.
        length: tokens of a sequence; None: their mean length.

    Returns:
        The report.

    Raises:
        InputError: an unreadable dump, an unknown correction, or no token that counts.
    """
    specs = {name: parse(name) for name in corrections}
    gathered = _Pass({"": uncorrected(), **specs})
    for piece in pieces:
        gathered.add(piece)
    sample = concatenate([part for part in gathered.kept if len(part)] or gathered.kept)
    tokens = gathered.moments[0]
    if not tokens or not sample.num_tokens:
        raise input_error(
            "report", "dump", expected="with counted tokens", got=f"{tokens:.0f} in {source}",
            fix="dump the tokens that enter the loss, with their mask",
        )
    findings = diagnose(sample, null=null)
    mean_length = float(np.concatenate(gathered.lengths).mean())
    d = torch.from_numpy(Tokens.of(sample).d)[None]
    base = gathered.metrics.pop("").to_floats()
    metrics = {name: x for name, x in base.items() if not name.startswith("is/")}
    metrics |= {
        "batch/sequences": float(gathered.sequences),
        "batch/length": mean_length,
        "mismatch/pearson": gathered.pearson(),
        "mismatch/sequence_slope": gathered.slope(),
        "tail/outside": gathered.outside / tokens,
        "tail/pareto_k": float(pareto_tail(d, d.isfinite()).k),
    }
    compared = {}
    for name in specs:
        values = gathered.metrics[name].to_floats()
        compared[name] = {key: x for key, x in values.items() if key.startswith("is/")}
        compared[name]["is/bias_mass"] = gathered.distance[name] / max(gathered.units[name], 1)
    return Report(
        source=source, sequences=gathered.sequences, metrics=metrics, corrections=compared,
        places=_places(gathered.places, tokens) + _worst_groups(sample),
        findings=findings, sample=sample,
        advice=advise(
            sample, samples=samples or gathered.sequences, length=length or round(mean_length),
            findings=findings,
        ),
    )


def _places(places: dict[tuple[str, int], _Sums], tokens: float) -> list[dict[str, Any]]:
    rows = []
    dated = sorted(s.k3 / s.tokens for (name, _), s in places.items() if name not in EDGES)
    least = dated[-MOST_PLACES - 1] if len(dated) > MOST_PLACES else -1.0
    for (name, key), sums in sorted(places.items()):
        edges = EDGES.get(name)
        if edges is None and sums.k3 / sums.tokens <= least:
            continue
        if edges is None:
            label = f"{name.replace('_', ' ')} {key}"
        elif key + 1 < len(edges):
            label = f"{name} {edges[key]:g} to {edges[key + 1]:g}"
        else:
            label = f"{name} from {edges[key]:g}"
        rows.append({
            "place": label, "tokens": sums.tokens / tokens, "kl_k3": sums.k3 / sums.tokens,
            "outside": sums.outside / sums.tokens,
        })
    return rows


def _worst_groups(sample: LogProbDump) -> list[dict[str, Any]]:
    """The groups of the sample with the largest k3; shares are of the sample."""
    tokens = Tokens.of(sample)
    if tokens.group is None:
        return []
    groups, inverse = np.unique(tokens.group[tokens.row], return_inverse=True)
    count = np.bincount(inverse)
    k3 = np.bincount(inverse, weights=np.expm1(np.minimum(tokens.d, 30)) - tokens.d) / count
    outside = np.bincount(inverse, weights=np.abs(tokens.d) > math.log(2)) / count
    return [
        {
            "place": f"group {groups[i]}", "tokens": float(count[i] / len(tokens)),
            "kl_k3": float(k3[i]), "outside": float(outside[i]),
        }
        for i in np.argsort(-k3)[:WORST_GROUPS]
    ]
