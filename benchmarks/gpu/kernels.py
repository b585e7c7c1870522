"""Times every kernel on a GPU against its floor, after checking what it computes.

Needs torch, triton and this package, no SGLang::

    python -m kara_sglang.benchmarks.gpu.kernels --output kernels.json

Data are random and new in every run. Each kernel is compared with the torch reference on the GPU
first, then timed by CUDA events around replays of a CUDA graph. The floor is the kernel's work
(``floors.py``) at the bandwidth and matrix rate that are measured here first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.gpu import floors
from kara_sglang.benchmarks.gpu.floors import DATASHEET, Gpu, Settings, Work
from kara_sglang.benchmarks.gpu.models import MODELS, Model
from kara_sglang.benchmarks.output import write_json
from kara_sglang.config import KaraConfig
from kara_sglang.kernels import record as reference_record
from kara_sglang.kernels.backend import LayerPool, TorchKernels, WindowJob, WindowShape
from kara_sglang.kernels.compact import compact as reference_compact
from kara_sglang.kernels.record import FP4, FP8, Ring, Step
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.score import AttentionRule, blend_neighbours
from kara_sglang.kernels.score import attention_scores as reference_scores
from kara_sglang.kernels.score import weight_scores as reference_weights
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.select import select as reference_select
from kara_sglang.kernels.selectors.base import Selector
from kara_sglang.kernels.selectors.kara import KaraSelector
from kara_sglang.kernels.selectors.keys import KeysSelector
from kara_sglang.kernels.triton import TritonKernels
from kara_sglang.kernels.triton.compact import compact
from kara_sglang.kernels.triton.pool import PoolTables
from kara_sglang.kernels.triton.prepare import weight_scores
from kara_sglang.kernels.triton.score import Scratch, Voters, attention_scores, recorders_of
from kara_sglang.kernels.triton.select import select
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder

DEVICE = torch.device("cuda")
RULE = KaraSelector.from_config(KaraConfig()).rule
CHUNKS = ChunkRule(budget=0.1)
KARA, KEYS = KaraSelector(chunks=CHUNKS, rule=RULE), KeysSelector.from_config(KaraConfig())
PAGE = 16
BATCH = 64  # tokens of a decode step
RING_DTYPES = {4: FP4, 8: FP8, 16: torch.bfloat16}
OTHER_CASES = (
    (Model("head_dim 64", 1, 12, 4, 64, 0), torch.float16, 8),
    (Model("head_dim 64", 1, 12, 4, 64, 0), torch.bfloat16, 4),
    (Model("head_dim 80", 1, 4, 4, 80, 0), torch.bfloat16, 8),
    (Model("head_dim 80", 1, 4, 4, 80, 0), torch.float16, 4),
    (Model("head_dim 96", 1, 14, 2, 96, 0), torch.bfloat16, 16),
    (Model("head_dim 128", 1, 32, 2, 128, 0), FP8, 8),
    (Model("head_dim 128", 1, 32, 2, 128, 0), FP8, 4),
    (Model("head_dim 128", 1, 8, 2, 128, 0), torch.float16, 16),
    (Model("head_dim 192", 1, 6, 2, 192, 0), torch.bfloat16, 8),
    (Model("head_dim 192", 1, 6, 2, 192, 0), torch.bfloat16, 4),
    (Model("head_dim 256", 1, 16, 8, 256, 0), FP8, 16),
    (Model("head_dim 256", 1, 16, 8, 256, 0), torch.bfloat16, 4),
)
"""Model shapes, dtype of K and V, bits of a recorded number: checked, not timed."""


class Case:
    """One model's pool, ring and windows, filled with random numbers."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        num_jobs: int,
        layers: int,
        key_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.model = dataclasses.replace(model, layers=layers)
        self.settings = settings
        self.num_jobs = num_jobs
        heads, dim = model.kv_heads, model.head_dim
        width, self.voices = settings.window, 1 if settings.mean else model.group
        slots = num_jobs * width * 2  # half of the pool belongs to others
        ring_dtype = RING_DTYPES[settings.query_bits]
        shape = AttentionShape(layers, model.query_heads, heads, dim, torch.bfloat16, DEVICE)
        count = width + settings.delay
        of_page = reference_record.PAGE * shape.entry_bytes(ring_dtype)
        num_pages = num_jobs * self.voices * reference_record.most_blocks(count)
        self.recorder = QueryRecorder(shape, width, settings.delay, num_pages * of_page, ring_dtype)
        self.recorder.allocate_tables(1 + BATCH)
        self.starts = [16 + 1003 * job for job in range(num_jobs)]
        self.owners = []
        for job, start in enumerate(self.starts):
            owner = self.recorder.acquire(1 + job, self.voices, start, step=0)
            for position in range(start, start + count):
                require(self.recorder.extend(owner, position), "pages for each token of a window")
            self.owners.append(owner)
        self.recorder.flush()

        def normal(rows: int) -> torch.Tensor:
            return torch.randn(rows, heads, dim, device=DEVICE, dtype=torch.bfloat16)

        angles = width * 1e4 ** -torch.arange(0, 1, 2 / dim, device=DEVICE)  # as of RoPE
        self.pool = LayerPool(
            keys=[normal(slots).to(key_dtype) for _ in range(layers)],
            values=[normal(slots).to(key_dtype) for _ in range(layers)],
            rings=self.recorder.rings,
            scales=[dim**-0.5] * layers,
            rope_shift=RopeShift.of(
                [RopeShift.of_layer(angles.cos(), angles.sin(), dim, halves=True)] * layers
            ),
        )
        for ring in self.recorder.rings:
            filled = Ring.of(normal(len(ring.queries)), ring_dtype)
            for part, full in zip(ring.parts, filled.parts, strict=True):
                part.copy_(full)
        pages = torch.randperm(slots // PAGE, device=DEVICE)[: num_jobs * width // PAGE]
        self.slots = (pages[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).int()
        self.slots = self.slots.view(num_jobs, width)
        self.tables = PoolTables.of(self.pool)
        self.voters = Voters(recorders_of(self.jobs()).to(DEVICE), self.voices, 0, width)
        self.scores = torch.empty(layers, num_jobs, heads, width, device=DEVICE)
        regions = Scratch.regions(
            (layers, num_jobs, heads), width, dim, self.voters.rows, self.tables.dot
        )
        self.scratch = Scratch(
            *(torch.empty(shape, dtype=dtype, device=DEVICE) for shape, dtype in regions)
        )
        self.kept = torch.empty(
            layers, num_jobs, heads, settings.kept, dtype=torch.int32, device=DEVICE
        )
        self.rows = 1 + torch.randperm(BATCH, device=DEVICE)  # most of them have no recorder
        self.positions = torch.randint(0, 40_000, (BATCH,), device=DEVICE)
        for job, start in enumerate(self.starts):  # only there the recorders have pages
            self.positions[self.rows == 1 + job] = start + int(torch.randint(count, ()))
        # As the query part of a QKV projection.
        projected = torch.randn(
            layers, BATCH, model.query_heads + 2 * heads, dim, device=DEVICE, dtype=torch.bfloat16
        )
        self.queries = projected.flatten(2)[..., : model.query_heads * dim]
        self.recording = TritonKernels()

    def record(self) -> None:
        for layer, queries in enumerate(self.queries):
            self.recorder.record(self.recording, layer, queries, self.rows, self.positions)

    def record_in_a_model(self) -> None:
        """The same, but each layer's queries are made and dropped, and other tensors then come to lie
        in the memory that is free."""
        for layer, stored in enumerate(self.queries):
            queries = stored.clone()
            self.recorder.record(self.recording, layer, queries, self.rows, self.positions)
            del queries
            torch.full_like(stored, torch.nan)

    def expected_rings(self) -> Ring:
        """The ring as the reference leaves it after a step."""
        ring = Ring(*(part.clone() for part in self.recorder.ring.parts))
        step = Step(self.positions, self.rows, self.recorder.pages)
        reference_record.record(ring, step, list(self.queries))
        return ring

    def require_recorded(self, expected: Ring, what: str) -> None:
        """Raise where the ring is not ``expected``, the entry that nobody reads left out."""
        for ours, theirs in zip(self.recorder.ring.parts, expected.parts, strict=True):
            same = torch.equal(ours[:, :-1].view(torch.uint8), theirs[:, :-1].view(torch.uint8))
            require(same, what)

    def score(self, rule: AttentionRule = RULE) -> None:
        for launch in attention_scores(
            self.tables,
            range(self.model.layers),
            self.slots,
            self.voters,
            rule=rule,
            scratch=self.scratch,
            out=self.scores,
        ):
            launch()

    def weights(self) -> None:
        layers = range(self.model.layers)
        weight_scores(self.tables, layers, self.slots, rule=KEYS.rule, out=self.scores)()

    def select(self) -> None:
        select(self.scores, self.settings.kept, CHUNKS, self.kept, neighbours=RULE.neighbours)()

    def compact(self) -> None:
        for launch in compact(self.tables, self.slots, self.kept):
            launch()

    def mix(self) -> None:
        """Give all slots other tokens: compacted windows become alike, and then nothing has to move."""
        for buffer in (*self.pool.keys, *self.pool.values):
            buffer.copy_(buffer[torch.randperm(len(buffer), device=DEVICE)])

    def kernels(self) -> TritonKernels:
        """The server's kernels, with the scratch that it would reserve."""
        settings = self.settings
        kernels = TritonKernels()
        kernels.reserve(
            DEVICE,
            WindowShape(
                num_layers=self.model.layers,
                num_kv_heads=self.model.kv_heads,
                head_dim=self.model.head_dim,
                dtype=self.tables.dot,
                width=settings.window,
                kept=settings.window,
                voices=self.voices,
                query_count=settings.window + settings.delay,
            ),
        )
        return kernels

    def pages(self, job: int) -> tuple[tuple[int, ...], ...]:
        """Where a window's queries lie."""
        count = self.settings.window + self.settings.delay
        return self.recorder.pages_of(self.owners[job], self.starts[job], count)

    def jobs(self, selector: Selector = KARA) -> list[WindowJob]:
        return [
            WindowJob(
                slots=self.slots[job],
                kept=self.settings.kept,
                selector=selector,
                seed=0,
                query_start=self.starts[job],
                query_count=self.settings.window + self.settings.delay,
                pages=self.pages(job) if selector.needs_queries else None,
            )
            for job in range(self.num_jobs)
        ]


def check(case: Case) -> dict[str, Any]:
    """Every kernel against the reference; raises where they differ.

    Returns
    -------
    dict
        ``score_error``: largest relative difference of a score; ``turned_score_error``: the same with
        queries that are moved ahead, for which keys are rounded to float16. ``weight_error``: the same
        without queries. ``same_choice``: share of positions that a whole pass and the reference's agree
        on; near ties may fall either way.
    """
    pool, settings = case.pool, case.settings
    expected = case.expected_rings()
    case.record()
    case.require_recorded(expected, "record")

    weight_error = error_of_weights(case)
    require(weight_error < 1e-3, f"weights: relative error {weight_error}")
    error = score_error(case, dataclasses.replace(RULE, ahead=False))
    require(error < 1e-3, f"score: relative error {error}")
    turned_error = score_error(case, RULE)
    require(turned_error < 5e-3, f"score with turned keys: relative error {turned_error}")

    # Before anything has moved: a compacted window holds tokens twice, and equal scores are a toss-up.
    widened = copied(pool, torch.float32)
    theirs = torch.stack(TorchKernels().compress(widened, case.jobs(), positions=True) or [])
    ours = torch.stack(case.kernels().compress(copied(pool), case.jobs(), positions=True) or [])
    same = (ours[..., None] == theirs[..., None, :]).any(-1).float().mean().item()
    require(same > 0.99, f"a pass: {same:.4f} of the positions agree")

    case.kept.fill_(-1)
    raw = case.scores.flatten(0, 1).clone()
    case.select()  # which leaves the blended scores
    blended = torch.stack([blend_neighbours(of_heads, RULE.neighbours) for of_heads in raw])
    blend_error = relative(case.scores, blended.view_as(case.scores))
    require(blend_error < 1e-4, f"blended scores: relative error {blend_error}")
    chosen = reference_select(case.scores, settings.kept, CHUNKS)
    require(torch.equal(case.kept.long(), chosen), "select")

    copies = [buffer.clone() for buffer in (*pool.keys, *pool.values)]
    case.compact()
    for index, (ours, theirs) in enumerate(zip((*pool.keys, *pool.values), copies, strict=True)):
        for job in range(case.num_jobs):
            kept = case.kept[index % case.model.layers, job].long()
            # As bytes, because torch indexes no 8-bit floats on every device.
            reference_compact(theirs.view(torch.uint8), case.slots[job], kept)
        require(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), "compact")

    check_replay(case)
    return {
        "weight_error": weight_error,
        "score_error": error,
        "turned_score_error": turned_error,
        "same_choice": same,
    }


def error_of_weights(case: Case) -> float:
    """Largest relative difference of a score without queries, before neighbours are blended."""
    case.scores.fill_(float("nan"))
    case.weights()
    expected = torch.empty_like(case.scores)
    rule = dataclasses.replace(KEYS.rule, neighbours=1)
    for layer, (keys, values) in enumerate(zip(case.pool.keys, case.pool.values, strict=True)):
        for job, slots in enumerate(case.slots.long()):
            expected[layer, job] = reference_weights(keys.float()[slots], values.float()[slots], rule)
    return relative(case.scores, expected)


def score_error(case: Case, rule: AttentionRule) -> float:
    """Largest relative difference of a score by ``rule``, before neighbours are blended;
    ``case.scores`` then holds the scores."""
    case.scores.fill_(float("nan"))
    case.score(rule)
    return relative(case.scores, expected_scores(case, rule))


def expected_scores(case: Case, rule: AttentionRule) -> torch.Tensor:
    """The float32 reference of ``case.scores`` by ``rule``, before neighbours are blended."""
    expected = torch.empty_like(case.scores)
    pool = case.pool
    for layer, ring in enumerate(pool.rings):
        for job, slots in enumerate(case.slots.long()):
            start, count = case.starts[job], case.voters.count
            pages = case.recorder.pages_of(case.owners[job], start, count)
            queries = reference_record.recorded(ring, start, count, pages)
            if rule.ahead:
                assert pool.rope_shift is not None
                queries = pool.rope_shift.moved(queries, layer)
            expected[layer, job] = reference_scores(
                queries,
                pool.keys[layer].float()[slots],
                pool.values[layer].float()[slots],
                scale=pool.scales[layer],
                rule=dataclasses.replace(rule, neighbours=1),
            )
    return expected


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest relative difference; NaN where there is one."""
    return ((ours - theirs).abs() / theirs).max().item()


def stress_compact(case: Case, moves: int) -> None:
    """``moves`` compactions of windows in which loads and stores overlap most, each compared with the
    reference byte by byte. What is kept is the window's tokens 1 to R, so that all rows between are the
    source of one and the target of the next, also where blocks meet.

    Raises
    ------
    AssertionError
        Where one byte differs.
    """
    buffers = (*case.pool.keys, *case.pool.values)
    layers, kept = case.model.layers, case.settings.kept
    case.kept.copy_(torch.arange(1, kept + 1, device=DEVICE))
    for move in range(moves):
        expected = [buffer.clone() for buffer in buffers]
        case.compact()
        for index, (ours, theirs) in enumerate(zip(buffers, expected, strict=True)):
            for job in range(case.num_jobs):
                reference_compact(theirs, case.slots[job], case.kept[index % layers, job].long())
            require(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), f"move {move}")
        case.mix()


def check_replay(case: Case) -> None:
    """A captured recording step follows its inputs when they are refreshed by copy, as SGLang's do, and
    its queries lie in memory of the graph."""
    replay = captured(case.record_in_a_model)
    case.queries.copy_(torch.randn_like(case.queries) * 1000)
    order = torch.randperm(BATCH, device=DEVICE)
    case.rows.copy_(case.rows[order])
    case.positions.copy_(case.positions[order])
    expected = case.expected_rings()
    replay()
    case.require_recorded(expected, "record in a replayed graph")


def copied(pool: LayerPool, dtype: torch.dtype | None = None) -> LayerPool:
    """A pool of its own with the same ring, K and V as ``dtype``."""
    keys, values = (
        [buffer.to(dtype or buffer.dtype, copy=True) for buffer in side]
        for side in (pool.keys, pool.values)
    )
    return dataclasses.replace(pool, keys=keys, values=values)


def require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(f"wrong result: {what}")


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


def goals(gpu: Gpu, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was aimed at beside what was measured by :func:`measure`."""
    found = {
        "compact, share of the measured copy bandwidth": (
            0.8,
            results["compact"]["bytes_per_s"] / gpu.bandwidth,
        ),
        "score, share of its floor": (0.5, results["score"]["of_floor"]),
        "pass, share of decode at batch 64, at most": (0.01, results["pass"]["share_of_decode_floor"]),
    }
    return {
        name: {"goal": goal, "got": got, "met": got <= goal if "at most" in name else got >= goal}
        for name, (goal, got) in found.items()
    }


def measure(case: Case, gpu: Gpu) -> dict[str, Any]:
    """Time of each kernel over all layers and windows, beside its floor."""
    results: dict[str, Any] = {}
    moving = (case.kept != torch.arange(case.settings.kept, device=DEVICE)).float().mean().item()
    for name in ("record", "weights", "score", "select", "compact"):
        work: Work = getattr(floors, name)(case.model, case.settings) * case.num_jobs
        before = Work()
        if name == "score":
            before = floors.prepare(case.model, case.settings) * case.num_jobs
        if name == "compact":  # rows that stay are not touched
            case.score()  # the replays of select have blended its scores again and again
            case.select()
            work = dataclasses.replace(work, bytes=round(work.bytes * moving))
        took = seconds(getattr(case, name))
        floor = gpu.floor(before) + gpu.floor(work)
        results[name] = {
            "us": took * 1e6,
            "floor_us": floor * 1e6,
            "of_floor": floor / took,
            "bytes_per_s": work.bytes / took,
            "flop_per_s": work.flops / took,
        }
        print(f"  {name:8} {took * 1e6:9.1f} us, floor {floor * 1e6:9.1f} us, {floor / took:6.1%}")
    kernels = case.kernels()
    step = gpu.floor(floors.decode_step(case.model, 64, 4096))
    steps = case.settings.window - case.settings.kept
    for name, selector in (("pass", KARA), ("pass without queries", KEYS)):
        jobs = case.jobs(selector)
        found: dict[str, Any] = {}
        for prefix, some in (("one_window_", jobs[:1]), ("", jobs)):
            call = functools.partial(kernels.compress, case.pool, some)
            found[f"{prefix}us"] = timed(call, before=case.mix) * 1e6
            case.mix()
            found[f"{prefix}launches_us"] = launch_times(call, repeats=1)
            for kernel, took_us in list(found[f"{prefix}launches_us"].items())[:8]:
                print(f"    {kernel[:40]:40} {took_us:9.1f} us of a {name} over {len(some)}")
        share = found["us"] / 1e6 / case.num_jobs * 64 / (steps * step)
        results[name] = {**found, "share_of_decode_floor": share}
        print(
            f"  {name}, launched from the host: {found['us']:.1f} us, {share:.2%} of decode's floor; "
            f"over one window {found['one_window_us']:.1f} us"
        )
    return results


def main() -> None:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=[model.name for model in MODELS],
        default=[model.name for model in MODELS],
        help="default: all",
    )
    parser.add_argument(
        "--windows",
        type=command_line.whole(),
        nargs="+",
        default=[512, 1024],
        help="sizes in tokens; default: 512 1024",
    )
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=RING_DTYPES, default=[8, 4], help="of recorded numbers"
    )
    parser.add_argument("--jobs", type=int, default=8, help="windows in one pass")
    parser.add_argument("--moves", type=int, default=2000, help="of the stress test of compact")
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels.py: no CUDA GPU here, nothing was measured")

    torch.seed()  # fresh data in every run
    gpu = measured_ceilings()
    print(
        f"{gpu.name}: copies {gpu.bandwidth / 1e12:.2f} TB/s, bf16 {gpu.flop_rate / 1e12:.0f} TFLOP/s"
    )
    report: dict[str, Any] = {
        "gpu": dataclasses.asdict(gpu),
        "datasheet": [dataclasses.asdict(known) for known in DATASHEET],
        "versions": versions(),
        "seed": torch.initial_seed(),
        "checks": [],
        "runs": [],
    }
    stress_compact(Case(MODELS[0], Settings(), 8, layers=2), arguments.moves)
    print(f"compact: {arguments.moves} moves by one row, none wrong")
    report["checks"].append({"case": "compact", "moves": arguments.moves})
    write_json(arguments.output, report, indent=2)
    for model, key_dtype, query_bits in OTHER_CASES:
        settings = Settings(window=176, kept=80, delay=29, query_bits=query_bits)
        checks = check(Case(model, settings, 3, layers=2, key_dtype=key_dtype))
        name = f"{model.name}, {key_dtype}, queries of {query_bits} bits"
        print(f"{name}: correct: {checks}")
        report["checks"].append({"case": name, **checks})
        write_json(arguments.output, report, indent=2)
    for model in (model for model in MODELS if model.name in arguments.models):
        for window, bits, mean in itertools.product(arguments.windows, arguments.bits, (False, True)):
            settings = Settings(window=window, kept=window // 2, mean=mean, query_bits=bits)
            print(f"{model.name}, W {window}, {'mean' if mean else 'all'} heads, {bits} bits")
            # As many layers as make a whole launch that records, and one of another size.
            checks = check(Case(model, settings, min(arguments.jobs, 2), layers=10))
            print(f"  correct: {checks}")
            case = Case(model, settings, arguments.jobs, layers=model.layers)
            case.score()
            case.select()
            measured = measure(case, gpu)
            report["runs"].append(
                {
                    "model": model.name,
                    "settings": dataclasses.asdict(settings),
                    "jobs": arguments.jobs,
                    "checks": checks,
                    "kernels": measured,
                    "goals": goals(gpu, measured),
                }
            )
            write_json(
                arguments.output, report, indent=2
            )  # what is done stays, should the next case crash
            del case
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
