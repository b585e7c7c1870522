"""SGLang's KV pools for models whose sliding-window layers have one of their own, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool


def swa_pool(
    size: int,
    page_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    heads: int = 1,
    windowed: Sequence[int] = (0, 2),
    full: Sequence[int] = (1, 3),
) -> SWAKVPool:
    """Head dimension 8; layers with a window have half as many slots."""
    return SWAKVPool(
        size=size,
        size_swa=size // 2,
        page_size=page_size,
        dtype=dtype,
        head_num=heads,
        head_dim=8,
        swa_attention_layer_ids=list(windowed),
        full_attention_layer_ids=list(full),
        device="cpu",
    )


def swa_allocator(pool: SWAKVPool, page_size: int) -> SWATokenToKVPoolAllocator:
    size = pool.size
    return SWATokenToKVPoolAllocator(
        size, size // 2, page_size, torch.int64, "cpu", pool, need_sort=False
    )
