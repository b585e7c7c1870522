"""From runs to figures: medians, spreads, and ratios to stock SGLang within the same repetition."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.serving.rows import EXACT, STOCK

Result = dict[str, Any]

COLUMNS: dict[str, Callable[[Result], float | None]] = {
    "output tok/s": lambda r: r["client"]["output_throughput"],
    "request/s": lambda r: r["client"]["request_throughput"],
    "TTFT p50 ms": lambda r: r["client"]["median_ttft_ms"],
    "TTFT p99 ms": lambda r: r["client"]["p99_ttft_ms"],
    "ITL p50 ms": lambda r: r["client"]["median_itl_ms"],
    "ITL p99 ms": lambda r: r["client"]["p99_itl_ms"],
    "decode steps": lambda r: _counter(r, "decode_steps"),
    "mean running": lambda r: _counter(r, "mean_running"),
    "peak running": lambda r: _counter(r, "peak_running"),
    "retractions": lambda r: _counter(r, "retractions"),
    "computed again": lambda r: _computed_again(r),
    "answer s": lambda r: _seconds(r),
    "hit rate": lambda r: _counter(r, "hit_rate"),
    "slots per token": lambda r: _counter(r, "held"),
    "without queries": lambda r: _counter(r, "without_queries"),
    "without graph": lambda r: _counter(r, "without_graph"),
    "CPU s per 1000 tok": lambda r: (
        None if r["cpu_seconds_per_output_token"] is None else 1e3 * r["cpu_seconds_per_output_token"]
    ),
}


def _counter(result: Result, name: str) -> float | None:
    return None if result["counters"] is None else result["counters"].get(name)


def _computed_again(result: Result) -> float | None:
    """Tokens that prefills computed twice, where no prompt shares anything with another."""
    prefilled = _counter(result, "prefilled")
    if result["scenario"] != "retractions" or prefilled is None:
        return None
    return prefilled - float(result["client"]["total_input_tokens"])


def _seconds(result: Result) -> float | None:
    whole = result["client"].get("median_e2e_latency_ms")
    return None if whole is None else float(whole) / 1e3


def by_point(results: Iterable[Result]) -> dict[tuple[str, str], dict[str, list[Result]]]:
    """Results per (scenario, point) and row, repetitions in order."""
    points: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for r in sorted(results, key=lambda r: r["repetition"]):
        points.setdefault((r["scenario"], r["point"]), {}).setdefault(r["row"], []).append(r)
    return points


def median(results: list[Result], column: str) -> float | None:
    values = [value for r in results if (value := COLUMNS[column](r)) is not None]
    return statistics.median(values) if values else None


def ratios(rows: dict[str, list[Result]], row: str, column: str) -> list[float]:
    """``row`` over stock, one value per repetition that both have."""
    base = {r["repetition"]: COLUMNS[column](r) for r in rows.get(STOCK, [])}
    values = []
    for r in rows.get(row, []):
        mine, theirs = COLUMNS[column](r), base.get(r["repetition"])
        if mine is not None and theirs:
            values.append(mine / theirs)
    return values


def headline(results: list[Result]) -> dict[str, Any]:
    """The headline figures; those that were not measured are absent."""
    points = by_point(results)
    found: dict[str, Any] = {}

    def ratio(name: str, point: tuple[str, str], row: str, column: str) -> None:
        if values := ratios(points.get(point, {}), row, column):
            found[name] = statistics.median(values)

    scarce, ample = ("scarce", "equal work"), ("ample", "equal work")
    for share in ("0.5", "0.25"):
        row = f"kara-{share}"
        ratio(f"ratio_scarce_kara_{share}", scarce, row, "output tok/s")
        ratio(f"decode_steps_ratio_kara_{share}", scarce, row, "decode steps")
        ratio(f"mean_running_ratio_kara_{share}", scarce, row, "mean running")
        ratio(f"cpu_ratio_scarce_kara_{share}", scarce, row, "CPU s per 1000 tok")
    ratio("ratio_ample_kara_0.5", ample, "kara-0.5", "output tok/s")
    ratio("cpu_ratio_ample_kara_0.5", ample, "kara-0.5", "CPU s per 1000 tok")
    ratio("ratio_plugin_off", ample, "off", "output tok/s")
    ratio("cpu_ratio_plugin_off", ample, "off", "CPU s per 1000 tok")

    shared = points.get(("prefix", "shared prefix"), {})
    if STOCK in shared and "kara-0.5" in shared:
        mine, theirs = median(shared["kara-0.5"], "hit rate"), median(shared[STOCK], "hit rate")
        if mine is not None and theirs is not None:
            found["hit_rate_delta"] = 100 * (mine - theirs)  # points
    digests = {row: {r["probe"] for r in rs} for row, rs in points.get(ample, {}).items()}
    for row in EXACT:
        if row in digests and STOCK in digests:
            found[f"{row}_bit_exact"] = len(digests[row] | digests[STOCK]) == 1
    found["cpu_seconds_per_output_token"] = {
        f"{scenario}/{point}/{row}": statistics.median(r["cpu_seconds_per_output_token"] for r in runs)
        for (scenario, point), rows in points.items()
        for row, runs in rows.items()
        if all(r["cpu_seconds_per_output_token"] is not None for r in runs)
    }
    return found


def markdown(results: list[Result], not_run: dict[str, str]) -> str:
    """All tables: medians; for tok/s also the ratio to stock with its range over the repetitions."""
    lines = []
    for (scenario, point), rows in by_point(results).items():
        pool = next(iter(rows.values()))[0]["pool"]
        lines += [f"### {scenario}: {point} (pool {pool} slots)", ""]
        shown = []
        for row, runs in rows.items():
            values = ratios(rows, row, "output tok/s")
            ratio = "-"
            if values and row != STOCK:
                low, high = min(values), max(values)
                ratio = f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})"
            cells = [_shown(median(runs, column)) for column in COLUMNS]
            shown.append([row, str(len(runs)), ratio, *cells])
        lines.append(grid(["row", "runs", "tok/s to stock", *COLUMNS], shown))
    if not_run:
        lines += ["Not run:", ""] + [f"* {row}: {why}" for row, why in not_run.items()] + [""]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"
