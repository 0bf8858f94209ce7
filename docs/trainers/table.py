"""Writes the table of README.md from outcomes.jsonl, which the tests against trainers write.

ISCORRECT_OUTCOMES=docs/trainers/outcomes.jsonl .ci/trainers frameworks
python docs/trainers/table.py
"""

import json
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
START, END = "<!-- table -->\n", "<!-- end of table -->\n"
HEAD = (
    "| trainer | version | what was run | largest difference: loss | gradient or weight | date |\n"
    "|---|---|---|---|---|---|\n"
)


def latest(lines: list[dict]) -> list[dict]:
    """The last outcome of everything that was run."""
    return list({(x["framework"], x["version"], x["what"]): x for x in lines}.values())


def largest(lines: list[dict], name: str) -> str:
    """The largest of the differences that were taken."""
    values = [x[name] for x in lines if x[name] is not None]
    return f"{max(values):.1e}" if values else "not taken"


def row(framework: str, version: str, lines: list[dict]) -> str:
    """One line of the table."""
    settings = defaultdict(set)
    for x in lines:
        what, _, setting = x["what"].partition(", ")
        settings[what].add(setting)
    runs = "; ".join(
        what if len(found) == 1 else f"{what} ({len(found)} settings)"
        for what, found in settings.items()
    )
    cells = (
        framework, version, runs, largest(lines, "loss"), largest(lines, "gradient"),
        max(x["date"] for x in lines),
    )
    return "| " + " | ".join(cells) + " |\n"


def table(text: str) -> str:
    """The table of a file of outcomes."""
    runs = defaultdict(list)
    for x in latest([json.loads(line) for line in text.splitlines()]):
        runs[x["framework"], x["version"]].append(x)
    return HEAD + "".join(row(*key, lines) for key, lines in sorted(runs.items()))


def with_table(page: str, outcomes: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return before + START + table(outcomes) + END + after


if __name__ == "__main__":
    readme = HERE / "README.md"
    readme.write_text(with_table(readme.read_text(), (HERE / "outcomes.jsonl").read_text()))
