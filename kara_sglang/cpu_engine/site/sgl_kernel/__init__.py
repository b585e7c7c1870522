"""Stand-in for ``sgl_kernel`` on a machine without a GPU; installed by ``kara_sglang.cpu_engine``.

With ``SGLANG_USE_CPU_ENGINE=1`` SGLang imports nine functions from ``sgl_kernel`` without a guard,
but PyPI has no CPU build of that package (upstream compiles it from source in a container). One of
the nine runs in ordinary serving and is written out here; the others belong to speculative
decoding, which this stand-in does not offer.

It registers no ``torch.ops.sgl_kernel`` operators, on purpose: SGLang asks for
``torch.ops.sgl_kernel.convert_weight_packed`` and, finding none, takes the native torch path in
every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch

_SPECULATIVE = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)


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
        Rows of the batch, ``[batch_size]``, any integer type.
    req_to_token : torch.Tensor
        The page table, ``[num_rows, pool_len]``, int32; written.
    start_offset, end_offset : torch.Tensor
        Half-open column intervals, ``[batch_size]``, any integer type.
    out_cache_loc : torch.Tensor
        The slots of all rows one after the other, ``[sum(end_offset - start_offset)]``.
    pool_len : int
        Columns of the page table; SGLang passes it for its compiled kernel.
    """
    taken = 0
    intervals = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in intervals:
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start]
        taken += end - start


def _unavailable(name: str) -> Callable[..., NoReturn]:
    def raise_not_implemented(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} does not exist in kara_sglang's CPU stand-in for sgl_kernel: "
            "speculative decoding needs a GPU or a CPU build of sgl_kernel"
        )

    raise_not_implemented.__name__ = name
    return raise_not_implemented


globals().update({name: _unavailable(name) for name in _SPECULATIVE})

__all__ = ["assign_req_to_token_pool_cpu", *_SPECULATIVE]
