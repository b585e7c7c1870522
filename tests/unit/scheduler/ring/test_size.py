"""The size of a query ring that no setting says: as needed, and bounded."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kara_sglang.config import KaraConfig
from kara_sglang.scheduler.reserved import query_ring
from kara_sglang.scheduler.ring.recorder import AttentionShape, cheapest
from kara_sglang.scheduler.ring.size import FIXED, SHARE, Room, ring_size

SHAPE = AttentionShape(36, 32, 8, 128, torch.bfloat16, torch.device("meta"))  # Qwen3-8B
SLOT = 36 * 8 * 256 * 2


def test_a_set_size_is_taken_as_it_is() -> None:
    recorder = query_ring(SHAPE, KaraConfig(query_mem_gb=1.5), Room(10**9, SLOT))
    assert recorder.why == "as set"
    assert 1.5 * 2**30 - recorder.page_bytes < recorder.num_bytes <= 1.5 * 2**30


def test_without_a_figure_of_memory_it_is_fixed() -> None:
    recorder = query_ring(SHAPE, KaraConfig(), Room())
    assert FIXED - recorder.page_bytes < recorder.num_bytes <= FIXED and "fixed" in recorder.why


def test_a_large_pool_gives_its_share() -> None:
    recorder = query_ring(SHAPE, KaraConfig(), Room(50 << 30, SLOT))
    assert recorder.why == "1/16 of the memory for KV"
    assert 0 <= (50 << 30) / 16 - recorder.num_bytes < recorder.page_bytes


@pytest.mark.parametrize(("heads", "wanted"), [("auto", 4), ("all", 4), ("mean", 1)])
@pytest.mark.parametrize("limit", [{"most_running": 8}, {"most_slots": 8 * 576 + 575}])
def test_few_requests_get_all_that_they_can_use(heads: str, wanted: int, limit: dict[str, int]) -> None:
    recorder = query_ring(SHAPE, KaraConfig(query_heads=heads), Room(50 << 30, SLOT, **limit))
    assert recorder.why == "what 8 requests need" and recorder.room(wanted) == 8


@given(
    free=st.integers(0, 200 << 30),
    running=st.none() | st.integers(1, 500),
    slots=st.none() | st.integers(1, 10**6),
    heads=st.sampled_from(["auto", "all", "mean"]),
    dtype=st.sampled_from(["fp4", "fp8", "model"]),
)
def test_it_is_bounded_and_serves_somebody(free, running, slots, heads, dtype) -> None:
    config = KaraConfig(query_heads=heads, query_dtype=dtype)
    recorder = query_ring(SHAPE, config, Room(free, SLOT, slots, running))
    least = cheapest(SHAPE.group, heads)
    assert recorder.room(least) >= 1
    assert recorder.num_bytes <= max(SHARE * free, recorder.most_bytes(least))
    most = 1 if heads == "mean" else SHAPE.group
    if running is not None:
        assert recorder.room(most) <= max(running, least)


def test_no_more_is_taken_than_requests_fit_beside_it() -> None:
    """Where a query takes next to nothing beside K and V the need is below the bound."""
    size = ring_size(KaraConfig(), of_request=1000, least=1000, room=Room(10**9, slot_bytes=10**4))
    assert size.bytes == 10**9 // (576 * 10**4 + 1000) * 1000 and size.bytes < SHARE * 10**9


def test_a_server_without_queries_has_no_ring() -> None:
    """Nor a say in how they would be stored: fp4 takes head dimensions that are multiples of 8."""
    odd = dataclasses.replace(SHAPE, head_dim=130)
    recorder = query_ring(odd, KaraConfig(selector="keys", query_dtype="fp4"), Room(50 << 30, SLOT))
    assert (recorder.num_pages, recorder.num_bytes, recorder.sizes) == (0, 0, ())
    with pytest.raises(ValueError, match="multiple of 8"):
        query_ring(odd, KaraConfig(query_dtype="fp4"), Room(50 << 30, SLOT))
