"""What the counted schedules would mean on a GPU: a projection, not a measurement.

    python -m kara_sglang.benchmarks.serving.projection RESULT.json [--out FILE.md]
    python -m kara_sglang.benchmarks.serving.projection --again

The schedules come from a counted run of the scenario ``pool``: for each pool, how many steps ran with
how many requests and slots. They are stretched in two directions. In length: for answers of L tokens
where l were counted, prompt, window, delay and steps are L / l times as many. In width: a card's pool
holds K such requests where the counted pool held k, so a step has K / k times the requests, and the
same share of the pool is held.

A step then takes as long as the weights' read or the batch's arithmetic, whichever is more, and after
that the read of all KV that is held (attention makes 4 to 7 operations per byte, far from any card's
limit). Prompts are computed at the card's full arithmetic rate, passes take their floor, and the ring
for the queries is taken out of the compressed server's pool. Left out on both sides: sampling,
launches, and what kernels fall short of the datasheet.

``--again`` says what a prefix costs that is computed again, beside a step of a full pool.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.arithmetic import DATASHEET, Gpu, Settings, Work, pass_floor
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.models import MODELS, Model
from kara_sglang.benchmarks.serving.rows import STOCK, rows
from kara_sglang.scheduler.ring.recorder import LAG

OUTPUTS = (4096, 8192, 16384)
PREFIXES = (512, 1024, 2048, 4096, 8192)
"""Tokens that a follow-up computes again."""
LENGTH = 4096
"""Tokens of each request that runs beside it."""
ROWS = ("kara-0.5", "kara-0.25")


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU by its datasheet, ``memory`` in bytes."""

    name: str
    memory: float
    gpu: Gpu

    def pool(self, model: Model) -> float:
        """KV slots beside the weights: 90 % of the memory, as SGLang leaves some for activations."""
        return max(0.0, 0.9 * self.memory - 2e9 * model.parameters) / model.kv_bytes


# The L4's SMs make 1024 dense bf16 operations per clock and 16 exponentials.
CARDS = (
    Card("24 GB (L4)", 24e9, Gpu("L4", 0.30e12, 121e12, 121e12 / 64)),
    *(
        Card(f"{gigabytes} GB ({gpu.name})", gigabytes * 1e9, gpu)
        for gigabytes, gpu in zip((80, 141), DATASHEET, strict=True)
    ),
)


def step_seconds(model: Model, gpu: Gpu, running: float, slots: float) -> float:
    """One decode step of ``running`` requests that hold ``slots`` KV slots together: the weights' read
    or the batch's arithmetic, and then the read of all KV."""
    weights = 2e9 * model.parameters
    products = gpu.floor(Work(bytes=round(weights), flops=round(weights * running)))
    return products + slots * model.kv_bytes / gpu.bandwidth


def prompt_seconds(model: Model, gpu: Gpu, tokens: float) -> float:
    """The prefill of so many tokens."""
    return tokens * 2e9 * model.parameters / gpu.flop_rate


def ring_bytes(model: Model, settings: Settings) -> int:
    """Of the query ring, for one request that records one query head of each group in fp8."""
    tokens = settings.window + settings.delay + LAG
    return model.layers * model.kv_heads * (model.head_dim + 1) * tokens


@dataclass(frozen=True, slots=True)
class Counted:
    """A counted run of one row in one pool: the load in tokens and requests, and the schedule.

    Attributes
    ----------
    fits
        Requests that the pool holds uncompressed.
    pool
        KV slots.
    retain
        None: not compressed.
    schedule
        For each number of running requests: steps, and the slots that were held, summed over them.
    """

    fits: int
    pool: int
    requests: int
    prompt: int
    output: int
    window: int
    delay: int
    retain: float | None
    schedule: dict[int, tuple[int, int]]

    def rate(self, model: Model, card: Card, output: int) -> float:
        """Output tokens per second of the stretched schedule, for answers of ``output`` tokens."""
        longer = output / self.output
        length = (self.prompt + self.output) * longer
        settings = Settings(
            window=round(self.window * longer),
            kept=round(self.window * longer * (self.retain or 1.0)),
            delay=round(self.delay * longer),
            mean=True,
        )
        pool = card.pool(model)
        if self.retain is not None:
            recorders_per_slot = max(self.schedule) / self.fits / length
            pool /= 1 + recorders_per_slot * ring_bytes(model, settings) / model.kv_bytes
        wider = pool / length / self.fits

        gpu = card.gpu
        seconds = 0.0
        for running, (steps, slots) in self.schedule.items():
            held = slots / steps / self.pool * pool
            seconds += steps * longer * step_seconds(model, gpu, running * wider, held)
        requests = self.requests * wider
        seconds += prompt_seconds(model, gpu, requests * self.prompt * longer)
        if self.retain is not None:
            windows = max(0, self.output - self.delay) // self.window
            seconds += requests * windows * pass_floor(model, settings, gpu)
        return requests * output / seconds


def counted(result: dict[str, Any]) -> dict[int, dict[str, Counted]]:
    """Schedules of the last repetition of the scenario ``pool``: by requests that fit, and row.

    Raises
    ------
    ValueError
        Where the result has none.
    """
    scale = result["scale"]
    known = rows(scale["window"])
    found: dict[int, dict[str, Counted]] = {}
    for run in result["runs"]:
        if run["scenario"] != "pool" or run["row"] not in (STOCK, *ROWS):
            continue
        fits, name = int(run["point"].split()[0]), run["row"]
        found.setdefault(fits, {})[name] = Counted(
            fits=fits,
            pool=run["pool"],
            requests=run["requests"],
            prompt=scale["prompt"],
            output=scale["output"],
            window=scale["window"],
            delay=scale["delay"],
            retain=None if name == STOCK else known[name].retain,
            schedule={int(b): tuple(v) for b, v in run["counters"]["schedule"].items()},
        )
    # Each is compared with stock in the same pool; an interrupted run may lack some.
    found = {fits: by_row for fits, by_row in found.items() if {STOCK, *ROWS} <= set(by_row)}
    if not found:
        raise ValueError(
            f"the result has no pool of the scenario `pool` with {STOCK}, {', '.join(ROWS)}"
        )
    return dict(sorted(found.items()))


def table(result: dict[str, Any]) -> str:
    """Predicted gain in output tok/s over stock: cards and lengths down, scarcity across."""
    runs = counted(result)
    shares = [f"{fits / by_row[STOCK].requests:.0%} of the load" for fits, by_row in runs.items()]
    lines = []
    for model in MODELS[:2]:
        for card in CARDS:
            for output in OUTPUTS:
                cells = []
                for by_row in runs.values():
                    base = by_row[STOCK].rate(model, card, output)
                    gains = [by_row[name].rate(model, card, output) / base for name in ROWS]
                    cells.append(" and ".join(f"{gain:.2f}" for gain in gains))
                one = next(iter(runs.values()))[STOCK]
                room = card.pool(model) / (output * (1 + one.prompt / one.output))
                where = [
                    model.name,
                    card.name,
                    f"{card.pool(model):,.0f}",
                    f"{output:,}",
                    f"{room:,.0f}",
                ]
                lines.append(where + cells)
    return (
        "*A projection from counted schedules, not a measurement.* Output tok/s over stock's, half and "
        "a quarter kept, in pools that hold so much of the load uncompressed:\n\n"
        + grid(["model", "card", "KV slots", "answer", "stock runs", *shares], lines).rstrip("\n")
    )


def again() -> str:
    """What a follow-up waits for where its prefix is computed again: cards down, tokens across."""
    lines = []
    for model in MODELS[:2]:
        for card in CARDS:
            pool = card.pool(model)
            step = step_seconds(model, card.gpu, pool / LENGTH, pool)
            costs = [prompt_seconds(model, card.gpu, tokens) for tokens in PREFIXES]
            cells = [f"{1000 * cost:,.0f} ms, {cost / step:.1f} steps" for cost in costs]
            lines.append([model.name, card.name, *cells])
    tokens = [f"{tokens:,} tokens" for tokens in PREFIXES]
    return (
        "*By datasheets, not a measurement.* A prefill of so many tokens, and how many decode steps of "
        f"a pool full of requests of {LENGTH:,} tokens take as long:\n\n"
        + grid(["model", "card", *tokens], lines).rstrip("\n")
    )


def main() -> int:
    parser = command_line.parser(__spec__, __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "result",
        nargs="?",
        type=command_line.file,
        help="JSON of a run that had the scenario `pool`",
    )
    what.add_argument("--again", action="store_true", help="what prefixes cost that are computed again")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    try:
        text = again() if options.again else table(json.loads(options.result.read_text()))
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.result}: {error}")
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
