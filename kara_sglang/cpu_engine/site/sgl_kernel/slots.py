"""The page table and the KV pool: which slot a token has, and K/V that move between slots.

SGLang calls these with its compiled kernels' arguments; ``pool_len``, the page table's columns, is one
of them and is not needed here. Index tensors may have any integer type. Callers in SGLang:
``srt/mem_cache/allocation.py``, ``kernels/ops/speculative/cache_locs.py``,
``kernels/ops/speculative/eagle.py``, ``kernels/ops/kvcache/cache_move.py``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch


def _intervals(
    rows: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> Iterator[tuple[int, slice, slice]]:
    """Of each request: its row, its columns there, and its part of a list of all requests' slots."""
    taken = 0
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        yield row, slice(start, end), slice(taken, taken + end - start)
        taken += end - start


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write newly allocated KV slots into the page-table rows of a batch, in place.

    Row ``req_pool_indices[i]`` receives the next ``end_offset[i] - start_offset[i]`` entries of
    ``out_cache_loc`` at the columns ``[start_offset[i], end_offset[i])``.

    Parameters
    ----------
    req_pool_indices : torch.Tensor
        Rows of the batch, ``[batch_size]``.
    req_to_token : torch.Tensor
        The page table, ``[num_rows, pool_len]``, int32; written.
    start_offset, end_offset : torch.Tensor
        Half-open column intervals, ``[batch_size]``.
    out_cache_loc : torch.Tensor
        The slots of all rows one after the other, ``[sum(end_offset - start_offset)]``.
    """
    for row, columns, part in _intervals(req_pool_indices, start_offset, end_offset):
        req_to_token[row, columns] = out_cache_loc[part]


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """The way back: read the slots of ``[start_offset[i], end_offset[i])`` of each row.

    They go one after the other to the front of ``out_cache_loc``, which may be longer; what lies behind
    them stays. Shapes as in :func:`assign_req_to_token_pool_cpu`.
    """
    for row, columns, part in _intervals(req_pool_indices, start_offset, end_offset):
        out_cache_loc[part] = req_to_token[row, columns].to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    speculative_num_steps: int,
) -> None:
    """Read the ``topk * speculative_num_steps`` slots behind each request's ``seq_lens[i]`` tokens.

    ``out_cache_loc`` is ``[batch_size * topk * speculative_num_steps]``; written.
    """
    ends = seq_lens + topk * speculative_num_steps
    assign_extend_cache_locs_cpu(
        req_pool_indices, req_to_token, seq_lens, ends, out_cache_loc, pool_len
    )


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Collect the slots of accepted draft tokens at the front of ``accept_out_cache_loc``.

    ``accept_index`` is ``[batch_size, depth]`` indices into ``out_cache_loc``, -1 where nothing was
    accepted. What lies behind the accepted slots stays.
    """
    accepted = accept_index[accept_index != -1]
    accept_out_cache_loc[: accepted.numel()] = out_cache_loc[accepted.long()]


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy the bytes of slots ``src_loc`` to slots ``tgt_loc`` in each buffer of the KV pool.

    ``data_ptrs`` are addresses and ``strides`` bytes per slot, ``[num_buffers]``. The two lists may
    overlap: all is read before anything is written.
    """
    targets, sources = tgt_loc.tolist(), src_loc.tolist()
    for first, size in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        kept = [ctypes.string_at(first + slot * size, size) for slot in sources]
        for slot, data in zip(targets, kept, strict=True):
            ctypes.memmove(first + slot * size, data, size)
