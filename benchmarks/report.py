"""Tables of the documentation from the records; nothing in them is typed by hand."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from benchmarks.harness import RECORDS

ROOT = Path(__file__).parents[1]
GPU_ONLY = {"gpu"}
MADE_BY = {"fp16_switch_real": "benchmarks.lab.real switch"}
"""The commands of cases that have one of their own."""
CPU_ONLY = {"emulated", "predicted", "threads", "newest", "monitor"}
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "monitor.md")
MARKED = re.compile(
    r"(<!-- benchmark:(?P<case>\w+)(?:/(?P<workload>[\w-]+))? -->\n).*?(<!-- /benchmark -->)",
    re.DOTALL,
)


def main() -> None:
    """Rewrite every table between markers ``<!-- benchmark:case/workload -->``."""
    for page in PAGES:
        if page.exists():
            text = page.read_text(encoding="utf-8")
            page.write_text(rewrite(text), encoding="utf-8")


def rewrite(text: str) -> str:
    """The text with the tables between its markers made anew."""
    return MARKED.sub(lambda m: f"{m[1]}{tables(m['case'], m['workload'])}{m[4]}", text)


def tables(case: str, workload: str | None) -> str:
    """Every table of a case, or of one of its workloads, one device after the other.

    A device without a record has no table, and the text says so.
    """
    parts = [
        f"**{name}**\n\n{table(rows)}"
        for path in sorted(RECORDS.glob(f"{case}-*.csv"))
        for name, rows in map(beside_measured, workloads(path))
        if workload in (None, name)
    ]
    parts += [
        f"Not run on {name}: no record of `python -m {MADE_BY.get(case, f'benchmarks {case}')}"
        f"{'' if case in GPU_ONLY else f' --device {device}'}`.\n"
        for device, name in {"cpu": "a CPU", "cuda": "a GPU"}.items()
        if not (RECORDS / f"{case}-{device}.csv").exists()
        and case not in (GPU_ONLY if device == "cpu" else CPU_ONLY)
    ]
    return "\n".join(parts)


def workloads(path: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name, group in groupby(rows, key=lambda row: row["workload"]):
        yield name, list(group)


def beside_measured(workload: tuple[str, list[dict[str, str]]]) -> tuple[str, list[dict[str, str]]]:
    """Predicted times with those that a GPU has taken, where there is a record of one."""
    name, rows = workload
    path = RECORDS / "gpu-cuda.csv"
    if not name.startswith("predicted-") or not path.exists():
        return workload
    taken = {
        row["provider"]: row for other, found in workloads(path) for row in found
        if other == f"head-{name.removeprefix('predicted-')}-bfloat16"
        and row["metric"] == "wall, ms"
    }
    made = []
    for provider, group in groupby(rows, key=lambda row: row["provider"]):
        made += list(group)
        if provider in taken:
            row = taken[provider]
            made.append(made[-1] | {"metric": f"measured, ms ({row['processor']})",
                                    "value": row["value"]})
    return name, made


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table of providers and metrics, and below it the conditions."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    providers = {
        name: {row["metric"]: row for row in group}
        for name, group in groupby(rows, key=lambda row: row["provider"])
    }
    heads = [metric.replace("|", r"\|") for metric in metrics]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(metrics)]
    for name, found in providers.items():
        cells = [pretty(found[metric]["value"]) if metric in found else "" for metric in metrics]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{conditions(rows)}\n\n"


def conditions(rows: list[dict[str, str]]) -> str:
    row = rows[0]
    peers = dict.fromkeys(r["version"] for r in rows)
    peers = [v for v in peers if v.split(" ")[0] not in ("", "iscorrect", "torch", "not")]
    threads = f", {row['threads']} thread(s)" if row["device"] == "cpu" else ""
    return (
        f"<sub>{row['conditions']} {row['processor']}{threads}, Python {row['python']}, torch "
        f"{row['torch']}{''.join(', ' + v for v in peers)}; {row['date']}.</sub>"
    )


def pretty(value: str) -> str:
    """Three significant digits, or the text as it is."""
    try:
        number = float(value)
    except ValueError:
        return value
    if number != 0 and not 1e-2 <= abs(number) < 1e5:
        return f"{number:.1e}"
    whole = len(str(int(abs(number)))) if abs(number) >= 1 else 0
    return f"{number:,.{max(0, 3 - whole)}f}"
