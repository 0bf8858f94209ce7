"""What changed from one dump to another, with intervals."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from iscorrect.dumps import Estimate
from iscorrect.report.gather import Report
from iscorrect.report.pages import Page, Section, plain_in_markdown, write_pages
from iscorrect.report.render import FINDINGS, LEGEND, found, write_figures
from iscorrect.report.sums import MEASURED, student
from iscorrect.text import Table, finite, number, visible

COMPARED = {
    "mismatch/kl_k1": "k1", "mismatch/kl_k3": "k3", "mismatch/log_prob_diff/mean": "mean |Δ log p|",
    "tail/outside": "ratio outside [0.5, 2]", "mismatch/ratio/mean": "mean ratio",
    "policy/kl_k3": "k3 of the update",
}
"""What is compared, by metric, and what it is called."""

SHOWN = ("ratios", "positions", "confidence")
"""The figures of both dumps that stand side by side."""

K3 = "mismatch/kl_k3"

HEAVY = (
    "The tail of the ratios is heavy (Pareto k̂ above 0.7) in one of them: intervals of k3, of the"
    " mean ratio and of what rests on few tokens are too narrow."
)

INTERVALS = (
    "Intervals are 95 %, from errors clustered by group where the dumps have groups; else by"
    " sequence, which is too small where prompts have several answers. Each row has its own; of"
    " twenty rows without a difference, one is expected to show one."
)

PAIRED = (
    "Both dumps hold the same sequences, and so the intervals over all tokens are of differences in"
    " pairs; those of places are as if the dumps were independent, and too wide."
)

APART = "As if the two dumps were independent: intervals are too wide where they share sequences."


@dataclass(frozen=True)
class Change:
    """A quantity of two dumps.

    Attributes:
        name: of the metric, or of the place whose k3 it is.
        before: the first dump's.
        after: the second dump's.
        difference: after less before.
        low: of the difference, the lower end of its 95 % interval; −∞ where it is not known.
        high: the upper end; ∞ where it is not known.
    """

    name: str
    before: float
    after: float
    difference: float
    low: float
    high: float

    @classmethod
    def of(
        cls, name: str, before: Estimate, after: Estimate, *, clusters: int,
        error: float | None = None,
    ) -> Change:
        """From two estimates.

        Args:
            name: what was measured.
            before: in the first dump.
            after: in the second.
            clusters: of the dump that has fewer, which are groups or else sequences.
            error: of the difference; None: that of independent estimates.

        >>> Change.of("k3", Estimate(3.0, 0.1), Estimate(2.0, 0.1), clusters=64).verdict
        'smaller'
        """
        difference = after.value - before.value
        error = math.hypot(before.error, after.error) if error is None else error
        half = student(clusters - 1) * error if clusters > 2 else math.inf
        ends = difference - half, difference + half
        return cls(name, before.value, after.value, difference, *ends)

    @property
    def verdict(self) -> str:
        """What the interval allows to say, and no more."""
        if not math.isfinite(self.high - self.low):
            return "not known"
        if self.low <= 0 <= self.high:
            return "no difference beyond chance"
        return "larger" if self.low > 0 else "smaller"


@dataclass(frozen=True)
class Changes:
    """Two dumps side by side.

    Attributes:
        before: the report of the first.
        after: the report of the second.
        metrics: what changed over all tokens.
        places: k3 in the places that both have.
        paired: whether both hold the same sequences.
    """

    before: Report
    after: Report
    metrics: list[Change]
    places: list[Change]
    paired: bool

    @classmethod
    def of(cls, before: Report, after: Report) -> Changes:
        """Compare two reports."""
        both = before, after
        clusters = min(report.rows.clusters for report in both)
        paired = np.array_equal(before.rows.key, after.rows.key)
        metrics = [
            Change.of(
                name, *(Estimate(report.metrics[name], report.errors[name]) for report in both),
                clusters=clusters,
                error=_paired_error(before, after, MEASURED.index(name))
                if paired and name in MEASURED else None,
            )
            for name in COMPARED if all(name in report.errors for report in both)
        ]
        k3 = [{p["place"]: p for p in report.places} for report in both]
        places = [
            Change.of(
                name, *(Estimate(of[name]["kl_k3"], of[name]["error"]) for of in k3),
                clusters=min(of[name]["clusters"] for of in k3),
            )
            for name in k3[0] if name in k3[1] and not name.startswith("group ")
        ]
        return cls(before, after, metrics, places, paired)

    def numbers(self) -> dict[str, float]:
        """Differences and the ends of their intervals, by flat name; NaN where not measured."""
        ends = ("", "/low", "/high")
        found = {f"{name}/change{end}": math.nan for name in COMPARED for end in ends}
        for change in self.metrics:
            values = change.difference, change.low, change.high
            names = (f"{change.name}/change{end}" for end in ends)
            found |= {
                name: x if math.isfinite(x) else math.nan
                for name, x in zip(names, values, strict=True)
            }
        return found

    def to_json(self) -> dict[str, Any]:
        """Both reports and all differences, as JSON can hold them."""
        held: dict[str, Any] = finite({
            "changes": [asdict(x) | {"verdict": x.verdict} for x in self.metrics],
            "places": [asdict(x) | {"verdict": x.verdict} for x in self.places],
            "paired": self.paired,
            "before": self.before.to_json(), "after": self.after.to_json(),
        })
        return held


def _paired_error(before: Report, after: Report, value: int) -> float:
    """Standard error of the difference of a mean, over sequences that both have."""
    moved = after.rows.influence(value) - before.rows.influence(value)
    return max(report.rows.error(moved) for report in (before, after))  # one may know the groups


def page(changes: Changes) -> Page:
    """What every form of the comparison shows."""
    both = {"before": changes.before, "after": changes.after}
    lines = [
        (name, f"{report.source} · {report.sequences:,} sequences ·"
               f" {report.metrics['batch/tokens']:,.0f} tokens")
        for name, report in both.items()
    ]
    lines.append(("k3", _sentence(next(x for x in changes.metrics if x.name == K3))))
    notes = [INTERVALS, PAIRED if changes.paired else APART]
    if any(0.7 < report.metrics["tail/pareto_k"] < math.inf for report in both.values()):
        notes.append(HEAVY)
    findings = [
        (f"{name}: {pattern}", *rest) for name, report in both.items()
        for pattern, *rest in found(report)
    ]
    effects = [
        (name, *(
            number(report.corrections[name][key])
            for key in ("is/ess", "is/kept_weight", "is/bias_mass") for report in both.values()
        ))
        for name in changes.before.corrections if name in changes.after.corrections
    ]
    header = ("is", "before", "after", "difference", "95 % interval")
    return Page(
        title="Two dumps compared", source=" → ".join(x.source for x in both.values()), lines=lines,
        sections=[
            Section(
                Table("What changed", ("over all tokens", *header), [
                    _row(COMPARED[x.name], x) for x in changes.metrics
                ]), notes=notes,
            ),
            Section(Table("Findings", FINDINGS, findings), prose=True),
            Section(
                Table("What each correction would do", (
                    "correction", "ESS before", "after", "kept weight before", "after",
                    "bias mass before", "after",
                ), effects), legend=LEGEND,
            ),
            Section(Table("Where", ("k3 of", *header), [
                _row(visible(x.name), x) for x in changes.places
            ])),
        ],
        foot="The dumps are compared over all their tokens.",
    )


def _sentence(k3: Change) -> str:
    """What happened to k3, in no stronger words than its interval has."""
    if k3.verdict == "not known":
        return "too few sequences to say whether it changed"
    moved = f"{number(k3.before)} before, {number(k3.after)} after"
    return f"{k3.verdict}: {moved}; 95 % interval of the difference {_interval(k3)}"


def _interval(x: Change) -> str:
    known = math.isfinite(x.high - x.low)
    return f"{_signed(x.low)} to {_signed(x.high)}" if known else "–"


def _row(name: str, x: Change) -> tuple[str, ...]:
    return (
        name, x.verdict, number(x.before), number(x.after), _signed(x.difference), _interval(x),
    )


def _signed(x: float) -> str:
    return f"+{number(x)}" if x > 0 else number(x)


def write_changes(changes: Changes, directory: Path) -> list[str]:
    """Write report.html, report.md, metrics.json, and the figures of both dumps.

    Returns:
        The names of the figures on the page.

    Raises:
        OSError: the directory cannot be written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    figures: dict[str, bytes] = {}
    both = {"before": changes.before, "after": changes.after}
    drawn = {}
    for name, report in both.items():
        drawn[name] = write_figures(report, directory / "figures" / name)
    for figure in SHOWN:
        figures |= {f"{name}/{figure}": x[figure] for name, x in drawn.items() if figure in x}
    plain = [replace(x, source=plain_in_markdown(x.source)) for x in both.values()]
    named = replace(changes, before=plain[0], after=plain[1])
    write_pages(
        directory, numbers=changes.to_json(), markdown=page(named).to_markdown(figures),
        page=page(changes).to_html(figures),
    )
    return list(figures)

