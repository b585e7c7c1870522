"""What the reuse of answers saved: tables and a plot of one result."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

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
            "| step | " + " | ".join(f"{row}: computed | {row}: TTFT ms" for row in rows) + " |",
            "|---|" + "---|" * 2 * len(rows),
        ]
        for step in range(sizes.steps):
            cells = []
            for runs in rows.values():
                prompt = over_repetitions(runs, step, "prompt_tokens")
                cached = over_repetitions(runs, step, "cached_tokens")
                cells.append(f"{prompt - cached:.0f} of {prompt:.0f}")
                cells.append(f"{over_repetitions(runs, step, 'ttft_ms'):.0f}")
            lines.append(f"| {step + 1} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        f"### {sizes.forks} forks of a chain of {sizes.chain} tokens, {sizes.fork_pool} slots",
        "",
        "| row | at once (peak) | at once (mean) | to stock (peak) | decode steps | cached |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["forks"].items():
        ratio = row["peak_running"] / found["forks"][STOCK]["peak_running"]
        lines.append(
            f"| {name} | {row['peak_running']} | {row['mean_running']:.1f} | {ratio:.2f} | "
            f"{row['decode_steps']} | {row['cached_tokens']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], sizes: Sizes, path: Path) -> None:
    """Prompt tokens computed per step, one panel per pool."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
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
    figure.savefig(path, dpi=110)
    plt.close(figure)
