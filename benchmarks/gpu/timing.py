"""Times of kernels on a GPU, what that GPU reaches at best, and the versions that decide both."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import triton

from kara_sglang.benchmarks.arithmetic import Gpu

DEVICE = torch.device("cuda")


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """``call`` as a CUDA graph; returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of one call, from CUDA events around graph replays."""
    return timed(captured(call), repeats)


def timed(
    call: Callable[[], Any], repeats: int = 20, before: Callable[[], None] = lambda: None
) -> float:
    """Median time of one call, from CUDA events around it; the GPU is idle and ``before`` done when it
    begins, so that what the host takes until the first launch counts."""
    times = []
    for _ in range(repeats + 3):
        before()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def launch_times(call: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Microseconds of each kernel in one call of ``call``, by name, longest first, as the profiler sees
    them; of a kernel that is launched several times the sum. Nothing is compiled any more."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / repeats for event in profiler.key_averages()}
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def measured_ceilings() -> Gpu:
    """Copy bandwidth (read plus write) and bf16 matrix rate of this GPU, on random data."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds(lambda: target.copy_(source))
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    rate = 2 * 8192**3 / seconds(lambda: torch.mm(a, b, out=out))
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    return Gpu(torch.cuda.get_device_name(), bandwidth, rate, exp_rate(properties))


def exp_rate(properties: dict[str, int]) -> float:
    """Exponentials per second: 16 per SM and clock (CUDA C++ Programming Guide, arithmetic throughput;
    the same from compute capability 8.0 to 10.0), at the GPU's highest clock.

    ``properties`` are Triton's, with the clock in kHz.
    """
    return 16 * properties["multiprocessor_count"] * properties["sm_clock_rate"] * 1e3


def versions() -> dict[str, str | None]:
    """Of everything that decides how fast it is."""
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "driver": driver,
        "python": platform.python_version(),
    }
