"""The table of what others published beside what the library makes of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.lab.cells import markdown, pretty

Row = Mapping[str, str]


def table(records: Path) -> str:
    """A row for each quantity: what they say, what the library makes of it, whether both agree."""
    path = records / "published.csv"
    if not path.exists():
        return "No record of `python -m benchmarks.lab published`.\n"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["source"], row["quantity"]), []).append(row)
    body = []
    for (source, quantity), group in groups.items():
        many = f", {len(group)} runs" if len(group) > 1 else ""
        said = [row["agreed"] == "yes" for row in group if row["agreed"]]
        verdict = f"{sum(said)} of {len(said)}" if len(said) > 1 else "yes" if all(said) else "no"
        body.append([
            source, quantity.replace("|", r"\|") + many, theirs(group),
            OURS[group[0]["kind"]](group), verdict if said else "they say nothing",
        ])
    note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return markdown(["source", "of what", "they say", "here", "agreed"], body) + (
        "\nCurves: first → last fifth of the logged points; growth from the first to the last of "
        "the line through the logarithm, with its 95 % interval as if points were independent; the "
        "monitor's first alarm. *Drifts* agrees if there is an alarm, *bounded* if there is none. "
        "Ratios: agreed if theirs lies between the lowest and the highest of the lab's models, "
        "which are given here, two standard errors included where there are seeds. Others: agreed "
        "if the number is the one given, up to rounding, |Δp| up to 0.05. Quoted: what they say is "
        "read from a text. Read on "
        f"{note['read']}.\n"
    )


def theirs(group: Sequence[Row]) -> str:
    if group[0]["kind"] == "curve":
        return group[0]["said"]
    values = [float(row["value"] if row["kind"] == "ratio" else row["said"]) for row in group]
    whence = {("ratio", "raw"): ", from their curves"}.get(
        (group[0]["kind"], group[0]["given"]), ", quoted")
    return between(values) + whence


def between(values: Sequence[float]) -> str:
    low, high = pretty(min(values)), pretty(max(values))
    return low if low == high else f"{low} to {high}"


def curve_cell(group: Sequence[Row]) -> str:
    alarms = [row["alarm"] for row in group if row["alarm"]]
    if len(group) == 1:
        row = group[0]
        first, last, highest, value, low, high = (
            pretty(float(row[name]))
            for name in ("first", "last", "highest", "value", "low", "high"))
        alarm = f"alarm at step {alarms[0]}" if alarms else "no alarm"
        return f"{first} → {last}, highest {highest}; growth {value} ({low} to {high}); {alarm}"
    grown = sum(float(row["low"]) > 1 for row in group)
    return (
        f"{between([int(row['steps']) for row in group])} steps each; growth "
        f"{between([float(row['value']) for row in group])}, interval above 1 in {grown}; "
        f"alarm in {len(alarms)}"
    )


def ratio_cell(group: Sequence[Row]) -> str:
    return between([float(group[0][end]) for end in ("low", "high")])


def identity_cell(group: Sequence[Row]) -> str:
    return between([float(row["value"]) for row in group])


OURS: dict[str, Callable[[Sequence[Row]], str]] = {
    "curve": curve_cell, "ratio": ratio_cell, "identity": identity_cell,
}
