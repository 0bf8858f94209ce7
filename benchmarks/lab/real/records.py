"""A record of a run: its rows, and beside them what it was run on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path


def keep(record: Path, rows: Iterable[Mapping[str, object]], note: Callable[[], str]) -> None:
    """Run what is not on record.

    Args:
        record: CSV; it takes its name only when it is complete.
        rows: as they come; not asked for where the record is there.
        note: JSON beside it, asked for at the end.

    Raises:
        SystemExit: what is on record was run on another schedule.
    """
    if record.exists():
        refuse_another_schedule(record, json.loads(note()))
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


def refuse_another_schedule(record: Path, asked: Mapping[str, Mapping[str, object]]) -> None:
    """What a record's name does not say is in the JSON beside it."""
    found = json.loads(record.with_suffix(".json").read_text(encoding="utf-8"))["schedule"]
    differ = [name for name in found if found[name] != asked["schedule"].get(name)]
    if differ:
        held, wanted = (
            ", ".join(f"{name} {schedule.get(name)}" for name in differ)
            for schedule in (found, asked["schedule"])
        )
        raise SystemExit(
            f"{record} was run with {held}, and {wanted} is asked for: give --records another "
            "folder"
        )
