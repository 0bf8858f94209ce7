"""What is known about a dump, gathered in one pass.

Means are over every token. Causes, figures and quantiles rest on a uniform sample of whole
sequences, of at most ``SAMPLE`` tokens; a longer sequence is a sample of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from iscorrect.diagnose import Advice, Finding, advise, diagnose, shared_error
from iscorrect.dumps import LogProbDump, Tokens
from iscorrect.errors import input_error
from iscorrect.loss.pareto import pareto_tail
from iscorrect.loss.presets import uncorrected
from iscorrect.loss.specs import parse
from iscorrect.report.effects import Effects
from iscorrect.report.sums import EDGES, Means, Rows, Sample, Sums, copies
from iscorrect.text import finite

CORRECTIONS = (
    "uncorrected", "token-tis:cap=2", "icepop", "sequence-tis:cap=2", "sequence-mis:high=3",
)

WORST_GROUPS = 5

MOST_PLACES = 12  # steps, versions, engines … that are listed: those with the largest k3


@dataclass(frozen=True)
class Report:
    """What is known about a dump.

    Attributes:
        source: the files, as one phrase.
        sequences: how many.
        metrics: by flat name; `mismatch/…` and `tail/…` of every token, `batch/…` counts.
        corrections: for each, its `is/…` and `is/bias_mass`.
        notes: how the corrections were applied and what was left out, where that is not plain.
        errors: standard errors of means over tokens, by metric; clustered by group, or without
            groups by sequence.
        places: where the mismatch is; rows of place, share of tokens, k3 and its standard error,
            share outside [0.5, 2], ESS of token weights, and how many sequences and clusters.
        findings: likely causes.
        advice: what to do.
        sample: the tokens of the sequences that findings and figures rest on.
        rows: what each sequence adds to the means.
    """

    source: str
    sequences: int
    metrics: dict[str, float]
    errors: dict[str, float]
    corrections: dict[str, dict[str, float]]
    notes: list[str]
    places: list[dict[str, Any]]
    findings: list[Finding]
    advice: list[Advice]
    sample: Tokens
    rows: Rows

    def to_json(self) -> dict[str, Any]:
        """Everything but the sample, as JSON can hold it; what is not finite becomes None."""
        content = {
            "source": self.source,
            "sequences": self.sequences,
            "metrics": self.metrics,
            "errors": self.errors,
            "corrections": self.corrections,
            "notes": self.notes,
            "places": self.places,
            "findings": [asdict(finding) for finding in self.findings],
            "advice": [asdict(advice) for advice in self.advice],
            "sample": {"sequences": self.sample.count, "tokens": len(self.sample)},
        }
        held: dict[str, Any] = finite(content)
        return held


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
        samples: sequences in one update; None: those of a step, or all where no steps are known.
        length: tokens of a sequence; None: their mean length.

    Returns:
        The report.

    Raises:
        InputError: an unreadable dump, an unknown correction, or no token that counts.
    """
    whole = Effects({"uncorrected": uncorrected()})
    compared = Effects({name: parse(name) for name in corrections})
    sums, sampled, sequences, lost, unknown = Sums(), Sample(), 0, 0, 0
    fields: list[set[str]] = []
    for piece in pieces:
        fields.append(set(piece.given()))
        whole.add(piece)
        compared.add(piece)
        number = sequences + np.arange(len(piece))
        tokens = replace(Tokens.of(piece), number=number)
        sums.add(tokens)
        sampled.add(tokens)
        sequences += len(piece)
        lost += tokens.lost
        unknown += 0 if tokens.gap is None else int(np.isnan(tokens.gap).sum())
    if not sums.tokens:
        raise input_error(
            "report", "dump", expected="with counted tokens that both sides have a log-prob for",
            got=f"none in {source}", fix="dump the tokens that enter the loss, with their mask",
        )
    rows = Rows.join(sums.rows)
    times = rows.times
    sample = sampled.joined() if times == 1 else _one_of_each(sampled.joined())
    estimates = sums.estimates(rows)
    d = torch.from_numpy(sample.d)[None]
    metrics = {n: x for n, x in whole.floats()["uncorrected"].items() if not n.startswith("is/")}
    metrics |= {name: x.value for name, x in estimates.items() if name not in metrics}
    metrics |= {
        "batch/sequences": float(sequences),
        "batch/length": sums.mean_length(),
        "batch/nonfinite": float(lost),
        "mismatch/pearson": sums.pearson(),
        **sums.growth(),
        "tail/pareto_k": float(pareto_tail(d, d.isfinite()).k),
    }
    for kind, found in shared_error(sample).items():
        metrics |= {
            f"shared/{kind}": found.share, f"shared/{kind}/null": found.null,
            f"shared/{kind}/p_value": found.p_value,
        }
    findings = diagnose(sample, null=null)
    return Report(
        source=source, sequences=sequences, metrics=metrics,
        errors={name: x.error for name, x in estimates.items()},
        corrections={
            name: {key: x for key, x in values.items() if key.startswith("is/")}
            for name, values in compared.floats().items()
        },
        notes=compared.notes() + _missing(fields) + _left_out(times, unknown),
        places=_places(sums) + _worst_groups(sample),
        findings=findings, sample=sample, rows=rows,
        advice=advise(
            sample, samples=samples or max(round(_of_a_step(sums) / times), 1),
            length=length or round(sums.mean_length()), findings=findings,
        ),
    )


def _missing(fields: list[set[str]]) -> list[str]:
    missing = sorted(fields[0].union(*fields) - fields[0].intersection(*fields))
    if not missing:
        return []
    return [f"Not in every part of the dump, and so not used for causes: {', '.join(missing)}."]


def _one_of_each(tokens: Tokens) -> Tokens:
    """The tokens without copies of sequences."""
    keep = np.zeros(tokens.count, dtype=bool)
    keep[np.unique(tokens.row)[np.unique(copies(tokens), return_index=True)[1]]] = True
    return tokens.of_sequences(keep)


def _left_out(times: int, unknown: int) -> list[str]:
    notes = []
    if unknown:
        notes.append(f"The entropy of {unknown:,} counted tokens is not finite; what needs it"
                     " leaves them out.")
    if times > 1:
        notes.append(f"Each sequence is there {times} times, to the bit, as where all ranks that"
                     " hold it write it. Causes and advice rest on one of each.")
    return notes


def _of_a_step(sums: Sums) -> float:
    """Sequences with a token in one step; all of them where no steps are known."""
    steps = sums.places.get("step")
    if steps is None or not steps.sums:
        return sums.sequences
    return sum(map(steps.sequences, steps.sums)) / len(steps.sums)


def _places(sums: Sums) -> list[dict[str, Any]]:
    rows = []
    for name, means in sorted(sums.places.items()):
        k3 = {key: means.mean(key) for key in means.sums}
        edges = EDGES.get(name)
        keys = sorted(k3, key=lambda key: (isinstance(key, str), key))
        largest = sorted(keys, key=lambda key: -k3[key].value)[:MOST_PLACES]
        for key in keys:
            if edges is None and key not in largest:
                continue
            rows.append({
                "place": f"{name} {key}" if edges is None else _range(name, edges, key),
                "tokens": means.tokens(key) / sums.tokens, "kl_k3": k3[key].value,
                "error": k3[key].error, "outside": means.mean(key, 1).value,
                "ess": means.ess(key), "sequences": means.sequences(key),
                "clusters": means.clusters(key),
            })
    return rows


def _range(name: str, edges: Sequence[float], index: int | str) -> str:
    low, high = [*edges, None][int(index)], [*edges, None][int(index) + 1]
    return f"{name} from {low:g}" if high is None else f"{name} {low:g} to {high:g}"


def _worst_groups(sample: Tokens) -> list[dict[str, Any]]:
    """The groups of the sample with the largest k3; shares are of the sample."""
    if sample.group is None:
        return []
    groups, index = np.unique(sample.group[sample.row], return_inverse=True)
    means = Means()
    ratio = np.exp(np.minimum(sample.d, 30))
    values = np.stack([sample.k3, sample.outside, ratio, np.square(ratio)])
    means.add(sample, np.arange(sample.count), values, range(len(groups)), index)
    k3 = [means.mean(i) for i in range(len(groups))]
    return [
        {
            "place": f"group {sample.label('group', groups[i])}",
            "tokens": means.tokens(i) / len(sample), "kl_k3": k3[i].value, "error": k3[i].error,
            "outside": means.mean(i, 1).value, "ess": means.ess(i),
            "sequences": means.sequences(i), "clusters": means.clusters(i),
        }
        for i in sorted(range(len(groups)), key=lambda i: -k3[i].value)[:WORST_GROUPS]
    ]
