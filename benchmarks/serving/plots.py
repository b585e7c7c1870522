"""Plots of a result, one per scenario.

    python -m kara_sglang.benchmarks.serving.plots RESULT.json [--out docs/throughput]

draws anew what the run has drawn beside its result.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.plots import Figure, pyplot, save
from kara_sglang.benchmarks.serving.report import Result, by_point, median, ratios
from kara_sglang.benchmarks.serving.rows import STOCK

Rows = dict[str, list[Result]]

COLORS = {
    "mean running": "#4c72b0",
    "output tok/s": "#dd8452",
    "CPU s per 1000 tok": "#8c8c8c",
}


def draw(results: list[Result], stem: Path) -> list[Path]:
    """Write ``STEM-SCENARIO.png`` for every scenario with something to draw; returns their paths."""
    scenarios: dict[str, dict[str, Rows]] = {}
    for (scenario, point), rows in by_point(results).items():
        if any(_comparable(rows)):
            scenarios.setdefault(scenario, {})[point] = rows
    written = []
    for scenario, points in scenarios.items():
        path = stem.with_name(f"{stem.name}-{scenario}.png")
        if scenario == "pool" and len(points) > 1:
            figure = _pool(points)
        elif scenario == "concurrency" and len(points) > 1:
            figure = _concurrency(points)
        else:
            figure = _bars(points, scenario)
        save(figure, path)
        written.append(path)
    return written


def _comparable(rows: Rows) -> list[str]:
    """Rows of this engine, whose steps are known; another engine's rate says nothing here."""
    return [name for name in rows if name != STOCK and ratios(rows, name, "decode steps")]


def _spread(rows: Rows, name: str, column: str) -> tuple[float, float, float]:
    """Median of the ratios to stock, and how far the lowest and the highest lie from it."""
    values = ratios(rows, name, column)
    middle = statistics.median(values)
    return middle, middle - min(values), max(values) - middle


def _bars(points: dict[str, Rows], scenario: str) -> Figure:
    """What a scenario gives per row, as ratios to stock; a panel per point."""
    widths = [len(_comparable(rows)) + 1 for rows in points.values()]
    figure, panels = pyplot.subplots(
        1,
        len(points),
        figsize=(2 + 0.75 * sum(widths), 3.8),
        width_ratios=widths,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (point, rows) in zip(panels[0], points.items(), strict=True):
        names = _comparable(rows)
        for number, (column, color) in enumerate(COLORS.items()):
            spread = [_spread(rows, name, column) for name in names]
            middle, low, high = zip(*spread, strict=True)
            places = [i + 0.28 * (number - 1) for i in range(len(names))]
            axes.bar(places, middle, 0.26, label=column, color=color, yerr=(low, high), capsize=2)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_title(f"{scenario}: {point}")
    panels[0][0].set_ylabel("ratio to stock SGLang")
    panels[0][-1].legend(frameon=False, fontsize="small")
    return figure


def _pool(points: dict[str, Rows]) -> Figure:
    """Ratios to stock over the pool's size: where a line meets 1, compression begins to pay."""
    points = dict(sorted(points.items(), key=lambda pair: _slots(pair[1])))
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axes, column in zip(panels, ("output tok/s", "mean running"), strict=True):
        for name in dict.fromkeys(name for rows in points.values() for name in _comparable(rows)):
            there = [rows for rows in points.values() if name in _comparable(rows)]
            middle, low, high = zip(*(_spread(rows, name, column) for rows in there), strict=True)
            slots = [_slots(rows) for rows in there]
            axes.errorbar(slots, middle, (low, high), fmt="o-", capsize=3, label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xticks(
            [_slots(rows) for rows in points.values()],
            [f"{_slots(rows):,}\n{point}" for point, rows in points.items()],
            fontsize="small",
        )
        axes.minorticks_off()
        axes.set(xlabel="KV slots, and requests that fit uncompressed", title=column)
    panels[0].set_ylabel("ratio to stock SGLang")
    panels[0].legend(frameon=False)
    return figure


def _concurrency(points: dict[str, Rows]) -> Figure:
    """Requests that run and tokens per second over the number of clients."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name in dict.fromkeys(name for rows in points.values() for name in rows):
        there = {int(point.split()[0]): rows[name] for point, rows in points.items() if name in rows}
        there = dict(sorted(there.items()))
        means = [median(runs, "mean running") for runs in there.values()]
        if None in means:
            continue
        (line,) = left.plot(there.keys(), means, "o-", label=name)
        peaks = [median(runs, "peak running") for runs in there.values()]
        left.plot(there.keys(), peaks, ":", color=line.get_color())
        speeds = [[run["client"]["output_throughput"] for run in runs] for runs in there.values()]
        middle = [statistics.median(values) for values in speeds]
        low = [m - min(values) for m, values in zip(middle, speeds, strict=True)]
        high = [max(values) - m for m, values in zip(middle, speeds, strict=True)]
        right.errorbar(there.keys(), middle, (low, high), fmt="o-", capsize=3, label=name)
    left.set(xlabel="clients", title="running requests: mean, and peak (dotted)", ylim=(0, None))
    right.set(xlabel="clients", title="output tok/s", ylim=(0, None))
    left.legend(frameon=False)
    return figure


def _slots(rows: Rows) -> int:
    return next(iter(rows.values()))[0]["pool"]


def main() -> int:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "result", type=command_line.file, help="JSON that kara_sglang.benchmarks.serving wrote"
    )
    parser.add_argument("--out", type=Path, help="beginning of the files' names; default: the result's")
    options = parser.parse_args()
    stem = options.out or options.result.with_suffix("")
    for path in draw(json.loads(options.result.read_text())["runs"], stem):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
