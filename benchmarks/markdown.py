"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def grid(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table with these columns, with its last line's end."""
    names = list(columns)
    lines = [_line(names), "|---" * len(names) + "|\n", *(_line(row) for row in rows)]
    return "".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"
