"""Collecting a trace while a request runs."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kara_sglang.config import KaraConfig
from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.radix_integration.row import RequestState, TracedWindow, Window
from kara_sglang.scheduler.tracer import Tracer, bit_sets
from kara_sglang.trace import format as trace_format


@given(st.data())
def test_bit_sets(data: st.DataObject) -> None:
    """Each position is its bit and nothing else is, for widths that are no multiple of 8 as well."""
    width = data.draw(st.integers(1, 40))
    kept = data.draw(st.integers(1, width))
    order = st.permutations(range(width))
    rows = [[sorted(data.draw(order)[:kept]) for _ in range(2)] for _ in range(3)]
    packed = bit_sets(torch.tensor(rows), width)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, -(-width // 8))
    for layer in range(3):
        for head in range(2):
            whole = int.from_bytes(bytes(packed[layer, head].tolist()), "little")
            assert [j for j in range(width + 8) if whole >> j & 1] == rows[layer][head]


def test_a_tracer_knows_its_heads() -> None:
    """Ranks in order; more ranks than heads share one."""

    def heads(rank: int, ranks: int, total: int) -> list[int]:
        pool = SimpleNamespace(k_buffer=[torch.empty(4, max(1, total // ranks), 2)])
        scheduler = SimpleNamespace(
            server_args=SimpleNamespace(model_path="m", tokenizer_path="t"),
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
            attn_tp_group=SimpleNamespace(world_size=ranks, rank_in_group=rank),
            model_config=SimpleNamespace(get_total_num_kv_heads=lambda: total),
        )
        tracer = Tracer(scheduler, KaraConfig(trace="x"))
        assert (tracer.tp_rank, tracer.model, tracer.tokenizer) == (rank, "m", "t")
        return tracer.heads

    assert heads(0, 1, 3) == [0, 1, 2]
    assert [heads(rank, 2, 8) for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [heads(rank, 4, 2) for rank in range(4)] == [[0], [0], [1], [1]]


def test_a_full_disk_is_an_error_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The server goes on, and says which request has no file and where it should have been."""
    pool = SimpleNamespace(k_buffer=[torch.empty(4, 1, 2)])
    scheduler = SimpleNamespace(
        server_args=SimpleNamespace(model_path="m", tokenizer_path=None),
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        attn_tp_group=SimpleNamespace(world_size=1, rank_in_group=0),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: 1),
    )
    tracer = Tracer(scheduler, KaraConfig(trace=str(tmp_path / "gone")))
    state = RequestState(selector=REGISTRY["recent"](), kept=4, seed=0, base=4)
    traced = TracedWindow(Window(0, 0, 8, 4), torch.full((1, 1, 1), 0xF0).byte(), None)
    state.traced.append(traced)
    req = SimpleNamespace(
        rid="r",
        finished=lambda: True,
        finished_reason=SimpleNamespace(to_json=lambda: {"type": "stop"}),
        retraction_count=0,
        origin_input_ids=[1, 2],
        output_ids_through_stop=list(range(10)),
    )
    with caplog.at_level(logging.ERROR):
        tracer.end(req, state)
    [record] = caplog.records
    text = record.getMessage()
    assert "request r " in text and "--kv-compress-trace" in text and "No such file" in text
    (tmp_path / "gone").mkdir()
    assert state.traced == []
    state.traced.append(traced)
    tracer.end(req, state)
    assert trace_format.load(tmp_path / "gone" / trace_format.file_name("r")).keeps().tolist() == [
        [[[0] * 4 + [1] * 4]]
    ]
    # A session keeps the request and its state for as long as it is open.
    assert state.traced == []
