"""Plots of the tables."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from kara_sglang.benchmarks.serving.report import Result, by_point, median, ratios
from kara_sglang.benchmarks.serving.rows import STOCK


def draw(results: list[Result], out: Path) -> list[Path]:
    """Write one picture per scenario that has something to draw beside ``out``; returns their paths."""

    def beside(scenario: str) -> Path:
        return out.with_name(f"{out.stem}-{scenario}.png")

    points = by_point(results)
    written = []
    if ("scarce", "equal work") in points:
        written.append(_bars(points[("scarce", "equal work")], beside("scarce")))
    for scenario in ("pool", "concurrency"):
        chosen = {point: rows for (name, point), rows in points.items() if name == scenario}
        if len(chosen) > 1:
            written.append(_lines(chosen, scenario, beside(scenario)))
    return written


def _bars(rows: dict[str, list[Result]], path: Path) -> Path:
    """What a scarce pool gives per row, as ratios to stock."""
    names = [name for name in rows if name != STOCK and ratios(rows, name, "output tok/s")]
    columns = {"mean running": "#4c72b0", "output tok/s": "#dd8452"}
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for number, (column, color) in enumerate(columns.items()):
        values = [ratios(rows, name, column) for name in names]
        middle = [statistics.median(v) if v else 0.0 for v in values]
        low = [m - min(v) if v else 0.0 for m, v in zip(middle, values, strict=True)]
        high = [max(v) - m if v else 0.0 for m, v in zip(middle, values, strict=True)]
        places = [i + 0.4 * (number - 0.5) for i in range(len(names))]
        axes.bar(places, middle, 0.38, label=column, color=color, yerr=(low, high), capsize=2)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel("ratio to stock SGLang")
    axes.set_title("Scarce KV pool, equal work")
    axes.legend(frameon=False)
    return _save(figure, path)


def _lines(points: dict[str, dict[str, list[Result]]], scenario: str, path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for row in next(iter(points.values())):
        where = [point for point in points if row in points[point]]
        axes.plot(where, [median(points[p][row], "mean running") for p in where], "o-", label=row)
    axes.set_ylabel("mean running requests")
    axes.set_xlabel("requests that fit the pool uncompressed" if scenario == "pool" else "")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
