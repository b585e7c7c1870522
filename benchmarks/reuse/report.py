"""What the reuse of answers saved: tables and a plot of one result."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.reuse.measure import Sizes
from kara_sglang.benchmarks.serving.rows import STOCK


def over_repetitions(runs: list[list[dict[str, float]]], step: int, key: str) -> float:
    return statistics.median(run[step][key] for run in runs)


def markdown(found: dict[str, Any], sizes: Sizes) -> str:
    lines = []
    for pool, rows in found["steps"].items():
        lines += [
            f"### Steps, {pool} pool ({getattr(sizes, pool)} slots)",
            "",
        ]
        shown = []
        for step in range(sizes.steps):
            cells = []
            for runs in rows.values():
                prompt = over_repetitions(runs, step, "prompt_tokens")
                cached = over_repetitions(runs, step, "cached_tokens")
                cells.append(f"{prompt - cached:.0f} of {prompt:.0f}")
                cells.append(f"{over_repetitions(runs, step, 'ttft_ms'):.0f}")
            shown.append([str(step + 1), *cells])
        columns = [name for row in rows for name in (f"{row}: computed", f"{row}: TTFT ms")]
        lines.append(grid(["step", *columns], shown))
    lines += [
        f"### {sizes.forks} forks of a chain of {sizes.chain} tokens, {sizes.fork_pool} slots",
        "",
    ]
    shown = []
    for name, row in found["forks"].items():
        ratio = row["peak_running"] / found["forks"][STOCK]["peak_running"]
        running = [str(row["peak_running"]), f"{row['mean_running']:.1f}", f"{ratio:.2f}"]
        shown.append([name, *running, str(row["decode_steps"]), f"{row['cached_tokens']:.0f}"])
    columns = ["row", "at once (peak)", "at once (mean)", "to stock (peak)", "decode steps", "cached"]
    lines.append(grid(columns, shown))
    return "\n".join(lines)


def draw(found: dict[str, Any], sizes: Sizes, path: Path) -> None:
    """Prompt tokens computed per step, one panel per pool."""
    from kara_sglang.benchmarks.plots import pyplot, save

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    steps = range(1, sizes.steps + 1)
    for panel, (pool, rows) in zip(panels, found["steps"].items(), strict=True):
        for name, runs in rows.items():
            computed = [
                over_repetitions(runs, step - 1, "prompt_tokens")
                - over_repetitions(runs, step - 1, "cached_tokens")
                for step in steps
            ]
            # Lines that lie on each other must all be seen.
            style = {STOCK: "s-", "exact": "^:", "compressed": "o--"}[name]
            panel.plot(steps, computed, style, label=name)
        panel.set_title(f"{pool} pool")
        panel.set_xlabel("step")
        panel.set_xticks(list(steps))
    panels[0].set_ylim(bottom=0)  # of both, when both are drawn
    panels[0].set_ylabel("prompt tokens computed")
    panels[0].legend(frameon=False)
    save(figure, path)
