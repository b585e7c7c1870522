"""What the counted schedules would mean on a GPU: a projection, not a measurement.

A decode step on a GPU takes at least as long as reading the weights once and the running requests' KV
once, or as long as its arithmetic, whichever is more. The schedules come from a counted run (scenario
``pool``): for each pool, how many steps ran with how many requests and slots. They are stretched to the
GPU's pool, which holds K uncompressed requests where the counted pool held k: a step with b requests
and s slots becomes one with b * K / k requests and the same share of the pool, and an answer of L
tokens takes L / l times as many steps. Left out on both sides: prefill, sampling, launch times, and
what the attention kernels fall short of the bandwidth. The pass is charged at its floor.

    python -m kara_sglang.benchmarks.serving.projection RESULT.json [--out FILE.md]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks.gpu.floors import Settings, passes
from kara_sglang.benchmarks.gpu.models import MODELS, Model
from kara_sglang.benchmarks.serving.rows import STOCK


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU by its datasheet: bytes, bytes per second, dense bf16 operations per second."""

    name: str
    memory: float
    bandwidth: float
    flop_rate: float

    def pool(self, model: Model) -> float:
        """KV slots beside the weights: 90 % of the memory, as SGLang leaves some for activations."""
        return max(0.0, 0.9 * self.memory - 2e9 * model.parameters) / model.kv_bytes


# NVIDIA's datasheets.
CARDS = (
    Card("24 GB (L4)", 24e9, 0.30e12, 121e12),
    Card("80 GB (H100 SXM)", 80e9, 3.35e12, 989e12),
    Card("141 GB (H200 SXM)", 141e9, 4.8e12, 989e12),
)
PROMPT = 512


@dataclass(frozen=True, slots=True)
class Counted:
    """A counted run of one row in one pool: the schedule, and what it was counted on."""

    fits: int  # requests that the pool holds uncompressed
    pool: int
    output: int
    requests: int
    compressed: bool
    schedule: dict[int, tuple[int, int]]

    def seconds(self, model: Model, card: Card, output: int) -> float:
        """Time of the stretched schedule on a card, for answers of ``output`` tokens."""
        pool = card.pool(model)
        stretch = pool / (PROMPT + output) / self.fits
        total = 0.0
        for requests, (steps, slots) in self.schedule.items():
            batch = requests * stretch
            held = slots / steps / self.pool * pool
            memory = (2e9 * model.parameters + held * model.kv_bytes) / card.bandwidth
            compute = 2e9 * model.parameters * batch / card.flop_rate
            total += steps * output / self.output * max(memory, compute)
        if self.compressed:
            work = passes(model, Settings())
            windows = self.requests * stretch * output / Settings().window
            total += windows * max(work.bytes / card.bandwidth, work.flops / card.flop_rate)
        return total


def counted(result: dict[str, Any]) -> dict[int, dict[str, Counted]]:
    """Schedules of the last repetition of the scenario ``pool``, per pool and row.

    Raises
    ------
    ValueError
        Where the result has none.
    """
    scale = result["scale"]
    found: dict[int, dict[str, Counted]] = {}
    for run in result["runs"]:
        if run["scenario"] != "pool" or run["counters"] is None:
            continue
        fits = int(run["point"].split()[0])
        schedule = {int(b): tuple(v) for b, v in run["counters"]["schedule"].items()}
        found.setdefault(fits, {})[run["row"]] = Counted(
            fits=fits,
            pool=run["pool"],
            output=scale["output"],
            requests=run["requests"],
            compressed=run["row"] != STOCK,
            schedule=schedule,
        )
    if not found:
        raise ValueError("the result has no counted run of the scenario `pool`")
    return found


def table(result: dict[str, Any]) -> str:
    """Predicted gain in output tok/s over stock, per model, card, answer length and scarcity."""
    runs = counted(result)
    lines = [
        "| model | card | answer | stock fits | requests wanted per one that fits | 0.5 | 0.25 |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in MODELS[:2]:
        for card in CARDS:
            if card.pool(model) <= 0:
                continue
            for output in (4096, 16384):
                for fits, rows in sorted(runs.items()):
                    base = rows[STOCK].seconds(model, card, output)
                    gains = [
                        f"{base / rows[name].seconds(model, card, output):.2f} x"
                        for name in ("kara-0.5", "kara-0.25")
                    ]
                    room = card.pool(model) / (PROMPT + output)
                    lines.append(
                        f"| {model.name} | {card.name} | {output} | {room:.0f} | "
                        f"{rows['stock'].requests / fits:.1f} | {gains[0]} | {gains[1]} |"
                    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kara_sglang.benchmarks.serving.projection", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("result", type=Path, help="JSON of a run that had the scenario `pool`")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    try:
        text = table(json.loads(options.result.read_text()))
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.result}: {error}")
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
