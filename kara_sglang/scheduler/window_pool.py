"""Sliding-window layers whose K and V are in a pool of their own: gpt-oss and other models that SGLang
treats as hybrid (``configs/model_config.py``, ``is_hybrid_swa_model``).

A row of ``req_to_token`` names slots of the layers that see all tokens. Each of these has a partner in
the window layers' pool (``full_to_swa_index_mapping``) until SGLang gives that back, once the token has
left the window: those of a row below a cursor that is kept with the request, in KV indices
(``ReqKvInfo.component_evicted_seqlens``).

A pass moves nothing in the window layers' pool: what it frees has left the window
(``compat/sliding_window.py``). The slots that it cuts out of a row go back with the partners that they
still have, and the cursor comes down by those that had none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kara_sglang.compat import sliding_window

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from sglang.srt.managers.schedule_batch import ReqKvInfo
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool


def is_used(scheduler: Scheduler) -> bool:
    """Whether the scheduler's model has such layers."""
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator

    return isinstance(scheduler.token_to_kv_pool_allocator, SWATokenToKVPoolAllocator)


def full_pool(pool: Any) -> Any:
    """The pool of the layers that see all tokens: ``pool`` itself, or a part of SGLang's
    ``SWAKVPool``, in which they are numbered anew."""
    return getattr(pool, "full_kv_pool", pool)


def share(resolved: Any, model: Any) -> float:
    """Slots of the window layers for each slot of the others, as ``HybridSWAPoolConfigurator`` sizes
    their pools (``model_executor/pool_configurator.py``); 1 where all are in one pool.

    Parameters
    ----------
    resolved
        ``resolving_view(server_args)``.
    model
        SGLang's ``ModelConfig``.
    """
    from sglang.srt.arg_groups.overrides import record_of, resolution_result

    if not model.is_hybrid_swa:
        return 1.0
    # A view says None where nobody has said otherwise.
    return float(resolution_result(record_of(resolved), "swa_full_tokens_ratio"))


def by_running_requests(resolved: Any, model: Any) -> bool:
    """Whether SGLang sizes the window layers' pool for so many requests instead
    (``SWARequestCapPoolConfigurator``); arguments as for :func:`share`."""
    by_requests = resolved.disable_radix_cache and resolved.max_running_requests is not None
    return model.is_hybrid_swa and by_requests


def most_of_one(resolved: Any, model: Any) -> int:
    """Slots of the window layers' pool that a request which decodes holds at most: its window, and what
    SGLang gives back in steps of an interval and by pages (``ScheduleBatch._evict_swa``); arguments as
    for :func:`share`."""
    from sglang.srt.environ import envs

    interval = max(1, envs.SGLANG_SWA_EVICTION_INTERVAL.get())
    return sliding_window.longest(model) + int(interval) + 2 * int(resolved.page_size)


def layers_per_slot(resolved: Any, model: Any) -> float:
    """Layers whose K and V take memory for one KV slot; arguments as for :func:`share`."""
    full = sliding_window.full_layers(model)
    return full + share(resolved, model) * (model.num_hidden_layers - full)


def free_slots(scheduler: Scheduler) -> int:
    """KV slots of the layers that see all tokens that nobody holds."""
    allocator = scheduler.token_to_kv_pool_allocator
    return allocator.full_available_size() if is_used(scheduler) else allocator.available_size()


def evictable_slots(scheduler: Scheduler) -> int:
    """KV slots of the layers that see all tokens that the prefix cache would give up."""
    cache = scheduler.tree_cache
    return cache.full_evictable_size() if is_used(scheduler) else cache.evictable_size()


def is_known(pool: SWAKVPool, allocator: Any, layers: Sequence[int]) -> bool:
    """Whether rows and partners are as described above, and ``layers`` are all that see all tokens.

    Parameters
    ----------
    pool : SWAKVPool
    allocator
        SGLang's.
    layers : sequence of int
        Numbers of those that a pass works over, ascending.
    """
    places = pool.layers_mapping.items()
    inside = {number: place for number, (place, windowed) in places if not windowed}
    return not allocator.swa_req_ring and inside == {layer: i for i, layer in enumerate(layers)}


def cut(kv: ReqKvInfo, start: int, end: int) -> int:
    """A row loses its slots ``[start, end)``, and those behind move up.

    Parameters
    ----------
    kv : ReqKvInfo
        Its cursor is written; without a pool of window layers it is 0 and stays so.
    start, end : int
        KV indices, multiples of the page size; not below ``ReqKvInfo.swa_dead_lo``.

    Returns
    -------
    int
        How many of the first of these slots have no partner any more.
    """
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

    cursor = kv.get_evicted_seqlen(ComponentType.SWA)
    alone = min(max(cursor - start, 0), end - start)
    if alone:
        kv.set_evicted_seqlen(ComponentType.SWA, cursor - alone)
    return alone


def free(allocator: Any, slots: torch.Tensor, start: int, alone: int) -> None:
    """Give slots back that were cut out of a row, with the partners that they have.

    Parameters
    ----------
    allocator
        SGLang's.
    slots : torch.Tensor
        Shape ``(n,)``, whole pages.
    start : int
        KV index of the first of them when it was cut out.
    alone : int
        As :func:`cut` has said.
    """
    if alone:
        allocator.free_full_segment(slots[:alone], start_pos=start)
    allocator.free_segment(slots[alone:], start_pos=start + alone)


def check_seen(pool: SWAKVPool, row: torch.Tensor, length: int, reach: int) -> None:
    """Raise ``RuntimeError`` where a slot that window layers read has no partner; waits for the device.

    Parameters
    ----------
    pool : SWAKVPool
    row : torch.Tensor
        The request's row of ``req_to_token``.
    length : int
        Its KV length.
    reach : int
        Tokens before its own that such a layer sees.
    """
    seen = row[max(0, length - reach) : length].long()
    lost = int((pool.full_to_swa_index_mapping[seen] <= 0).sum())
    if lost:
        raise RuntimeError(
            f"kv-compress: {lost} of the last {len(seen)} slots of a row have none in the KV pool of "
            "sliding-window layers"
        )
