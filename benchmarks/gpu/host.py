"""Times what a pass costs the host, without a GPU: kernels are compiled, and launched into nothing.

    python -m kara_sglang.benchmarks.gpu.host

For Qwen3-8B, all layers, passes over one and over eight windows that fall due together. Triton's driver
is stood in for, from its compiled kernel's own call on, so Triton's own cost of a launch is in the
figures and the CUDA driver's is not; nor is that of pinned memory, because tensors are on the CPU.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kara_sglang.benchmarks import command_line, machine
from kara_sglang.benchmarks.arithmetic import Settings
from kara_sglang.benchmarks.gpu.compiled import caught
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.models import MODELS, Model
from kara_sglang.benchmarks.output import write_json
from kara_sglang.config import KaraConfig
from kara_sglang.kernels.backend import LayerPool, WindowJob, WindowShape
from kara_sglang.kernels.record import FP8, PAGE, Ring, blocks_of
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.selectors.kara import KaraSelector
from kara_sglang.kernels.triton import TritonKernels

WINDOWS = (1, 8)
GOAL_US = 100.0
"""For one window, launches left out."""


class Driver:
    """As much of Triton's driver as a launch asks for; kernels are compiled for sm_90 and dropped."""

    utils = SimpleNamespace(
        load_binary=lambda *args: (None, 0, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None


def pass_over(
    model: Model, settings: Settings, windows: int
) -> tuple[TritonKernels, LayerPool, list[WindowJob]]:
    """Kernels, a pool and jobs of one model's shape; the layers share their memory."""
    heads, dim, width = model.kv_heads, model.head_dim, settings.window
    count = width + settings.delay
    keys = torch.zeros(windows * width, heads, dim, dtype=torch.bfloat16)
    blocks = len(blocks_of(1000, count))
    ring = Ring.zeros((model.group * blocks * PAGE + 1, heads, dim), FP8)
    still = RopeShift.of_layer(torch.ones(dim // 2), torch.zeros(dim // 2), dim, halves=True)
    pool = LayerPool(
        keys=[keys] * model.layers,
        values=[keys] * model.layers,
        rings=[ring] * model.layers,
        scales=[dim**-0.5] * model.layers,
        rope_shift=RopeShift.of([still] * model.layers),
    )
    selector = KaraSelector.from_config(KaraConfig())
    slots = torch.arange(windows * width, dtype=torch.int32).view(windows, width)
    pages = tuple(tuple(range(voice * blocks, (voice + 1) * blocks)) for voice in range(model.group))
    jobs = [WindowJob(of, settings.kept, selector, 0, 1000, count, pages) for of in slots]
    kernels = TritonKernels()
    kernels.reserve(
        torch.device("cpu"),
        WindowShape(model.layers, heads, dim, torch.bfloat16, width, width, model.group, count),
    )
    return kernels, pool, jobs


def microseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure(windows: int, repeats: int) -> dict[str, Any]:
    """One pass, with launches into nothing and without any; the first pass, which makes the plan."""
    kernels, pool, jobs = pass_over(MODELS[0], Settings(), windows)
    kernels.compress(pool, jobs)  # compiles
    with caught() as launches:
        kernels.compress(pool, jobs)
        number = len(launches)
        without = microseconds(lambda: kernels.compress(pool, jobs), repeats)
    kernels._plan.cache_clear()
    first = microseconds(lambda: kernels.compress(pool, jobs), 1)
    return {
        "windows": windows,
        "launches": number,
        "us": microseconds(lambda: kernels.compress(pool, jobs), repeats),
        "without_launches_us": without,
        "first_us": first,
    }


def show(found: dict[str, Any]) -> None:
    """Print the table of benchmarks/results/gpu/README.md."""
    rows = []
    for row in found["rows"]:
        cells = (row[name] for name in ("us", "without_launches_us", "first_us"))
        rows.append([str(row["windows"]), str(row["launches"]), *(f"{us:.0f}" for us in cells)])
    columns = ["windows", "launches", "host, us", "launches left out, us", "first pass, us"]
    print(grid(columns, rows), end="")


def main() -> None:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--repeats", type=command_line.whole(), default=2000, help="of each pass; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    arguments = parser.parse_args()
    driver.set_active(Driver())
    rows = [measure(windows, arguments.repeats) for windows in WINDOWS]
    report = {
        "machine": machine.kind(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "model": MODELS[0].name,
        "goal_us": GOAL_US,
        "rows": rows,
    }
    show(report)
    write_json(arguments.output, report, indent=2)


if __name__ == "__main__":
    main()
