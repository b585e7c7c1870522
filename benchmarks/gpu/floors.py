"""The floors of the kernels: what each one takes at least.

Counted from shapes (``arithmetic.py``), nothing is measured::

    python -m kara_sglang.benchmarks.gpu.floors

prints the tables of benchmarks/results/gpu/README.md.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.arithmetic import (
    DATASHEET,
    KERNELS,
    Gpu,
    Settings,
    decode_step,
    pass_floor,
)
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.models import MODELS, Model
from kara_sglang.benchmarks.output import write_json

VARIANTS = {
    "W 512": Settings(),
    "W 512, mean": Settings(mean=True),
    "W 512, fp4": Settings(query_bits=4),
    "W 1024": Settings(window=1024, kept=512),
}


def share(model: Model, settings: Settings, gpu: Gpu, batch: int, context: int) -> float:
    """Floor of one pass over ``batch`` windows, over that of the W - R decode steps between passes."""
    steps = settings.window - settings.kept
    return (
        batch
        * pass_floor(model, settings, gpu)
        / (steps * gpu.floor(decode_step(model, batch, context)))
    )


def report(batch: int, context: int) -> dict[str, Any]:
    """All counts and floors, for :func:`show` and as JSON.

    Parameters
    ----------
    batch, context
        Requests, and cached tokens of each, in a decode step.
    """
    rows = []
    for model in MODELS:
        for label, settings in VARIANTS.items():
            work = {kernel.__name__: kernel(model, settings) for kernel in KERNELS}
            step = decode_step(model, batch, context)
            rows.append(
                {
                    "model": model.name,
                    "variant": label,
                    "settings": dataclasses.asdict(settings),
                    "kernels": {
                        name: {
                            **dataclasses.asdict(done),
                            "floor_us": {gpu.name: gpu.floor(done) * 1e6 for gpu in DATASHEET},
                        }
                        for name, done in work.items()
                    },
                    "step_floor_ms": {gpu.name: gpu.floor(step) * 1e3 for gpu in DATASHEET},
                    "share_of_decode": {
                        gpu.name: share(model, settings, gpu, batch, context) for gpu in DATASHEET
                    },
                }
            )
    return {
        "batch": batch,
        "context": context,
        "gpus": [dataclasses.asdict(gpu) for gpu in DATASHEET],
        "models": [dataclasses.asdict(model) for model in MODELS],
        "rows": rows,
    }


def show(found: dict[str, Any]) -> None:
    """Print the tables of benchmarks/results/gpu/README.md."""
    gpus = [gpu["name"] for gpu in found["gpus"]]
    names = [kernel.__name__ for kernel in KERNELS]
    print(f"floors in us: {' / '.join(gpus)}\n")
    rows = []
    for row in found["rows"]:
        cells = []
        for work in (row["kernels"][name] for name in names):
            matrix = f", {work['flops'] / 1e9:.0f} GFLOP" if work["flops"] else ""
            floors = " / ".join(f"{work['floor_us'][gpu]:.1f}" for gpu in gpus)
            cells.append(f"{work['bytes'] / 1e6:.2f} MB{matrix}: {floors}")
        rows.append([row["model"], row["variant"], *cells])
    print(grid(["model", "settings", *names], rows), end="")

    print(f"\nbatch {found['batch']}, {found['context']} cached tokens per request\n")
    rows = []
    for row in found["rows"]:
        cells = []
        for gpu in gpus:
            cells += [f"{row['step_floor_ms'][gpu]:.1f}", f"{row['share_of_decode'][gpu]:.2%}"]
        rows.append([row["model"], row["variant"], *cells])
    columns = [name for gpu in gpus for name in (f"{gpu}: step, ms", "pass, share")]
    print(grid(["model", "settings", *columns], rows), end="")


def main() -> None:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--batch", type=command_line.whole(), default=64, help="requests; default: %(default)s"
    )
    parser.add_argument(
        "--context",
        type=command_line.whole(),
        default=4096,
        help="cached tokens per request; default: %(default)s",
    )
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    arguments = parser.parse_args()
    found = report(arguments.batch, arguments.context)
    show(found)
    shown = {"versions": {"python": platform.python_version()}, **found}
    write_json(arguments.output, shown, indent=2)


if __name__ == "__main__":
    main()
