"""What compression takes beside a model's weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kara_sglang.config import KaraConfig
from kara_sglang.kernels.record import most_blocks
from kara_sglang.scheduler import policy
from kara_sglang.scheduler.pace import PLAIN, Pace
from kara_sglang.scheduler.reserved import largest_window, query_ring, shape_of

MODEL = SimpleNamespace(
    num_hidden_layers=36,
    num_attention_heads=32,
    head_dim=128,
    dtype=torch.bfloat16,
    get_total_num_kv_heads=lambda: 8,
)
"""Qwen3-8B, as far as SGLang's ``ModelConfig`` is read."""


def test_the_heads_are_the_models_and_nothing_is_allocated() -> None:
    shape = shape_of(MODEL)
    assert (shape.num_layers, shape.num_q_heads, shape.num_kv_heads, shape.head_dim) == (36, 32, 8, 128)
    assert (shape.group, shape.dtype, shape.device.type) == (4, torch.bfloat16, "meta")


@pytest.mark.parametrize("pace", [PLAIN, Pace(8, behind=8)])
@pytest.mark.parametrize("dtype", ["model", "fp8", "fp4"])
def test_the_ring_is_of_the_settings(dtype: str, pace: Pace) -> None:
    """Its numbers, what it records for a window, and by how many tokens a step goes on."""
    config = KaraConfig(window=256, delay=32, query_mem_gb=1, query_dtype=dtype, debug_checks=True)
    ring = query_ring(shape_of(MODEL), config, pace=pace)
    # Blocks of a row: a window, its delay, what a pass may lag behind, and what drafts reserve.
    longest = 256 + 32 + policy.lag(config) * pace.tokens + pace.reserve
    assert (ring.num_blocks, ring.pace) == (most_blocks(longest), pace)
    assert ring.demand.window == 256 and ring.check is not None
    entry = {"model": 256, "fp8": 128 + 1, "fp4": 64 + 4}[dtype]
    assert ring.page_bytes == 36 * 8 * entry * 64
    assert 2**30 - ring.page_bytes < ring.num_bytes <= 2**30


@pytest.mark.parametrize(
    ("selector", "voices"), [("kara", 4), ("snapkv", 4), ("keys", 0), ("recent", 0)]
)
def test_scratch_is_asked_for_the_largest_window(selector: str, voices: int) -> None:
    """Kept whole, whatever the share: a request may ask for that."""
    config = KaraConfig(selector=selector, window=256, delay=32, retain=0.25)
    largest = largest_window(shape_of(MODEL), config)
    assert (largest.width, largest.kept, largest.query_count) == (256, 256, 288)
    assert (largest.voices, largest.num_layers, largest.num_kv_heads) == (voices, 36, 8)
