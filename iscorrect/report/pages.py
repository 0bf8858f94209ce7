"""A page of lines and tables: for a terminal, as Markdown, and as one HTML file."""

from __future__ import annotations

import base64
import html
import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iscorrect.dumps.files import replacing
from iscorrect.text import Table

NO_FIGURES = "No figures: they need matplotlib (pip install matplotlib)."


@dataclass(frozen=True)
class Section:
    """A table and what is said below it.

    Attributes:
        table: its first column is short.
        prose: whether the other columns are sentences.
        notes: what every form says.
        legend: what the terms mean; on pages only.
    """

    table: Table
    prose: bool = False
    notes: Sequence[str] = ()
    legend: str = ""


@dataclass(frozen=True)
class Page:
    """What is shown in every form.

    Attributes:
        title: of the page.
        source: the dumps, for the window's title.
        lines: names and texts that stand first.
        sections: tables, in order.
        foot: the last line of the HTML page.
    """

    title: str
    source: str
    lines: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    foot: str

    def blocks(self, width: int = 100) -> list[str | Table]:
        """Lines and tables for a terminal.

        Args:
            width: of the lines of prose.
        """
        shown: list[str | Table] = [f"{name:<10} {text}" for name, text in self.lines]
        for section in self.sections:
            shown.append("")
            shown += _filled(section.table, width) if section.prose else [section.table]
            shown += [textwrap.fill(note, width) for note in section.notes]
        return shown

    def to_markdown(self, figures: Iterable[str] = ()) -> str:
        """Markdown, with the figures' files beside it."""
        lines = [f"# {self.title}", "", *(f"- **{name}**: {text}" for name, text in self.lines)]
        for section in self.sections:
            table = section.table
            lines += ["", f"## {table.title}", "", f"| {' | '.join(table.header)} |",
                      "|" + "---|" * len(table.header)]
            lines += [f"| {' | '.join(map(_cell, row))} |" for row in table.rows]
            if below := _below(section):
                lines += ["", below]
        if figures:
            lines += ["", "## Figures", ""]
            lines += [f"![{_called(name)}](figures/{name}.png)\n" for name in figures]
        else:
            lines += ["", NO_FIGURES]
        return "\n".join(lines) + "\n"

    def to_html(self, figures: Mapping[str, bytes]) -> str:
        """One file that needs no other; figures by name, as PNG."""
        parts = ["<dl>" + "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in self.lines
        ) + "</dl>", *map(_drawn, self.sections)]
        if figures:
            drawn = "".join(
                f"<figure><img alt='{_called(name)}' "
                f"src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
                f"{f'<figcaption>{_called(name)}</figcaption>' if '/' in name else ''}</figure>"
                for name, png in figures.items()
            )
            parts.append(f"<h2>Figures</h2><div class='figures'>{drawn}</div>")
        else:
            parts.append(f"<p class='note'>{NO_FIGURES}</p>")
        return (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            "<link rel='icon' href='data:,'>"
            f"<title>{self.title}: {html.escape(self.source)}</title><style>{STYLE}</style>"
            f"</head><body><h1>{self.title}</h1>{''.join(parts)}"
            f"<p class='note'>{html.escape(self.foot)}</p></body></html>\n"
        )


def write_pages(
    directory: Path, *, numbers: dict[str, Any], markdown: str, page: str
) -> None:
    """Write metrics.json, report.md and report.html, each whole or not at all."""
    for name, text in (
        ("metrics.json", json.dumps(numbers, indent=2) + "\n"), ("report.md", markdown),
        ("report.html", page),
    ):
        with replacing(directory / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def plain_in_markdown(text: str) -> str:
    r"""Text that Markdown shows as it is: file names may hold anything.

    >>> print(plain_in_markdown("![x](y)|"))
    \!\[x\](y)\|
    """
    return re.sub(r"([\\`*_\[\]<>&!|])", r"\\\1", text)


def _filled(table: Table, width: int) -> list[str | Table]:
    shown: list[str | Table] = [table.title]
    for name, *texts in table.rows:
        shown.append(textwrap.fill(name, width, initial_indent="* ", subsequent_indent="  "))
        indent = " " * 4
        shown += [
            textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent)
            for text in texts for line in text.splitlines()
        ]
    return shown


def _below(section: Section) -> str:
    return " ".join(filter(None, [section.legend, *section.notes]))


def _drawn(section: Section) -> str:
    table = section.table
    kind = "prose" if section.prose else "numbers"
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in table.rows)
    below = _below(section)
    note = f"<p class='note'>{html.escape(below)}</p>" if below else ""
    return (
        f"<h2>{html.escape(table.title)}</h2><div class='scroll'><table class='{kind}'>"
        f"<thead><tr>{_cells('th', table.header)}</tr></thead><tbody>{body}</tbody></table>"
        f"</div>{note}"
    )


def _cells(tag: str, row: Iterable[str]) -> str:
    lines = (html.escape(x).replace("\n", "<br/>") for x in row)
    return "".join(f"<{tag}>{x}</{tag}>" for x in lines)


def _cell(text: str) -> str:
    return plain_in_markdown(text).replace("\n", "<br>")


def _called(name: str) -> str:
    return name.replace("_", " ").replace("/", ", ")


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
  gap: 1rem; } figure { margin: 0; }
figcaption { text-align: center; font-size: .9rem; }
img { width: 100%; height: auto; display: block; }
p.note { color: #555; font-size: .9rem; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; } dt { margin-top: .4rem; }
  table.prose thead { display: none; }
  table.prose tr, table.prose td { display: block; border: 0; padding: .15rem 0; }
  table.prose tr { border-bottom: 1px solid #ddd; padding: .5rem 0; }
}
"""
