"""A page about a dump: how large the mismatch is, where, why, and what to do."""

from __future__ import annotations

import base64
import csv
import html
import importlib.util
import io
import json
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iscorrect.diagnose import Cause
from iscorrect.dumps import Estimate
from iscorrect.dumps.files import replacing
from iscorrect.report.effects import HEADER, effect_row
from iscorrect.report.figures import FIGURES
from iscorrect.report.gather import Report
from iscorrect.report.sums import GROWTH
from iscorrect.text import Table, visible


def headline(report: Report) -> list[tuple[str, str]]:
    """How big, bulk or tail: the first lines of every form of the report."""
    m = report.metrics
    k = m["tail/pareto_k"]
    if not math.isfinite(k):
        tail = "not measured: too few different ratios"
    else:
        above = "above 0.7: averages of weights are unreliable"
        tail = f"{k:.2f} ({'reliable below 0.7' if k < 0.7 else above})"
    pearson = f"{m['mismatch/pearson']:.5f}"
    if math.isnan(m["mismatch/pearson"]):
        pearson = "not measured: one side is constant"
    lost = m["batch/nonfinite"]
    without = f", {lost:,.0f} of them without a finite log-prob and left out" if lost else ""
    return [
        ("dump", f"{report.source} · {report.sequences:,} sequences ·"
                 f" {m['batch/tokens']:,.0f} tokens{without}"),
        ("mismatch", f"k1 {_measured(report, 'mismatch/kl_k1')} · k3"
                     f" {_measured(report, 'mismatch/kl_k3')} nats per token · χ²"
                     f" {m['mismatch/chi2/token']:.2e}"),
        ("|Δ log p|", f"mean {m['mismatch/log_prob_diff/mean']:.3g} · max"
                      f" {m['mismatch/log_prob_diff/max']:.3g} nats · Pearson of p"
                      f" {pearson}"),
        ("sequences", f"log-ratio {slope(report)} nats per 1,000 tokens"),
        ("tail", f"{m['tail/outside']:.2%} of tokens have a ratio outside [0.5, 2] · Pareto k̂"
                 f" {tail}"),
        *_update(m), *_growth(m),
    ]


def slope(report: Report) -> Estimate:
    """The log-ratio of 1,000 tokens of a sequence, nats."""
    name = "mismatch/sequence_slope"
    return Estimate(report.metrics[name], report.errors[name])


def _measured(report: Report, name: str) -> str:
    error = report.errors[name]
    known = f" ± {error:.1e}" if math.isfinite(error) else ""
    return f"{report.metrics[name]:.2e}{known}"


def _update(m: dict[str, float]) -> list[tuple[str, str]]:
    if "policy/kl_k3" not in m:
        return []
    return [("update", f"the policy being trained differs from π_old by"
                       f" {m['policy/log_prob_diff/mean']:.3g} nats a token on average · k3"
                       f" {m['policy/kl_k3']:.2e}")]


def _growth(m: dict[str, float]) -> list[tuple[str, str]]:
    if GROWTH[0] not in m:
        return []
    factor, low, high = (m[name] for name in GROWTH)
    moves = "grows" if low > 1 else "falls" if high < 1 else "neither grows nor falls for certain"
    return [("training", f"k3 {moves}: {factor:.2g} times the first step's at the last step (95 %"
                         f" interval {low:.2g} to {high:.2g}, as if steps were independent)")]


def tables(report: Report) -> list[Table]:
    """What was found, what to do, what corrections do, and where the mismatch is."""
    return [
        Table("Findings", ("pattern", "evidence", "causes, likeliest first, and controls"), [
            (f.pattern, f.evidence, "\n".join(_numbered(f.causes))) for f in report.findings
        ]),
        Table("What to do", ("advice", "because"), [(a.action, a.because) for a in report.advice]),
        Table(
            "What each correction would do",
            HEADER, [effect_row(n, values) for n, values in report.corrections.items()],
        ),
        Table("Where", ("place", "tokens", "k3", "±", "ratio outside [0.5, 2]"), [
            (visible(p["place"]), f"{p['tokens']:.1%}", f"{p['kl_k3']:.2e}", _error(p["error"]),
             f"{p['outside']:.2%}")
            for p in report.places
        ]),
    ]


def _numbered(causes: Sequence[Cause]) -> Iterator[str]:
    for i, cause in enumerate(causes, 1):
        fields = " and ".join(cause.needs)
        decided = f" (a dump with {fields} would tell)" if fields else ""
        yield f"{i}. {cause.name}: {cause.control}{decided}"


def _error(x: float) -> str:
    return f"{x:.1e}" if math.isfinite(x) else "–"


PROSE = ("Findings", "What to do")

NOTE = (
    "ESS is the effective share of the sample, kept weight what remains of a mean ratio of 1, bias"
    " mass the mean distance between the exact ratio at the correction's level and the weight that"
    " it gives."
)


ERRORS = "± is one standard error, clustered by sequence."

NO_FIGURES = "No figures: they need matplotlib (pip install matplotlib)."


def blocks(report: Report, width: int = 100) -> list[str | Table]:
    """The report for a terminal.

    Args:
        report: what to show.
        width: of the lines of prose.
    """
    shown: list[str | Table] = [f"{name:<10} {text}" for name, text in headline(report)]
    for table in tables(report):
        shown.append("")
        if table.title not in PROSE:
            shown.append(table)
            shown += report.notes if table.header == HEADER else [ERRORS]
            continue
        shown.append(table.title)
        for name, *texts in table.rows:
            shown.append(textwrap.fill(name, width, initial_indent="* ", subsequent_indent="  "))
            indent = " " * 4
            shown += [
                textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent)
                for text in texts for line in text.splitlines()
            ]
    return shown


def to_markdown(report: Report, figures: Iterable[str] = ()) -> str:
    """The report as Markdown, with the figures' files beside it."""
    lines = ["# Mismatch report", ""]
    # file names may hold anything, and Markdown takes HTML, links and images
    named = replace(report, source=re.sub(r"([\\\\`*_\[\]<>&!|])", r"\\\1", report.source))
    lines += [f"- **{name}**: {text}" for name, text in headline(named)]
    for table in tables(report):
        lines += ["", f"## {table.title}", "", f"| {' | '.join(table.header)} |",
                  "|" + "---|" * len(table.header)]
        lines += [f"| {' | '.join(_cell(x) for x in row)} |"
                  for row in table.rows]
        if table.header == HEADER:
            lines += ["", " ".join([NOTE, *report.notes])]
    if figures:
        lines += ["", "## Figures", ""]
        lines += [f"![{name.replace('_', ' ')}](figures/{name}.png)\n" for name in figures]
    lines += ["", ERRORS, *([] if figures else ["", NO_FIGURES])]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


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
        lines = (html.escape(x).replace("\n", "<br/>") for x in row)
        return "".join(f"<{tag}>{x}</{tag}>" for x in lines)

    parts = ["<dl>" + "".join(
        f"<dt>{html.escape(n)}</dt><dd>{html.escape(x)}</dd>" for n, x in headline(report)
    ) + "</dl>"]
    for table in tables(report):
        kind = "prose" if table.title in PROSE else "numbers"
        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
        note = ""
        if table.header == HEADER:
            note = f"<p class='note'>{html.escape(' '.join([NOTE, *report.notes]))}</p>"
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
    else:
        parts.append(f"<p class='note'>{NO_FIGURES}</p>")
    sample = f"{ERRORS} Causes and figures rest on {report.sample.count:,} sequences," \
             f" {len(report.sample):,} tokens; all sums on the whole dump."
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='icon' href='data:,'>"
        f"<title>Mismatch report: {html.escape(report.source)}</title><style>{STYLE}</style>"
        f"</head><body><h1>Mismatch report</h1>{''.join(parts)}<p class='note'>{sample}</p>"
        "</body></html>\n"
    )


def write_report(report: Report, directory: Path) -> list[str]:
    """Write report.html, report.md, metrics.json, and figures/ as PNG, SVG and CSV.

    Figures are left out where matplotlib is not installed, which the pages say.

    Returns:
        The names of the figures.

    Raises:
        OSError: the directory cannot be written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    figures = write_figures(report, directory / "figures")
    for name, text in (
        ("metrics.json", json.dumps(report.to_json(), indent=2) + "\n"),
        ("report.md", to_markdown(report, figures)),
        ("report.html", to_html(report, figures)),
    ):
        with replacing(directory / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return list(figures)


def write_figures(report: Report, directory: Path) -> dict[str, bytes]:
    """Write every figure as PNG, SVG and CSV; their PNGs by name, none without matplotlib."""
    sample = report.sample
    if not importlib.util.find_spec("matplotlib"):
        return {}
    import matplotlib as mpl

    directory.mkdir(exist_ok=True)
    pictures = {}
    for name, (tabulate, draw) in FIGURES.items():
        if name == "steps" and (
            sample.step is None or len(np.unique(sample.step[sample.row])) < 2
        ):
            continue
        with mpl.rc_context({"text.usetex": False}):  # LaTeX may not be there
            options = {"slope": slope(report)} if name == "sequences" else {}
            figure: Any = draw(sample, **options).figure
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=110)
            pictures[name] = picture.getvalue()
            figure.set_layout_engine("none")  # the layout stays; it is costly to find twice
            (directory / f"{name}.png").write_bytes(pictures[name])
            figure.savefig(directory / f"{name}.svg")
        table = tabulate(sample)
        with (directory / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            writer.writerows(zip(*(column.tolist() for column in table.values()), strict=True))
    return pictures
