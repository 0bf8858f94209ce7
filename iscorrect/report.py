"""A page about a dump: how large the mismatch is, where, why, and what to do.

Sums are taken over every token in one pass, so memory does not grow with the dump. Causes, figures
and quantiles rest on a uniform sample of whole sequences, of at most ``SAMPLE`` tokens.
"""

from __future__ import annotations

import argparse
import base64
import csv
import difflib
import html
import importlib.util
import io
import json
import math
import operator
import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iscorrect.correction import Correction, parse, uncorrected
from iscorrect.diagnose import Advice, Finding, Tokens, advise, diagnose
from iscorrect.dumps import (
    LogProbDump,
    concatenate,
    dump_files,
    read_dump,
    stream_dump,
    write_dump,
)
from iscorrect.errors import InputError, input_error
from iscorrect.layout import Layout, masked
from iscorrect.metrics import Metrics
from iscorrect.pareto import pareto_tail
from iscorrect.plots import FIGURES
from iscorrect.ratios import at_level, ratio, units
from iscorrect.tables import show

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


@dataclass(frozen=True)
class Table:
    """A table: title, header, rows of text."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def headline(report: Report) -> list[tuple[str, str]]:
    """How big, bulk or tail: the first lines of every form of the report."""
    m = report.metrics
    k = m["tail/pareto_k"]
    verdict = "reliable below 0.7" if k < 0.7 else "above 0.7: averages of weights are unreliable"
    return [
        ("dump", f"{report.source} · {report.sequences:,} sequences ·"
                 f" {m['batch/tokens']:,.0f} tokens"),
        ("mismatch", f"k1 {m['mismatch/kl_k1']:.2e} · k3 {m['mismatch/kl_k3']:.2e} nats per token ·"
                     f" χ² {m['mismatch/chi2/token']:.2e}"),
        ("|Δ log p|", f"mean {m['mismatch/log_prob_diff/mean']:.3g} · max"
                      f" {m['mismatch/log_prob_diff/max']:.3g} nats · Pearson of p"
                      f" {m['mismatch/pearson']:.5f}"),
        ("sequences", f"log-ratio {m['mismatch/sequence_slope']:+.3g} nats per 1,000 tokens"),
        ("tail", f"{m['tail/outside']:.2%} of tokens have a ratio outside [0.5, 2] · Pareto k̂"
                 f" {k:.2f} ({verdict})"),
    ]


def tables(report: Report) -> list[Table]:
    """What was found, what to do, what corrections do, and where the mismatch is."""
    return [
        Table("Findings", ("cause", "evidence", "control"), [
            (f.cause, f.evidence, f.confirm) for f in report.findings
        ]),
        Table("What to do", ("advice", "because"), [(a.action, a.because) for a in report.advice]),
        Table(
            "What each correction would do",
            ("correction", "ESS", "kept weight", "bounded", "rejected", "max weight", "bias mass"),
            [
                (
                    name, f"{c['is/ess']:.3f}", f"{c['is/kept_weight']:.3f}",
                    f"{c['is/bounded']:.2%}", f"{c['is/rejected']:.2%}",
                    f"{c['is/weight/max']:.3g}", f"{c['is/bias_mass']:.3g}",
                )
                for name, c in report.corrections.items()
            ],
        ),
        Table("Where", ("place", "tokens", "k3", "ratio outside [0.5, 2]"), [
            (p["place"], f"{p['tokens']:.1%}", f"{p['kl_k3']:.2e}", f"{p['outside']:.2%}")
            for p in report.places
        ]),
    ]


PROSE = ("Findings", "What to do")
NOTE = (
    "ESS is the effective share of the sample, kept weight what remains of a mean ratio of 1, bias"
    " mass the mean distance between the exact ratio at the correction's level and the weight that"
    " it gives."
)


def print_report(report: Report) -> None:
    """The terminal's summary."""
    width = min(shutil.get_terminal_size().columns, 100)
    for name, text in headline(report):
        print(f"{name:<10} {text}")
    for table in tables(report):
        if table.title not in PROSE:
            show(table.title, table.header, table.rows)
            continue
        print(f"\n{table.title}")
        for name, *texts in table.rows:
            print(textwrap.fill(name, width, initial_indent="* ", subsequent_indent="  "))
            for text in texts:
                indent = " " * 4
                print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent))


def to_markdown(report: Report, figures: Iterable[str] = ()) -> str:
    """The report as Markdown, with the figures' files beside it."""
    lines = ["# Mismatch report", ""]
    lines += [f"- **{name}**: {text}" for name, text in headline(report)]
    for table in tables(report):
        lines += ["", f"## {table.title}", "", f"| {' | '.join(table.header)} |",
                  "|" + "---|" * len(table.header)]
        lines += [f"| {' | '.join(x.replace('|', chr(92) + '|') for x in row)} |"
                  for row in table.rows]
        if table.title.startswith("What each"):
            lines += ["", NOTE]
    if figures:
        lines += ["", "## Figures", ""]
        lines += [f"![{name.replace('_', ' ')}](figures/{name}.png)\n" for name in figures]
    return "\n".join(lines) + "\n"


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 68rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem;
  border-bottom: 1px solid #ddd; }
table.numbers th:not(:first-child), table.numbers td:not(:first-child) { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
table.prose td:first-child { font-weight: 600; min-width: 8rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; } figure { margin: 0; } img { width: 100%; height: auto; display: block; }
p.note { color: #555; font-size: .9rem; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; } dt { margin-top: .4rem; }
  table.prose thead { display: none; }
  table.prose tr, table.prose td { display: block; border: 0; padding: .15rem 0; }
  table.prose tr { border-bottom: 1px solid #ddd; padding: .5rem 0; }
}
"""


def to_html(report: Report, figures: dict[str, bytes]) -> str:
    """The report as one file that needs no other; figures by name, as PNG."""
    def cells(tag: str, row: Iterable[str]) -> str:
        return "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row)

    parts = ["<dl>" + "".join(
        f"<dt>{html.escape(n)}</dt><dd>{html.escape(x)}</dd>" for n, x in headline(report)
    ) + "</dl>"]
    for table in tables(report):
        kind = "prose" if table.title in PROSE else "numbers"
        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
        note = f"<p class='note'>{NOTE}</p>" if table.title.startswith("What each") else ""
        parts.append(
            f"<h2>{html.escape(table.title)}</h2><div class='scroll'><table class='{kind}'>"
            f"<thead><tr>{cells('th', table.header)}</tr></thead><tbody>{body}</tbody></table>"
            f"</div>{note}"
        )
    if figures:
        drawn = "".join(
            f"<figure><img alt='{name.replace('_', ' ')}' "
            f"src='data:image/png;base64,{base64.b64encode(png).decode()}'></figure>"
            for name, png in figures.items()
        )
        parts.append(f"<h2>Figures</h2><div class='figures'>{drawn}</div>")
    sample = f"Causes and figures rest on {len(report.sample):,} sequences," \
             f" {report.sample.num_tokens:,} tokens; all sums on the whole dump."
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='icon' href='data:,'>"
        f"<title>Mismatch report: {html.escape(report.source)}</title><style>{STYLE}</style>"
        f"</head><body><h1>Mismatch report</h1>{''.join(parts)}<p class='note'>{sample}</p>"
        "</body></html>\n"
    )


def write_report(report: Report, directory: Path) -> None:
    """Write report.html, report.md, metrics.json, and figures/ as PNG, SVG and CSV.

    Figures are left out where matplotlib is not installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    figures = _write_figures(report.sample, directory / "figures")
    _replace(directory / "metrics.json", json.dumps(report.to_json(), indent=2) + "\n")
    _replace(directory / "report.md", to_markdown(report, figures))
    _replace(directory / "report.html", to_html(report, figures))


def _write_figures(sample: LogProbDump, directory: Path) -> dict[str, bytes]:
    if not importlib.util.find_spec("matplotlib"):
        return {}
    directory.mkdir(exist_ok=True)
    pictures = {}
    for name, (tabulate, draw) in FIGURES.items():
        if name == "steps" and (sample.step is None or len(np.unique(sample.step)) < 2):
            continue
        figure: Any = draw(sample).figure
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
        pictures[name] = picture.getvalue()
        figure.set_layout_engine("none")  # the layout stays; it is costly to find twice
        (directory / f"{name}.png").write_bytes(pictures[name])
        figure.savefig(directory / f"{name}.svg")
        table = tabulate(sample)
        with (directory / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            writer.writerows(zip(*(column.tolist() for column in table.values()), strict=True))
    return pictures


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}


def check_thresholds(conditions: Sequence[str], metrics: dict[str, float]) -> list[str]:
    """The conditions that hold, each with the value.

    Args:
        conditions: such as "mismatch/kl_k3>0.01".
        metrics: by flat name.

    Raises:
        InputError: a condition that cannot be read, or an unknown name.

    >>> check_thresholds(["mismatch/kl_k3>0.01"], {"mismatch/kl_k3": 0.5})
    ['mismatch/kl_k3>0.01 (it is 0.5)']
    """
    broken = []
    for condition in conditions:
        found = re.fullmatch(r"\s*([\w/]+)\s*(>=|<=|>|<)\s*(\S+)\s*", condition)
        try:
            if found is None:
                raise ValueError
            name, comparison, limit = found[1], found[2], float(found[3])
        except ValueError:
            raise input_error(
                "report", "fail-if", expected="a name, one of > < >= <=, and a number",
                got=repr(condition), fix="pass --fail-if 'mismatch/kl_k3>0.01'",
            ) from None
        if name not in metrics:
            near = difflib.get_close_matches(name, metrics, n=1)
            raise input_error(
                "report", "fail-if", expected="a metric: " + ", ".join(sorted(metrics)),
                got=repr(name), fix=f"did you mean {near[0]!r}?" if near else "choose one of these",
            )
        # what cannot be computed cannot pass
        if math.isnan(metrics[name]) or COMPARISONS[comparison](metrics[name], limit):
            broken.append(f"{condition} (it is {metrics[name]:.4g})")
    return broken


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect report``."""
    parser.add_argument("dumps", nargs="+", metavar="DUMP",
                        help="file or directory: .parquet, .jsonl, .npz, .safetensors, .pt; - for"
                             " JSON lines on standard input")
    parser.add_argument("--correction", action="append", metavar="SPEC",
                        help="correction to compare, such as token-tis:cap=2; repeatable")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="where report.html, report.md, metrics.json and figures/ go"
                             " (default: iscorrect-report; with --json: nowhere)")
    parser.add_argument("--null", metavar="DUMP",
                        help="the same policy scored twice: what is no larger is noise")
    parser.add_argument("--samples", type=_positive, metavar="N",
                        help="sequences in one update (default: all of the dump's)")
    parser.add_argument("--length", type=_positive, metavar="T",
                        help="tokens in a sequence (default: the dump's mean)")
    parser.add_argument("--fail-if", action="append", default=[], metavar="CONDITION",
                        help="exit 1 where it holds, such as 'mismatch/kl_k3>0.01'; repeatable")
    parser.add_argument("--json", action="store_true", help="print metrics.json instead of text")


def run_report(args: argparse.Namespace) -> int:
    """``iscorrect report``: 0 done, 1 a --fail-if condition holds, 2 input that cannot be used."""
    try:
        report = summarise(
            _with_progress(args.dumps),
            source=", ".join(str(path) for path in args.dumps),
            corrections=tuple(args.correction or CORRECTIONS),
            null=read_dump(args.null) if args.null else None,
            samples=args.samples, length=args.length,
        )
        broken = check_thresholds(args.fail_if, report.metrics)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    directory = args.out or (None if args.json else Path("iscorrect-report"))
    if directory is not None:
        write_report(report, directory)
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print_report(report)
        print(f"\nwritten to {directory}/report.html", file=sys.stderr)
    for condition in broken:
        print(f"fail-if: {condition}", file=sys.stderr)
    return 1 if broken else 0


def _with_progress(paths: Sequence[str]) -> Iterator[LogProbDump]:
    """The pieces of a dump, file after file, with a bar on a terminal."""
    files = dump_files(*paths)
    if not (sys.stderr.isatty() and importlib.util.find_spec("rich")):
        yield from stream_dump(*files)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=len(files))
        sequences = 0
        for file in files:
            for piece in stream_dump(file):
                sequences += len(piece)
                progress.update(task, description=f"{file.name}: {sequences:,} sequences so far")
                yield piece
            progress.advance(task)


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect convert``."""
    parser.add_argument("source", metavar="SRC", help="file or directory of any known dialect")
    parser.add_argument("target", metavar="DST", type=Path,
                        help="file: .parquet, .jsonl, .npz, .safetensors, or .pt")


def run_convert(args: argparse.Namespace) -> int:
    """``iscorrect convert``: 0 done, 2 input that cannot be used."""
    try:
        dump = read_dump(args.source)
        write_dump(dump, args.target)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{dump!r} -> {args.target}", file=sys.stderr)
    return 0


PACKAGES = (
    "torch", "numpy", "einops", "matplotlib", "rich", "pyarrow", "safetensors", "vllm", "sglang",
    "transformers", "trl", "verl",
)


def add_env_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect env``: none."""


def run_env(args: argparse.Namespace) -> int:
    """``iscorrect env``: versions, for a bug report."""
    from importlib.metadata import PackageNotFoundError, version

    lines = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("iscorrect", *PACKAGES):
        try:
            lines[name] = version(name)
        except PackageNotFoundError:
            lines[name] = "not installed"
    cuda = torch.cuda.is_available()
    lines["accelerator"] = torch.cuda.get_device_name() if cuda else "none"
    for name, text in lines.items():
        print(f"{name:<13} {text}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
