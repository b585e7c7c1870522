"""Stand-in for ``sgl_kernel`` on a machine without a GPU; installed by ``kara_sglang.cpu_engine``.

With ``SGLANG_USE_CPU_ENGINE=1`` SGLang imports nine functions from ``sgl_kernel``, and a tenth from
``sgl_kernel.speculative``, without a guard, but PyPI has no CPU build of that package (upstream
compiles it from source in a container). They are written out here in plain torch: ``slots`` holds
those that read and write the page table and the KV pool, ``speculative`` those of draft trees.

It registers no ``torch.ops.sgl_kernel`` operators, on purpose: SGLang asks for
``torch.ops.sgl_kernel.convert_weight_packed`` and, finding none, takes the native torch path in
every layer.
"""

from __future__ import annotations

from .slots import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    copy_all_layer_kv_cache_cpu,
    fill_accept_out_cache_loc_cpu,
)
from .speculative import (
    build_tree_kernel_efficient_cpu,
    fill_bonus_tokens_cpu,
    rotate_input_ids_cpu,
    verify_tree_greedy_cpu,
)

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
]
