"""One pass over a dump: sums over every token, and a sample of whole sequences.

Sums are taken over every token in one pass, so memory does not grow with the dump. Causes, figures
and quantiles rest on a uniform sample of whole sequences, of at most ``SAMPLE`` tokens; a longer
sequence is a sample of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from iscorrect.diagnose import Advice, Finding, advise, diagnose
from iscorrect.dumps import LogProbDump, Tokens
from iscorrect.dumps.dump import UNITS
from iscorrect.dumps.names import Array
from iscorrect.errors import input_error
from iscorrect.loss.pareto import pareto_tail
from iscorrect.loss.presets import uncorrected
from iscorrect.loss.specs import parse
from iscorrect.report.effects import Effects
from iscorrect.text import finite

SAMPLE = 2**20

CORRECTIONS = (
    "uncorrected", "token-tis:cap=2", "icepop", "sequence-tis:cap=2", "sequence-mis:high=3",
)

WORST_GROUPS = 5

MOST_PLACES = 12  # steps, versions, engines … that are listed: those with the largest k3

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
        notes: how the corrections were applied and what was left out, where that is not plain.
        places: where the mismatch is; rows of place, share of tokens, k3, share outside [0.5, 2].
        findings: likely causes.
        advice: what to do.
        sample: the tokens of the sequences that findings and figures rest on.
    """

    source: str
    sequences: int
    metrics: dict[str, float]
    corrections: dict[str, dict[str, float]]
    notes: list[str]
    places: list[dict[str, Any]]
    findings: list[Finding]
    advice: list[Advice]
    sample: Tokens

    def to_json(self) -> dict[str, Any]:
        """Everything but the sample, as JSON can hold it; what is not finite becomes None."""
        content = {
            "source": self.source,
            "sequences": self.sequences,
            "metrics": self.metrics,
            "corrections": self.corrections,
            "notes": self.notes,
            "places": self.places,
            "findings": [asdict(finding) for finding in self.findings],
            "advice": [asdict(advice) for advice in self.advice],
            "sample": {"sequences": self.sample.count, "tokens": len(self.sample)},
        }
        held: dict[str, Any] = finite(content)
        return held


class _Sums:
    """Sums over every token, by place, and over every sequence."""

    def __init__(self) -> None:
        self.tokens = 0
        self.outside = 0.0
        self.probabilities = np.zeros(5)  # of p, q, p², q², p q
        self.lengths = np.zeros(5)  # of 1, length, length², log-ratio, length × log-ratio
        self.places: dict[tuple[str, int | str], Array] = {}

    def add(self, tokens: Tokens) -> None:
        self.tokens += len(tokens)
        self.outside += float(np.count_nonzero(tokens.outside))
        p, q = np.exp(tokens.rollout), np.exp(tokens.old)
        self.probabilities += [x.sum() for x in (p, q, p * p, q * q, p * q)]
        length = np.bincount(tokens.row, minlength=tokens.count)
        total = np.bincount(tokens.row, weights=tokens.d, minlength=tokens.count)
        x = length.astype(float)
        self.lengths += [
            np.count_nonzero(length), x.sum(), (x * x).sum(), total.sum(), (x * total).sum(),
        ]
        values = [None, tokens.k3, tokens.outside]
        for name, of_token in (
            ("position", tokens.position), ("length", length[tokens.row]),
            ("rollout probability", p),
        ):
            index = np.searchsorted(EDGES[name][1:], of_token, "right")
            self._place(name, range(len(EDGES[name])), index, values)
        step = None if tokens.step is None else tokens.step[tokens.row]
        for name, unit in (("step", step), *((name, getattr(tokens, name)) for name in UNITS)):
            if unit is not None:
                keys, index = np.unique(unit, return_inverse=True)
                texts = tokens.names.get(name)
                labels = keys.tolist() if texts is None else [texts[key] for key in keys]
                self._place(name, labels, index, values)

    def _place(
        self, name: str, keys: Sequence[int | str], index: Array, values: list[Array | None]
    ) -> None:
        """Add to each place the number of its tokens and the sums of their values.

        Args:
            name: of the kind of place.
            keys: which places there are.
            index: int "n", the place of each token.
            values: "n" each; None for ones.
        """
        sums = np.stack([np.bincount(index, weights=x, minlength=len(keys)) for x in values])
        for key, of_place in zip(keys, sums.T, strict=True):
            if of_place[0]:
                self.places[name, key] = self.places.get((name, key), np.zeros(3)) + of_place

    def pearson(self) -> float:
        """Correlation of the probabilities; NaN where one side is constant."""
        n = self.tokens
        p, q, pp, qq, pq = self.probabilities
        spread = (n * pp - p * p) * (n * qq - q * q)
        return float((n * pq - p * q) / math.sqrt(spread)) if spread > 0 else math.nan

    def mean_length(self) -> float:
        """Tokens of a sequence that has any."""
        return float(self.lengths[1] / self.lengths[0])

    def slope(self) -> float:
        """Of log-ratio on length, nats per 1,000 tokens; through the origin where lengths agree."""
        count = self.lengths[0]
        _, x, xx, y, xy = self.lengths / count
        variance = xx - x * x
        if count > 2 and variance > (0.05 * x) ** 2:
            return float(1000 * (xy - x * y) / variance)
        return float(1000 * y / x)


class _Sample:
    """Whole sequences with the smallest of random keys, which is a uniform sample."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)
        self.parts: list[Tokens] = []
        self.keys: list[Array] = []
        self.bar = 1.0

    def add(self, tokens: Tokens) -> None:
        """Take the tokens of a piece in."""
        keys = self.generator.random(tokens.count)
        self._keep(tokens, keys)
        while sum(map(len, self.parts)) > SAMPLE and sum(map(len, self.keys)) > 1:
            together = np.sort(np.concatenate(self.keys))
            self.bar = together[(len(together) - 1) // 2]
            before = zip(self.parts, self.keys, strict=True)
            self.parts, self.keys = [], []
            for part, of_part in before:
                self._keep(part, of_part)

    def _keep(self, tokens: Tokens, keys: Array) -> None:
        below = keys <= self.bar
        if below.any():
            self.parts.append(tokens if below.all() else tokens.of_sequences(below))
            self.keys.append(keys[below])

    def joined(self) -> Tokens:
        """The sample; at least one piece was added."""
        return Tokens.join(self.parts)


def summarise(
    pieces: Iterable[LogProbDump],
    *,
    source: str = "dump",
    corrections: Sequence[str] = CORRECTIONS,
    null: Tokens | LogProbDump | None = None,
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
    whole = Effects({"uncorrected": uncorrected()})
    compared = Effects({name: parse(name) for name in corrections})
    sums, sampled, sequences, lost = _Sums(), _Sample(), 0, 0
    fields: list[set[str]] = []
    for piece in pieces:
        fields.append(set(piece.given()))
        whole.add(piece)
        compared.add(piece)
        tokens = Tokens.of(piece)
        sums.add(tokens)
        sampled.add(tokens)
        sequences += len(piece)
        lost += tokens.lost
    if not sums.tokens:
        raise input_error(
            "report", "dump", expected="with counted tokens that both sides have a log-prob for",
            got=f"none in {source}", fix="dump the tokens that enter the loss, with their mask",
        )
    sample = sampled.joined()
    d = torch.from_numpy(sample.d)[None]
    metrics = {n: x for n, x in whole.floats()["uncorrected"].items() if not n.startswith("is/")}
    metrics |= {
        "batch/sequences": float(sequences),
        "batch/length": sums.mean_length(),
        "batch/nonfinite": float(lost),
        "mismatch/pearson": sums.pearson(),
        "mismatch/sequence_slope": sums.slope(),
        "tail/outside": sums.outside / sums.tokens,
        "tail/pareto_k": float(pareto_tail(d, d.isfinite()).k),
    }
    findings = diagnose(sample, null=null)
    return Report(
        source=source, sequences=sequences, metrics=metrics,
        corrections={
            name: {key: x for key, x in values.items() if key.startswith("is/")}
            for name, values in compared.floats().items()
        },
        notes=compared.notes() + _missing(fields),
        places=_places(sums) + _worst_groups(sample),
        findings=findings, sample=sample,
        advice=advise(
            sample, samples=samples or sequences, length=length or round(sums.mean_length()),
            findings=findings,
        ),
    )


def _missing(fields: list[set[str]]) -> list[str]:
    missing = sorted(fields[0].union(*fields) - fields[0].intersection(*fields))
    if not missing:
        return []
    return [f"Not in every part of the dump, and so not used for causes: {', '.join(missing)}."]


def _places(sums: _Sums) -> list[dict[str, Any]]:
    rows = []
    in_order = sorted(sums.places.items(), key=lambda x: (x[0][0], isinstance(x[0][1], str), x[0]))
    least: dict[str, float] = {}
    for kind in {name for name, _ in sums.places} - EDGES.keys():
        sizes = sorted(k3 / n for (name, _), (n, k3, _) in sums.places.items() if name == kind)
        least[kind] = sizes[-MOST_PLACES] if len(sizes) > MOST_PLACES else -1.0
    for (name, key), (tokens, k3, outside) in in_order:
        edges = EDGES.get(name)
        if edges is None and k3 / tokens < least[name]:
            continue
        if edges is None or isinstance(key, str):
            label = f"{name} {key}"
        elif key + 1 < len(edges):
            label = f"{name} {edges[key]:g} to {edges[key + 1]:g}"
        else:
            label = f"{name} from {edges[key]:g}"
        rows.append({
            "place": label, "tokens": float(tokens / sums.tokens), "kl_k3": float(k3 / tokens),
            "outside": float(outside / tokens),
        })
    return rows


def _worst_groups(sample: Tokens) -> list[dict[str, Any]]:
    """The groups of the sample with the largest k3; shares are of the sample."""
    if sample.group is None:
        return []
    groups, inverse = np.unique(sample.group[sample.row], return_inverse=True)
    count = np.bincount(inverse)
    k3 = np.bincount(inverse, weights=sample.k3) / count
    outside = np.bincount(inverse, weights=sample.outside) / count
    return [
        {
            "place": f"group {sample.label('group', groups[i])}",
            "tokens": float(count[i] / len(sample)), "kl_k3": float(k3[i]),
            "outside": float(outside[i]),
        }
        for i in np.argsort(-k3)[:WORST_GROUPS]
    ]
