"""What compression does not support, as far as only the real objects can tell.

Said in one line each; a scheduler hands them to the launcher, which then does not serve. What flags and
the model's config decide is ``launcher/refusals.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kara_sglang.compat import kv_cache
from kara_sglang.compat.sliding_window import reach
from kara_sglang.radix_integration.compressed import CompressedRadixCache
from kara_sglang.scheduler import window_pool

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

    from kara_sglang.config import KaraConfig

STORAGE = (
    "a HiCache storage backend does not work with --kv-compress; serve without one, or without "
    "--kv-compress"
)
"""Answer to a request that would attach one to a running server."""


def of_attention_layers(layers: list[Any]) -> list[str]:
    """Refusals that the model's ``RadixAttention`` layers decide, one line each."""
    lines = []
    if not layers:
        lines.append("the model has no RadixAttention layer")
    elif all(reach(layer) for layer in layers):
        lines.append("the model has sliding-window attention layers only")
    if any(layer.is_cross_attention for layer in layers):
        lines.append("the model has cross-attention layers")
    if any(layer.attn_type.value.startswith("encoder") for layer in layers):
        lines.append("the model has encoder attention layers")
    shapes = {
        (layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim, layer.v_head_dim)
        for layer in layers
    }
    if len(shapes) > 1 or any(qk != v for _, _, qk, v in shapes):
        lines.append(f"the model's attention layers differ in shape: {sorted(shapes)}")
    if [layer.layer_id for layer in layers] != list(range(len(layers))):
        lines.append("the model's attention layers are not numbered 0, 1, 2, ...")
    return [f"{line}, which --kv-compress does not support" for line in lines]


def of_drafts(pools: list[Any]) -> list[str]:
    """Refusals that the KV pools of draft models decide, one line each."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    return [
        f"the draft model's KV pool is a {type(pool).__name__}, --kv-compress supports "
        "MHATokenToKVPool; use another draft model, or serve without --kv-compress"
        for pool in pools
        if type(pool) is not MHATokenToKVPool
    ]


def of_scheduler(scheduler: Scheduler, config: KaraConfig, layers: list[int]) -> list[str]:
    """Refusals that the real pool, allocator and host tier decide, one line each; ``layers`` are the
    numbers of those that a pass works over.

    HiCache is safe because a pass writes only slots that one request owns, and a copy to the host reads
    only slots that the tree owns, compressed or not (``mem_cache/unified_radix_cache.py``): those of a
    row whose last result has been read, so that all its passes are done. A load may take slots that a
    pass has freed, but it waits for the forward stream, on which the pass runs (``load_fence_stream``:
    ``managers/cache_controller.py``, set by ``managers/scheduler.py``).
    """
    from sglang.srt.disaggregation.decode import DecodeReqToTokenPool
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    allocator = scheduler.token_to_kv_pool_allocator
    pools = allocator.get_kvcache()
    pool = window_pool.full_pool(pools)
    both = (SWATokenToKVPoolAllocator,)
    one = (TokenToKVPoolAllocator, PagedTokenToKVPoolAllocator)
    expected = (
        ("KV pool", pools, (MHATokenToKVPool, SWAKVPool)),
        ("KV pool", pool, (MHATokenToKVPool,)),
        ("KV allocator", allocator, one if pool is pools else both),
        ("request pool", scheduler.req_to_token_pool, (ReqToTokenPool, DecodeReqToTokenPool)),
    )
    lines = [
        f"SGLang chose the {what} {type(thing).__name__}, --kv-compress supports "
        + " and ".join(kind.__name__ for kind in kinds)
        for what, thing, kinds in expected
        if type(thing) not in kinds
    ]
    cache = type(scheduler.tree_cache)
    if config.shares_prefixes and cache is not CompressedRadixCache:
        lines.append(
            f"SGLang chose the prefix cache {cache.__name__}, which --kv-compress-prefix-reuse "
            f"{config.prefix_reuse} does not support"
        )
    if pool.dtype not in (torch.float32, torch.float16, *kv_cache.NAMED.values()):
        lines.append(
            f"the KV cache is kept in {pool.dtype}, --kv-compress supports 32 and 16 bits, and of 8 "
            "bits float8_e4m3fn and float8_e5m2"
        )
    controller = scheduler.tree_cache.cache_controller
    if controller is not None and controller.load_fence_stream is not scheduler.forward_stream:
        lines.append(
            "HiCache does not wait for the forward stream before it loads into freed slots in this "
            "SGLang, which --kv-compress needs; start without --enable-hierarchical-cache"
        )
    if torch.version.hip is not None:
        # SGLang orders page-table writes behind the step in flight on CUDA only.
        lines.append("--kv-compress does not support ROCm")
    if not lines and pool is not pools and not window_pool.is_known(pools, allocator, layers):
        lines.append("SGLang chose a pool of sliding-window layers that --kv-compress does not support")
    if not lines and (pool.k_buffer[0].dim() != 3 or pool.start_layer != 0):
        lines.append("SGLang chose a KV layout that --kv-compress does not support")
    if scheduler.max_total_num_tokens < config.window + config.delay:
        lines.append(
            f"the KV pool holds {scheduler.max_total_num_tokens} tokens, less than a window of "
            f"{config.window} (--kv-compress-window) and its delay of {config.delay}; use a smaller one"
        )
    return lines
