"""Rows of numbers (dicts) -> markdown that reads well in a terminal of 120 columns."""
import string
import textwrap
from collections.abc import Callable, Sequence

WIDTH = 120
Cell = str | Callable[[dict], object]


class _Format(string.Formatter):
    """str.format, where a float without a format has three digits."""

    def format_field(self, value, spec):
        return number(value) if isinstance(value, float) and not spec else format(value, spec)


def table(rows: Sequence[dict], columns: Sequence[tuple[str, Cell]], left: int = 1) -> str:
    """A markdown table whose columns line up as plain text too.

    columns: (heading, cell); a cell is a format of a row's values, or a function of the row, and
    empty where the row lacks a value. The first `left` columns are words, the others numbers. A
    row that failed says so in place of its first number. A column that no row fills is left out.
    """
    padded = []
    for i, (heading, cell) in enumerate(columns):
        cells = [row["failed"].split(":")[0][:24] if i == left and "failed" in row
                 else filled(cell, row) for row in rows]
        if any(cells):
            width = max(map(len, [heading, *cells]))
            dashes = "-" * (width + 2) if i < left else "-" * (width + 1) + ":"
            heading, *cells = (f" {text:<{width}} " if i < left else f" {text:>{width}} "
                               for text in [heading, *cells])
            padded.append([heading, dashes, *cells])
    return "\n".join(f"|{'|'.join(line)}|" for line in zip(*padded, strict=True))


def filled(cell: Cell, row: dict) -> str:
    """The text of a cell in this row."""
    try:
        return _Format().vformat(cell, (), row) if isinstance(cell, str) else str(cell(row))
    except KeyError:
        return ""


def paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def number(value: float) -> str:
    """Three digits, or all those before the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def spread(*keys: str) -> Cell:
    """`median [p20, p80]`, of the values under these keys."""
    return lambda row: "{} [{}, {}]".format(*(number(row[key]).replace(",", "") for key in keys))
