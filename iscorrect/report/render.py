"""A page about a dump: how large the mismatch is, where, why, and what to do."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iscorrect.diagnose import Cause
from iscorrect.dumps import Estimate
from iscorrect.report.effects import HEADER, effect_row
from iscorrect.report.figures import FIGURES
from iscorrect.report.gather import Report
from iscorrect.report.pages import Page, Section, plain_in_markdown, write_pages
from iscorrect.report.sums import GROWTH
from iscorrect.text import Table, number, visible


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
        *_shared(m), *_update(m), *_growth(m),
    ]


def slope(report: Report) -> Estimate:
    """The log-ratio of 1,000 tokens of a sequence, nats."""
    name = "mismatch/sequence_slope"
    return Estimate(report.metrics[name], report.errors[name])


def _measured(report: Report, name: str) -> str:
    error = report.errors[name]
    known = f" ± {error:.1e}" if math.isfinite(error) else ""
    return f"{report.metrics[name]:.2e}{known}"


def _shared(m: dict[str, float]) -> list[tuple[str, str]]:
    kinds = [name.removeprefix("shared/") for name in m if re.fullmatch("shared/[a-z]+", name)]
    if not kinds:
        return []
    told = " · ".join(
        f"{kind} {m[f'shared/{kind}']:.1%} ({m[f'shared/{kind}/null']:.1%})" for kind in kinds
    )
    return [("shared", f"of the variance of errors in the log-odds, and by chance: {told}")]


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
    return [section.table for section in page(report).sections]


def page(report: Report) -> Page:
    """What every form of the report shows."""
    effects = [effect_row(n, values) for n, values in report.corrections.items()]
    places = [
        (visible(p["place"]), f"{p['tokens']:.1%}", f"{p['kl_k3']:.2e}", _error(p["error"]),
         f"{p['outside']:.2%}", number(p["ess"]))
        for p in report.places
    ]
    advice = [(a.action, a.because) for a in report.advice]
    return Page(
        title="Mismatch report", source=report.source, lines=headline(report),
        sections=[
            Section(Table("Findings", FINDINGS, found(report)), prose=True),
            Section(Table("What to do", ("advice", "because"), advice), prose=True),
            Section(
                Table("What each correction would do", HEADER, effects), notes=report.notes,
                legend=LEGEND,
            ),
            Section(
                Table("Where", WHERE, places), notes=[ERRORS],
            ),
        ],
        foot=f"Causes and figures rest on {report.sample.count:,} sequences,"
             f" {len(report.sample):,} tokens; all means on the whole dump.",
    )


WHERE = ("place", "tokens", "k3", "±", "ratio outside [0.5, 2]", "ESS")

FINDINGS = ("pattern", "evidence", "causes, likeliest first, and controls")


def found(report: Report) -> list[tuple[str, str, str]]:
    """The findings as rows: pattern, evidence, and causes with their controls."""
    return [(f.pattern, f.evidence, "\n".join(_numbered(f.causes))) for f in report.findings]


def _numbered(causes: Sequence[Cause]) -> Iterator[str]:
    for i, cause in enumerate(causes, 1):
        fields = " and ".join(cause.needs)
        decided = f" (a dump that holds {fields} would decide it)" if fields else ""
        yield f"{i}. {cause.name}: {cause.control}{decided}"


def _error(x: float) -> str:
    return f"{x:.1e}" if math.isfinite(x) else "–"


LEGEND = (
    "ESS is the effective share of the sample, kept weight what remains of a mean ratio of 1, bias"
    " mass the mean distance between the exact ratio at the correction's level and the weight that"
    " it gives."
)

ERRORS = (
    "± is one standard error, clustered by group where the dump has groups, else by sequence; that"
    " of a group by sequence."
)


def blocks(report: Report, width: int = 100) -> list[str | Table]:
    """The report for a terminal.

    Args:
        report: what to show.
        width: of the lines of prose.
    """
    return page(report).blocks(width)


def to_markdown(report: Report, figures: Iterable[str] = ()) -> str:
    """The report as Markdown, with the figures' files beside it."""
    named = replace(report, source=plain_in_markdown(report.source))
    return page(named).to_markdown(figures)


def to_html(report: Report, figures: Mapping[str, bytes]) -> str:
    """The report as one file that needs no other; figures by name, as PNG."""
    return page(report).to_html(figures)


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
    write_pages(
        directory, numbers=report.to_json(), markdown=to_markdown(report, figures),
        page=to_html(report, figures),
    )
    return list(figures)


def write_figures(report: Report, directory: Path) -> dict[str, bytes]:
    """Write every figure as PNG, SVG and CSV; their PNGs by name, none without matplotlib."""
    sample = report.sample
    if not importlib.util.find_spec("matplotlib"):
        return {}
    import matplotlib as mpl

    directory.mkdir(parents=True, exist_ok=True)
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
