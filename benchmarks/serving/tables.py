"""The documents' tables of committed results, so that no figure is typed by hand.

    python -m kara_sglang.benchmarks.serving.tables README.md docs/throughput.md \\
        benchmarks/results/serving/README.md

renders every table between the lines ``<!-- serving:RESULT/SCENARIO VIEW -->`` and ``<!-- end of
serving -->`` anew, from ``RESULT.json`` in ``benchmarks/results/serving``. VIEW is one of
:data:`VIEWS`, left out for all columns. The scenario ``projection`` is what ``projection.py`` makes of
``pool``, and ``projection/again`` needs no result; ``longest`` is a result of ``longest.py``. Marks of
results that are not there stay.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from kara_sglang.benchmarks import command_line, marked
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.serving import longest, projection
from kara_sglang.benchmarks.serving.report import Result, by_point, median, ratios
from kara_sglang.benchmarks.serving.rows import STOCK

RESULTS = Path(__file__).resolve().parents[1] / "results" / "serving"
_NAME = re.compile(r"(?P<result>[\w-]+)/(?P<scenario>\w+)(?: (?P<view>\w+))?")

Rows = dict[str, list[Result]]


def _absolute(column: str, digits: int, factor: float = 1.0) -> Callable[[Rows, str], str]:
    def cell(rows: Rows, row: str) -> str:
        value = median(rows[row], column)
        return "-" if value is None else f"{value * factor:,.{digits}f}"

    return cell


def _ratio(column: str) -> Callable[[Rows, str], str]:
    """The ratio to stock, with its range over the repetitions where there are several."""

    def cell(rows: Rows, row: str) -> str:
        values = ratios(rows, row, column)
        if row == STOCK:
            return "1"
        if not values:
            return "-"
        text = f"{statistics.median(values):.2f}"
        return text if len(values) == 1 else f"{text} ({min(values):.2f} to {max(values):.2f})"

    return cell


def _counted(column: str, digits: int) -> Callable[[Rows, str], str]:
    """The count and, as it is the same in every repetition, the mere median of its ratio."""
    absolute = _absolute(column, digits)

    def cell(rows: Rows, row: str) -> str:
        values = ratios(rows, row, column)
        text = absolute(rows, row)
        return text if row == STOCK or not values else f"{text} ({statistics.median(values):.2f} x)"

    return cell


def _pair(column: str) -> Callable[[Rows, str], str]:
    p50, p99 = (_absolute(f"{column} {part} ms", 1) for part in ("p50", "p99"))
    return lambda rows, row: f"{p50(rows, row)} / {p99(rows, row)}"


WALL = {
    "output tok/s to stock": _ratio("output tok/s"),
    "CPU s per token to stock": _ratio("CPU s per 1000 tok"),
}
COUNTED = {
    "decode steps": _counted("decode steps", 0),
    "mean running": _counted("mean running", 1),
    "peak": _absolute("peak running", 0),
    "retractions": _absolute("retractions", 0),
    "KV slots per token": _absolute("slots per token", 2),
    "hit rate": _absolute("hit rate", 3),
}
LATENCY = {
    "ITL p50 / p99, ms": _pair("ITL"),
    "TTFT p50, s": _absolute("TTFT p50 ms", 2, 1e-3),
}
VIEWS = {
    None: WALL | COUNTED | LATENCY,
    "wall": WALL | LATENCY,
    "counted": COUNTED,
    "ring": {name: COUNTED[name] for name in ("decode steps", "mean running", "KV slots per token")}
    | {"windows without queries, %": _absolute("without queries", 0, 100)},
    "retractions": {
        "retractions": COUNTED["retractions"],
        "tokens computed again": _counted("computed again", 0),
        "decode steps": COUNTED["decode steps"],
        "mean running": COUNTED["mean running"],
    },
    "short": {name: COUNTED[name] for name in ("decode steps", "mean running")} | WALL,
}


def table(results: list[Result], scenario: str, view: str | None) -> str:
    """Markdown of one scenario: a row per point and row, medians over the repetitions."""
    points = {point: rows for (name, point), rows in by_point(results).items() if name == scenario}
    columns = VIEWS[view]
    first = ["point", "row"] if len(points) > 1 else ["row"]
    lines = []
    for point, rows in points.items():
        for row in rows:
            cells = [point, row][-len(first) :] + [cell(rows, row) for cell in columns.values()]
            lines.append(cells)
    return grid([*first, *columns], lines)


def render(document: str, folder: Path = RESULTS) -> str:
    """``document`` with every marked table made anew whose result is in ``folder``.

    Raises
    ------
    ValueError
        Where a mark names a view, or a scenario of an existing result, that is not there.
    """

    def body(name: str) -> str | None:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"a mark is RESULT/SCENARIO VIEW, not {name}")
        if name == "projection/again":
            return projection.again() + "\n"
        path = folder / f"{match['result']}.json"
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        scenario, view = match["scenario"], match["view"]
        if scenario == "projection":
            return projection.table(result) + "\n"
        if scenario == "longest":
            return longest.table(result)
        if view not in VIEWS or all(run["scenario"] != scenario for run in result["runs"]):
            raise ValueError(f"{path.name} has no {scenario}, or there is no view {view}")
        return table(result["runs"], scenario, view)

    return marked.fill(document, "serving", body)


def main() -> int:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "documents", nargs="+", type=command_line.file, help="Markdown files with marked tables"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: the committed ones")
    options = parser.parse_args()
    marked.rewrite(options.documents, lambda text: render(text, options.results), parser)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
