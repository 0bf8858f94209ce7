"""Tables on the terminal: rich where it is installed and somebody looks, aligned text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are numbers.

    Args:
        title: printed above.
        header: one name per column.
        rows: one text per cell.

    >>> show("Mismatch", ["pair", "k3"], [["bf16", "1e-3"], ["fp16", "2e-5"]])
    <BLANKLINE>
    Mismatch
    pair    k3
    bf16  1e-3
    fp16  2e-5
    """
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=title, title_justify="left", title_style="bold", box=None)
            for i, name in enumerate(header):
                table.add_column(
                    name, justify="right" if i else "left", no_wrap=bool(i), overflow="fold"
                )
            for row in rows:
                table.add_row(*row)
            print()
            Console().print(table)
            return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}")
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def number(x: float, digits: int = 3) -> str:
    """A number in few characters.

    >>> number(0.0012345), number(0.5), number(123456.0), number(0.0)
    ('1.23e-03', '0.500', '1.23e+05', '0')
    """
    if x == 0:
        return "0"
    if 1e-2 <= abs(x) < 1e4:
        return f"{x:.{digits}f}" if abs(x) < 100 else f"{x:.1f}"
    return f"{x:.2e}"


def percent(x: float) -> str:
    """A share in percent.

    >>> percent(0.0123), percent(0.0)
    ('1.2 %', '0 %')
    """
    if abs(x) < 1e-12:
        return "0 %"
    return f"{100 * x:.1f} %" if x >= 1e-3 else f"{100 * x:.2g} %"
