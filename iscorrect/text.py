"""Numbers, names and tables as text; nothing here prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table; its first column is text, the others are numbers.

    Args:
        title: stands above.
        header: one name per column.
        rows: one text per cell.

    >>> print(Table("Mismatch", ["pair", "k3"], [["bf16", "1e-3"], ["fp16", "2e-5"]]))
    Mismatch
    pair    k3
    bf16  1e-3
    fp16  2e-5
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.title]
        for row in [self.header, *self.rows]:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def number(x: float) -> str:
    """A number in few characters; – where there is none.

    >>> number(0.0012345), number(0.5), number(123456.0), number(0.0), number(math.nan)
    ('1.23e-03', '0.500', '1.23e+05', '0', '–')
    """
    if math.isnan(x):
        return "–"
    if x == 0:
        return "0"
    if 1e-2 <= abs(x) < 1e4:
        return f"{x:.3f}" if abs(x) < 100 else f"{x:.1f}"
    return f"{x:.2e}"


def percent(x: float) -> str:
    """A share in percent; – where there is none.

    >>> percent(0.0123), percent(0.0), percent(math.nan)
    ('1.2 %', '0 %', '–')
    """
    if math.isnan(x):
        return "–"
    if abs(x) < 1e-12:
        return "0 %"
    return f"{100 * x:.1f} %" if x >= 1e-3 else f"{100 * x:.2g} %"


def visible(text: object) -> str:
    r"""Text from outside on one line, with what a terminal would act on escaped.

    >>> print(visible("a\x1b[31m b"))
    a\x1b[31m b
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)
    )


def finite(x: Any) -> Any:
    """A value as JSON can hold it: NaN and infinities become None, in dicts and lists too.

    >>> finite({"a": [1.5, math.inf]})
    {'a': [1.5, None]}
    """
    if isinstance(x, dict):
        return {name: finite(value) for name, value in x.items()}
    if isinstance(x, list):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
