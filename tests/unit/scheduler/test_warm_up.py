"""After the warm-up no request can make a decode step or a pass wait for the compiler.

Launches are noted instead of made; what Triton would compile for them is their key (types, constants,
divisibility, options).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kara_sglang.benchmarks.gpu.compiled import KERNELS, caught
from kara_sglang.config import KaraConfig
from kara_sglang.kernels import selectors
from kara_sglang.kernels.backend import WindowJob, WindowShape
from kara_sglang.kernels.record import any_pages
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.triton import TritonKernels
from kara_sglang.scheduler.compaction import Compaction
from kara_sglang.scheduler.coordinator import Coordinator
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder

LAYERS, HEADS, GROUP, DIM, PAGE = 3, 2, 3, 64, 16
CPU = torch.device("cpu")


def coordinator_of(config: KaraConfig) -> Coordinator:
    """The real one, over as much of a scheduler as it looks at."""
    width = config.window
    buffers = [torch.zeros(2 * width, HEADS, DIM, dtype=torch.bfloat16) for _ in range(2 * LAYERS)]
    pool = SimpleNamespace(k_buffer=buffers[:LAYERS], v_buffer=buffers[LAYERS:], dtype=buffers[0].dtype)
    scheduler = SimpleNamespace(
        page_size=PAGE,
        metrics_collector_context=SimpleNamespace(current_scheduler_metrics_enabled=False),
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        enable_overlap=False,
        tp_worker=SimpleNamespace(get_decode_cuda_graph_bs=lambda: []),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(4, 8, dtype=torch.int32)),
    )
    kernels = TritonKernels()
    shape = WindowShape(LAYERS, HEADS, DIM, torch.bfloat16, width, width, GROUP, width + config.delay)
    kernels.reserve(CPU, shape)
    shape = AttentionShape(LAYERS, HEADS * GROUP, HEADS, DIM, torch.bfloat16, CPU)
    budget, dtype = 4 << 20 if config.keeps_queries else 0, config.ring_dtype(torch.bfloat16)
    recorder = QueryRecorder(shape, width, config.delay, budget, dtype)
    recorder.allocate_tables(8)
    still = RopeShift.of_layer(torch.ones(DIM // 2), torch.zeros(DIM // 2), DIM, halves=True)
    turn = RopeShift.of([still] * LAYERS)
    scales = [0.125] * LAYERS
    return Coordinator(config, Compaction(scheduler, config, recorder, kernels, lambda: scales, turn))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"query_dtype": "model", "score": "sum", "neighbours": 1, "chunk_budget": 0.0},
        {"query_dtype": "fp4"},
        {"selector": "recent"},
    ],
    ids=str,
)
def test_no_request_needs_a_compiler(settings):
    config = KaraConfig(window=128, delay=16, **settings)
    coordinator = coordinator_of(config)
    recorder, kernels = coordinator.recorder, coordinator.kernels
    with caught() as launches:
        coordinator.warm_up()
    warm = {launch.key for launch in launches}
    names = {launch.kernel.__name__ for launch in launches}
    if not recorder.num_pages:
        assert names == {"prepare_kernel", "select_kernel", "compact_kernel"}
    else:
        assert names == set(KERNELS)

    jobs = [
        WindowJob(
            slots=torch.arange(128, dtype=torch.int32),
            kept=kept,
            selector=selector,
            seed=kept,
            query_start=1000 + kept,
            query_count=128 + 16,
            pages=any_pages(1000 + kept, 128 + 16, voices),
        )
        for selector in (selectors.build(name, config) for name in selectors.REGISTRY)
        for kept in (1, 3, 16, 48, 112, 128)  # with a page of 1 a request may ask for any R
        for voices in ((1, GROUP) if selector.needs_queries else (0,))
        if recorder.num_pages or not selector.needs_queries
    ]
    with caught() as launches:
        kernels.compress(coordinator.compaction._pool(), jobs)
        for job in jobs:
            kernels.compress(coordinator.compaction._pool(), [job] * 17)
        for batch in (1, 2, 17, 64) if recorder.num_pages else ():
            rows = torch.zeros(batch, dtype=torch.int64)
            queries = torch.zeros(batch, HEADS * GROUP * DIM, dtype=torch.bfloat16)
            for layer in range(LAYERS):
                recorder.record(kernels, layer, queries, rows, rows)
    assert len(launches) > 2 * len(jobs)
    assert {launch.key for launch in launches} - warm == set()


def test_kernels_see_when_buffers_are_made_anew():
    """A pool is one object, so that a pass need not look at its buffers, until SGLang has others."""
    coordinator = coordinator_of(KaraConfig(window=128, delay=16))
    buffers = coordinator.scheduler.token_to_kv_pool_allocator.get_kvcache()
    known = coordinator.compaction._pool()
    assert coordinator.compaction._pool() is known
    buffers.v_buffer = [buffer.clone() for buffer in buffers.v_buffer]
    other = coordinator.compaction._pool()
    assert other is not known and other.values[0].data_ptr() == buffers.v_buffer[0].data_ptr()
    with caught():
        coordinator.warm_up()
    assert coordinator.kernels._tables.pool is other
