"""A plugin for SGLang that lets HiCache's host tier run on a CPU, and makes its copies slow.

SGLang copies between tiers with CUDA kernels. Here a copy to the host is made as late as SGLang
allows: just before SGLang hears that it is done. So KV that somebody overwrites while its copy is
under way reaches the host overwritten. A load is made at once, because the next step reads
what it loads, and SGLang hears of it late, so that the tree's nodes stay locked over many steps.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch

SECONDS = 0.05
"""From a copy's start until SGLang hears that it is done."""


class Late:
    """Stands in for the event at the end of a copy."""

    def __init__(self, copy: Callable[[], Any] | None = None) -> None:
        self.copy, self.end = copy, time.monotonic() + SECONDS

    def query(self) -> bool:
        if time.monotonic() < self.end:
            return False
        self.synchronize()
        return True

    def synchronize(self) -> None:
        copy, self.copy = self.copy, None
        if copy is not None:
            copy()


def load() -> None:
    """What SGLang calls in each process."""
    from sglang.srt.mem_cache.pool_host import base, common, mha
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0  # 10 GiB that must stay free
    common._cuda_host_register = lambda *args, **kwargs: None  # memory that a GPU can read
    for copy in (
        transfer_kv_direct,
        transfer_kv_all_layer,
        transfer_kv_per_layer,
        transfer_kv_all_layer_lf_pf,
        transfer_kv_per_layer_pf_lf,
    ):
        setattr(mha, copy.__name__, copy)
    engine = "sglang.srt.mem_cache.l2_transfer.L2TransferEngine"
    for target, handler, kind in (
        (f"{engine}.submit_device_to_host", late_copy, HookType.AROUND),
        (f"{engine}.submit_host_to_device", late_word, HookType.AFTER),
        ("sglang.srt.managers.scheduler.Scheduler.flush_cache", look_for_leaks, HookType.BEFORE),
    ):
        HookRegistry.register(target, handler, kind)


def late_copy(submit: Callable, engine: Any, transfers: list) -> Any:
    from sglang.srt.mem_cache.l2_transfer import TransferCompletion

    return TransferCompletion(None, Late(lambda: submit(engine, transfers)), False)


def late_word(completion: Any, *_args: Any, **_kwargs: Any) -> Any:
    return completion._replace(finish_event=Late(), timing_enabled=False)


def look_for_leaks(scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """An idle server can give all of both tiers back; who cannot, stops here."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    if not scheduler.is_fully_idle():
        return
    tree, device = scheduler.tree_cache, scheduler.token_to_kv_pool_allocator
    host = tree.cache_controller.mem_pool_host
    tree.writing_check(write_back=True)
    while tree.cache_controller.ack_load_queue:
        tree.loading_check()
    tree.evict(EvictParams(num_tokens=scheduler.max_total_num_tokens))
    tree.evict_host(host.logical_size)
    free = device.available_size(), host.available_size()
    total = scheduler.max_total_num_tokens, host.logical_size
    assert free == total, f"{free} of {total} slots on device and host are free"


# -- copies, as sgl_kernel.kvcacheio names and calls them --------------------------------------------


def transfer_kv_direct(
    src_layers: list[torch.Tensor],
    dst_layers: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_per_layer(
    src_k: torch.Tensor,
    dst_k: torch.Tensor,
    src_v: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
) -> None:
    transfer_kv_direct([src_k, src_v], [dst_k, dst_v], src_indices, dst_indices, 1)


def transfer_kv_per_layer_pf_lf(
    src_k: torch.Tensor,
    dst_k: torch.Tensor,
    src_v: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
) -> None:
    of_layer = [src_k[:, layer_id], src_v[:, layer_id]]
    transfer_kv_direct(of_layer, [dst_k, dst_v], src_indices, dst_indices, 1)


def transfer_kv_all_layer(
    src_k_layers: torch.Tensor,
    dst_k_layers: torch.Tensor,
    src_v_layers: torch.Tensor,
    dst_v_layers: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    num_layers: int,
) -> None:
    for sources, targets in ((src_k_layers, dst_k_layers), (src_v_layers, dst_v_layers)):
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            _move(source, target, src_indices, dst_indices, item_size, item_size)


def transfer_kv_all_layer_lf_pf(
    src_k_layers: torch.Tensor,
    dst_k: torch.Tensor,
    src_v_layers: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    for sources, target in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer, source in enumerate(sources.tolist()):
            first = target.data_ptr() + layer * item_size
            _move(source, first, src_indices, dst_indices, item_size, dst_layout_dim)


def _move(
    source: int, target: int, src: torch.Tensor, dst: torch.Tensor, size: int, stride: int
) -> None:
    """Copy tokens between addresses; those of the target lie ``stride`` bytes apart."""
    for i, j in zip(src.tolist(), dst.tolist(), strict=True):
        ctypes.memmove(target + j * stride, source + i * size, size)
