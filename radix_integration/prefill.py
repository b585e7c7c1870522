"""Prefill behind a compressed prefix: where tokens become slots.

``req.prefix_len``, ``extend_end`` and ``extend_len`` count tokens: SGLang slices the text with them,
cuts chunks, fills its budgets and reports ``cached_tokens``. A prefill batch's ``prefix_lens`` and
``seq_lens`` count slots from the moment on at which SGLang allocates: all that reads them afterwards is
the page table, attention, and the request's KV lengths. ``extend_lens`` is the same in both. Positions
are the one thing behind the allocation that counts tokens; the offset comes from the host, because
``orig_seq_lens`` of a chunk in the middle says where the prompt ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kara_sglang.kernels.transfer import to_device
from kara_sglang.radix_integration.prefix import prefix_of, removed_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from kara_sglang.radix_integration.compressed import CompressedRadixCache


def before_alloc_for_extend(batch: ScheduleBatch) -> None:
    """BEFORE ``allocation.alloc_for_extend``: the batch's lengths become those of its rows."""
    for req in batch.reqs:
        if not req.kv.holds_kv:
            _begin(req, batch.tree_cache)
    removed = _removed_of(batch)
    if removed is None:
        return
    batch.prefix_lens = [
        length - less for length, less in zip(batch.prefix_lens, removed.tolist(), strict=True)
    ]
    # Rebound, never written in place, like everywhere.
    batch.seq_lens_cpu = batch.seq_lens_cpu - removed
    batch.seq_lens = batch.seq_lens - to_device(removed, batch.seq_lens.device)


def after_prepare_for_extend(_result: None, batch: ScheduleBatch) -> None:
    """AFTER ``ScheduleBatch.prepare_for_extend``, which sums up the lengths that it began with."""
    if _removed_of(batch) is not None:
        batch.seq_lens_sum = None  # SGLang sums up anew


def around_prefix_kv_indices(
    original: Callable[..., torch.Tensor], batch: ScheduleBatch, req: Req
) -> torch.Tensor:
    """AROUND ``allocation._prefix_kv_indices``: the prefix of a later chunk, read off the row, and that
    of a row that is back.

    Else a first chunk's comes from the tree (``CompressedRadixCache.prefix_device_indices``).
    """
    prefix = prefix_of(req)
    if prefix is not None and prefix.returned is not None and not req.kv.holds_kv:
        return prefix.returned.row
    removed = removed_of(req)
    if not removed or not req.kv.holds_kv:
        return original(batch, req)
    row = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
    return row[: req.prefix_len - removed].to(torch.int64)


def shift_positions(result: ForwardBatch, batch: ScheduleBatch) -> None:
    """Give the tokens of a prefill their true positions."""
    removed = _removed_of(batch)
    if removed is None:
        return
    offsets = torch.repeat_interleave(removed, torch.tensor(batch.extend_lens))
    offsets = to_device(offsets, result.positions.device)
    result.positions = result.positions + offsets
    if result.mrope_positions is not None:
        result.mrope_positions = result.mrope_positions + offsets[None]


def _removed_of(batch: ScheduleBatch) -> torch.Tensor | None:
    """Tokens that each row lacks, int64 on the host; None where none lacks any."""
    removed: list[Any] = [removed_of(req) for req in batch.reqs]
    return torch.tensor(removed, dtype=torch.int64) if any(removed) else None


def _begin(req: Req, cache: CompressedRadixCache) -> None:
    """A first chunk. What the match has given and passed over is counted with it, as SGLang counts
    ``cached_tokens``; for the request's report once, whatever is computed anew after a retraction."""
    prefix = prefix_of(req)
    if prefix is None or prefix.sharing is None or prefix.returned is not None:
        return  # the cache of a server with exact prefixes, where rows come back, is SGLang's own
    if prefix.windows:
        # Where a part came from the host, SGLang has counted what the tree owns in tokens.
        req.kv.cache_protected_len = req.prefix_len - removed_of(req)
    cache.computed_again(prefix.passed_over)
    if req.retracted_stain:
        return
    prefix.computed_again = prefix.passed_over
    if prefix.windows:
        first = prefix.windows[0]
        prefix.reused_tokens = req.prefix_len - first.logical_start
        prefix.reused_slots = req.prefix_len - removed_of(req) - first.kv_start
