"""Tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Workload
from benchmarks.report import pretty


def show(workloads: list[Workload]) -> None:
    for workload in workloads:
        metrics = list(dict.fromkeys(m for row in workload.rows.values() for m in row))
        table = Table(title=workload.name, caption=workload.conditions)
        table.add_column("")
        for metric in metrics:
            table.add_column(metric, justify="right")
        for provider, row in workload.rows.items():
            table.add_row(provider, *[pretty(str(row.get(metric, ""))) for metric in metrics])
        Console().print(table)
