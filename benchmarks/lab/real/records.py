"""A record of a run: its rows, and beside them what it was run on."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path


def keep(record: Path, rows: Iterable[Mapping[str, object]], note: Callable[[], str]) -> None:
    """Run what is not on record.

    Args:
        record: CSV; it takes its name only when it is complete.
        rows: as they come; not asked for where the record is there.
        note: JSON beside it, asked for at the end.
    """
    if record.exists():
        return
    part = record.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
            file.flush()
    record.with_suffix(".json").write_text(note(), encoding="utf-8")
    part.replace(record)
