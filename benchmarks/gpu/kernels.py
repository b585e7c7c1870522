"""Times every kernel on a GPU against its floor, after checking what it computes.

Needs torch, triton and this package, no SGLang::

    python -m kara_sglang.benchmarks.gpu.kernels --output kernels.json

Data are random and new in every run. Each kernel is compared with the torch reference on the GPU
first, then timed by CUDA events around replays of a CUDA graph. The floor is the kernel's work
(``floors.py``) at the bandwidth and matrix rate that are measured here first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from kara_sglang.benchmarks.gpu import floors
from kara_sglang.benchmarks.gpu.floors import DATASHEET, Gpu, Settings, Work
from kara_sglang.benchmarks.gpu.models import MODELS, Model
from kara_sglang.kernels import record as reference_record
from kara_sglang.kernels.backend import LayerPool, TorchKernels, WindowJob
from kara_sglang.kernels.compact import compact as reference_compact
from kara_sglang.kernels.score import AttentionRule
from kara_sglang.kernels.score import attention_scores as reference_scores
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.select import select as reference_select
from kara_sglang.kernels.selectors.kara import KaraSelector
from kara_sglang.kernels.triton import TritonKernels
from kara_sglang.kernels.triton.compact import compact
from kara_sglang.kernels.triton.pool import PoolTables
from kara_sglang.kernels.triton.score import Voters, attention_scores
from kara_sglang.kernels.triton.select import select

DEVICE = torch.device("cuda")
RULE = AttentionRule(squared=True, value_norm=1)
CHUNKS = ChunkRule(budget=0.1)
PAGE = 16


class Case:
    """One model's pool, ring and windows, filled with random numbers."""

    def __init__(self, model: Model, settings: Settings, num_jobs: int, layers: int) -> None:
        self.model = dataclasses.replace(model, layers=layers)
        self.settings = settings
        self.num_jobs = num_jobs
        heads, dim = model.kv_heads, model.head_dim
        width, ring_len = settings.window, settings.window + settings.delay
        units = 1 if settings.rotating else model.group
        slots = num_jobs * width * 2  # half of the pool belongs to others
        entries = num_jobs * units * ring_len + 1
        ring_dtype = reference_record.FP8 if settings.query_bytes == 1 else torch.bfloat16

        def normal(rows: int) -> torch.Tensor:
            return torch.randn(rows, heads, dim, device=DEVICE, dtype=torch.bfloat16)

        self.pool = LayerPool(
            keys=[normal(slots) for _ in range(layers)],
            values=[normal(slots) for _ in range(layers)],
            rings=[normal(entries).to(ring_dtype) for _ in range(layers)],
            ring_len=ring_len,
            scales=[dim**-0.5] * layers,
        )
        pages = torch.randperm(slots // PAGE, device=DEVICE)[: num_jobs * width // PAGE]
        self.slots = (pages[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).int()
        self.slots = self.slots.view(num_jobs, width)
        self.units = torch.arange(num_jobs * units, device=DEVICE).view(num_jobs, units)
        self.starts = [16 + 1003 * job for job in range(num_jobs)]
        self.tables = PoolTables.of(self.pool)
        self.voters = Voters(self.units, torch.tensor(self.starts, device=DEVICE), 0, ring_len)
        self.scores = torch.empty(layers, num_jobs, heads, width, device=DEVICE)
        self.sums = torch.empty(layers * num_jobs * heads * self.voters.rows, device=DEVICE)
        self.kept = torch.empty(
            layers, num_jobs, heads, settings.kept, dtype=torch.int64, device=DEVICE
        )
        batch = 64
        group = model.group
        self.queries = torch.randn(batch, model.query_heads * dim, device=DEVICE, dtype=torch.bfloat16)
        picked = torch.randperm(entries - 1, device=DEVICE)[: num_jobs * group].view(-1, group)
        if settings.rotating:
            picked[:, 1:] = entries - 1
        idle = torch.full((batch - num_jobs, group), entries - 1, device=DEVICE)
        self.entries = torch.cat([picked, idle])[torch.randperm(batch, device=DEVICE)]

    def record(self) -> None:
        for ring in self.pool.rings:
            TritonKernels().record(ring, self.entries, self.queries)

    def score(self) -> None:
        attention_scores(
            self.tables,
            range(self.model.layers),
            self.slots,
            self.voters,
            ring_len=self.pool.ring_len,
            rule=RULE,
            sums=self.sums,
            out=self.scores,
        )

    def select(self) -> None:
        select(self.scores, self.settings.kept, CHUNKS, self.kept)

    def compact(self) -> None:
        for table, row_bytes in self.tables.moves:
            compact(
                table,
                self.slots,
                self.kept,
                num_kv_heads=self.model.kv_heads,
                row_bytes=row_bytes,
                alignment=self.tables.alignment,
            )

    def jobs(self) -> list[WindowJob]:
        return [
            WindowJob(
                slots=self.slots[job],
                kept=self.settings.kept,
                selector=KaraSelector(chunks=CHUNKS, rule=RULE),
                seed=0,
                query_start=self.starts[job],
                query_count=self.settings.window + self.settings.delay,
                units=self.units[job],
            )
            for job in range(self.num_jobs)
        ]


def check(case: Case) -> dict[str, Any]:
    """Every kernel against the reference; raises where they differ.

    Returns
    -------
    dict
        ``score_error``: largest relative difference of a score. ``same_choice``: share of positions
        that a whole pass and the reference's agree on; near ties may fall either way.
    """
    pool, settings = case.pool, case.settings
    rings = [ring.view(torch.uint8).clone() for ring in pool.rings]
    case.record()
    for ours, ring in zip(pool.rings, rings, strict=True):
        theirs = ring.view(ours.dtype)
        reference_record.record(theirs, case.entries, case.queries)
        require(torch.equal(ours[:-1].view(torch.uint8), theirs[:-1].view(torch.uint8)), "record")

    case.scores.fill_(float("nan"))
    case.score()
    expected = torch.empty_like(case.scores)
    for layer, ring in enumerate(pool.rings):
        for job, slots in enumerate(case.slots.long()):
            expected[layer, job] = reference_scores(
                reference_record.recorded(
                    ring, case.starts[job], case.voters.count, case.units[job], pool.ring_len
                ),
                pool.keys[layer][slots],
                pool.values[layer][slots],
                scale=pool.scales[layer],
                rule=RULE,
            )
    error = ((case.scores - expected).abs() / expected).max().item()
    require(error < 1e-3, f"score: relative error {error}")

    # Before anything has moved: a compacted window holds tokens twice, and equal scores are a toss-up.
    theirs = torch.stack(TorchKernels().compress(copied(pool), case.jobs()))
    ours = torch.stack(TritonKernels().compress(copied(pool), case.jobs()))
    same = (ours[..., None] == theirs[..., None, :]).any(-1).float().mean().item()
    require(same > 0.99, f"a pass: {same:.4f} of the positions agree")

    case.kept.fill_(-1)
    case.select()
    require(torch.equal(case.kept, reference_select(case.scores, settings.kept, CHUNKS)), "select")

    copies = [buffer.clone() for buffer in (*pool.keys, *pool.values)]
    case.compact()
    for index, (ours, theirs) in enumerate(zip((*pool.keys, *pool.values), copies, strict=True)):
        for job in range(case.num_jobs):
            reference_compact(theirs, case.slots[job], case.kept[index % case.model.layers, job])
        require(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), "compact")

    return {"score_error": error, "same_choice": same}


def copied(pool: LayerPool) -> LayerPool:
    """A pool of its own with the same ring."""
    keys, values = ([buffer.clone() for buffer in side] for side in (pool.keys, pool.values))
    return dataclasses.replace(pool, keys=keys, values=values)


def require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(f"wrong result: {what}")


def seconds(call: Callable[[], None], repeats: int = 20) -> float:
    """Median time of one call, from CUDA events around graph replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return timed(graph.replay, repeats)


def timed(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of one call, from CUDA events around it."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def measured_ceilings() -> Gpu:
    """Copy bandwidth (read plus write) and bf16 matrix rate of this GPU, on random data."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds(lambda: target.copy_(source))
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    rate = 2 * 8192**3 / seconds(lambda: torch.mm(a, b, out=out))
    return Gpu(torch.cuda.get_device_name(), bandwidth, rate, rate / 256)


def measure(case: Case, gpu: Gpu) -> dict[str, Any]:
    """Time of each kernel over all layers and windows, beside its floor."""
    results: dict[str, Any] = {}
    moving = (case.kept != torch.arange(case.settings.kept, device=DEVICE)).float().mean().item()
    for name in ("record", "score", "select", "compact"):
        work: Work = getattr(floors, name)(case.model, case.settings) * case.num_jobs
        if name == "compact":  # rows that stay are not touched
            work = dataclasses.replace(work, bytes=round(work.bytes * moving))
        took = seconds(getattr(case, name))
        floor = gpu.floor(work)
        results[name] = {"us": took * 1e6, "floor_us": floor * 1e6, "of_floor": floor / took}
        print(f"  {name:8} {took * 1e6:9.1f} us, floor {floor * 1e6:9.1f} us, {floor / took:6.1%}")
    kernels, jobs = TritonKernels(), case.jobs()
    kernels.compress(case.pool, jobs)
    took = timed(lambda: kernels.compress(case.pool, jobs))
    step = gpu.floor(floors.decode_step(case.model, 64, 4096))
    steps = case.settings.window - case.settings.kept
    share = took / case.num_jobs * 64 / (steps * step)
    results["pass"] = {"us": took * 1e6, "share_of_decode_floor": share}
    print(f"  whole pass, launched from the host: {took * 1e6:.1f} us, {share:.2%} of decode's floor")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[model.name for model in MODELS])
    parser.add_argument("--windows", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--jobs", type=int, default=8, help="windows in one pass")
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels.py: no CUDA GPU here, nothing was measured")

    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    torch.seed()  # fresh data in every run
    gpu = measured_ceilings()
    print(
        f"{gpu.name}: copies {gpu.bandwidth / 1e12:.2f} TB/s, bf16 {gpu.flop_rate / 1e12:.0f} TFLOP/s"
    )
    report: dict[str, Any] = {
        "gpu": dataclasses.asdict(gpu),
        "datasheet": [dataclasses.asdict(known) for known in DATASHEET],
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "seed": torch.initial_seed(),
        "runs": [],
    }
    for model in (model for model in MODELS if model.name in arguments.models):
        for window in arguments.windows:
            for rotating in (False, True):
                settings = Settings(window=window, kept=window // 2, rotating=rotating)
                print(f"{model.name}, W {window}, {'rotating' if rotating else 'all'} heads")
                checks = check(Case(model, settings, min(arguments.jobs, 2), layers=2))
                print(f"  correct: {checks}")
                case = Case(model, settings, arguments.jobs, layers=model.layers)
                case.score()
                case.select()
                report["runs"].append(
                    {
                        "model": model.name,
                        "settings": dataclasses.asdict(settings),
                        "jobs": arguments.jobs,
                        "checks": checks,
                        "kernels": measure(case, gpu),
                    }
                )
                del case
                torch.cuda.empty_cache()
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
