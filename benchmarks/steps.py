"""Host time of the plugin's part of a decode step in which nothing is due, by running requests.

    python -m kara_sglang.benchmarks.steps --out steps.json

SGLang is replaced by the few fields that the coordinator reads, so this is the plugin's own Python and
no more. Windows are long enough that none is compressed in the steps that are timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import origin
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.output import write_json
from kara_sglang.config import KaraConfig
from kara_sglang.kernels.backend import TorchKernels
from kara_sglang.kernels.record import FP8
from kara_sglang.scheduler.compaction import Compaction
from kara_sglang.scheduler.coordinator import Coordinator
from kara_sglang.scheduler.policy import lag
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder

PROMPT = 1000
WARM_UP = 10
"""Steps that are not timed: the first ones make states and hand out recorders."""

CASES: dict[str, tuple[dict[str, Any], float]] = {
    "all record": ({}, 1),
    "a quarter records": ({}, 0.25),
    "pressure, all record": ({"policy": "pressure"}, 1),
    "no queries": ({"selector": "keys", "query_mem_gb": 0}, 0),
}
"""Settings, and the share of the requests that the query ring has room for."""


def running(number: int, settings: dict[str, Any], recorded: float) -> tuple[Coordinator, Any]:
    """A coordinator, and a batch of so many requests with their prompts computed."""
    usual: dict[str, Any] = {"query_mem_gb": 1, "policy": "periodic"}
    config = KaraConfig(query_heads="mean", **(usual | settings))
    rows = SimpleNamespace(
        req_to_token=torch.zeros((number + 1, 1), dtype=torch.int32),
        req_generation=torch.zeros(number + 1, dtype=torch.int64),
    )
    scheduler = SimpleNamespace(
        page_size=16,
        metrics_collector_context=SimpleNamespace(current_scheduler_metrics_enabled=False),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 10**9),
        tree_cache=SimpleNamespace(evictable_size=lambda: 0),
        tp_worker=SimpleNamespace(get_decode_cuda_graph_bs=lambda: []),
        req_to_token_pool=rows,
        enable_overlap=False,
        tp_size=1,
        max_total_num_tokens=10**9,
        waiting_queue=[],
        new_token_ratio_tracker=SimpleNamespace(current=0.5),
        get_num_allocatable_reqs=lambda *_args, **_kwargs: 0,
    )
    shape = AttentionShape(1, 4, 1, 8, torch.float32, torch.device("cpu"))
    unit = 9 * (config.window + config.delay + lag(config))
    budget = int(number * recorded) * unit if config.keeps_queries else 0
    recorder = QueryRecorder(shape, config.window, config.delay, budget, FP8, lag=lag(config))
    recorder.allocate_tables(number + 1)
    compaction = Compaction(scheduler, config, recorder, TorchKernels(), lambda: [1.0], None)
    coordinator = Coordinator(config, compaction)
    requests = [_request(row) for row in range(1, number + 1)]
    lengths = torch.full((number,), PROMPT)
    batch = SimpleNamespace(reqs=requests, seq_lens=lengths, seq_lens_cpu=lengths, batch_is_full=False)
    scheduler.running_batch = batch
    return coordinator, batch


def _request(row: int) -> SimpleNamespace:
    kv = SimpleNamespace(
        req_pool_idx=row,
        cache_protected_len=PROMPT,
        kv_committed_len=PROMPT,
        kv_allocated_len=PROMPT,
        holds_kv=True,
    )
    params = SimpleNamespace(max_new_tokens=8192, ignore_eos=True, custom_params=None)
    return SimpleNamespace(
        rid=str(row),
        kv=kv,
        sampling_params=params,
        origin_input_ids=list(range(PROMPT)),
        output_ids=[],
        beam_group=None,
        multimodal_inputs=None,
    )


def microseconds(number: int, settings: dict[str, Any], recorded: float, steps: int) -> float:
    """Median over ``steps`` decode steps of as many running requests."""
    coordinator, batch = running(number, settings, recorded)
    taken = []
    for _ in range(steps + WARM_UP):
        started = time.perf_counter()
        coordinator.before_decode(batch)
        taken.append(time.perf_counter() - started)
        for req in batch.reqs:
            req.kv.kv_committed_len += 1
            req.output_ids.append(1)
    assert not coordinator.totals.windows
    return statistics.median(taken[WARM_UP:]) * 1e6


def main(argv: list[str] | None = None) -> int:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--requests",
        type=command_line.whole(),
        nargs="+",
        default=[64, 256, 1024],
        help="that run at once; default: 64 256 1024",
    )
    parser.add_argument(
        "--steps",
        type=command_line.whole(most=KaraConfig().window - WARM_UP),
        default=300,
        help="that are timed, fewer than a window; default: %(default)s",
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, (settings, recorded) in CASES.items():
        times = [microseconds(n, settings, recorded, options.steps) for n in options.requests]
        rows.append({"case": name, "requests": options.requests, "us": times})
        print(f"{name}: done", file=sys.stderr)
    shown_rows = ([row["case"], *(f"{value:.1f}" for value in row["us"])] for row in rows)
    print(grid(["us per step", *map(str, options.requests)], shown_rows), end="")
    if options.out:
        about = origin("kara_sglang.benchmarks.steps", argv or sys.argv[1:])
        write_json(options.out, about | {"rows": rows}, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
