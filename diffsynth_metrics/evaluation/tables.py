"""Tables of numbers: what a terminal, a notebook, a report and ``--json`` show of the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Rows under named columns. A value is text, a number, or None for "not known".

    Attributes:
        columns: Names of the columns.
        rows: As many values each.
        title: A line above the table; may be empty.
        notes: Lines below it.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as dicts, ready for JSON: what is not a finite number is None."""
        return [
            {name: _plain(value) for name, value in zip(self.columns, row, strict=True)}
            for row in self.rows
        ]

    def text(self) -> str:
        """Return the table for a terminal: numbers to the right, the rest to the left."""
        cells = [self.columns, *(tuple(shown(value) for value in row) for row in self.rows)]
        widths = [max(len(row[index]) for row in cells) for index in range(len(self.columns))]
        right = self._numeric()
        lines = [
            "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*([self.title] if self.title else []), *lines, *self.notes])

    def html(self) -> str:
        """Return a ``<table>``; every value is escaped."""
        head = "".join(self._cells("th", self.columns))
        body = "".join(
            f"<tr>{''.join(self._cells('td', [shown(value) for value in row]))}</tr>"
            for row in self.rows
        )
        title = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def _cells(self, tag: str, texts: Sequence[str]) -> list[str]:
        styles = [' style="text-align:right"' if numeric else "" for numeric in self._numeric()]
        return [
            f"<{tag}{style}>{escape(text)}</{tag}>" for text, style in zip(texts, styles, strict=True)
        ]

    def _numeric(self) -> list[bool]:
        """Tell of each column whether it holds numbers."""
        return [_is_numeric([row[index] for row in self.rows]) for index in range(len(self.columns))]

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return self.html()


def shown(value: Any) -> str:
    """Return a value as a table shows it: four significant digits, and a dash for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    return str(value)


def _is_numeric(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(value, (int, float)) for value in known)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
