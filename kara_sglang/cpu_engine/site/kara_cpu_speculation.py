"""A plugin for SGLang with what speculative decoding and DP attention lack on a CPU without SGLang's
own kernels.

``sgl_kernel``'s stand-in has the functions that SGLang calls by name. What remains:

* ``torch_native`` attention verifies no draft tokens, and has no backends for a draft model,
* overlap scheduling gathers the draft model's state with a Triton kernel, so SGLang switches overlap
  off on a CPU. It gathers in torch here, and overlap stays on; ``--disable-overlap-schedule`` switches
  it off as on a GPU,
* NGRAM compiles its corpus; without a compiler SGLang fails late, with many lines,
* DP attention pads batches, with rows of a length that ``torch_native`` attention does not name.

SGLang finds the plugin by ``kara_cpu_speculation-0.dist-info`` beside this file, as it finds any other.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def forward_extend(
    original: Callable[..., torch.Tensor],
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
) -> torch.Tensor:
    """Around the backend's prefill, where SGLang also sends the verification of drafts."""
    if not forward_batch.forward_mode.is_target_verify():
        return original(backend, q, k, v, layer, forward_batch, save_kv_cache)
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    pool = backend.token_to_kv_pool
    if save_kv_cache:
        pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
    n = forward_batch.spec_info.draft_token_num
    seen = forward_batch.spec_info.custom_mask.view(-1, n, n)
    return _of_layer(backend, q, layer, forward_batch, seen)


def _of_layer(
    backend: Any, q: torch.Tensor, layer: Any, forward_batch: Any, seen: torch.Tensor
) -> torch.Tensor:
    pool = backend.token_to_kv_pool
    return tree_attention(
        q.view(-1, seen.shape[1], layer.tp_q_head_num, layer.qk_head_dim),
        pool.get_key_buffer(layer.layer_id),
        pool.get_value_buffer(layer.layer_id),
        backend.req_to_token_pool.req_to_token[forward_batch.req_pool_indices],
        forward_batch.seq_lens,
        seen,
        layer.scaling,
    )


def tree_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of draft trees: a node sees all tokens before its tree, and some of those behind.

    Parameters
    ----------
    q : torch.Tensor
        ``[batch_size, n, query heads, head_dim]``.
    keys, values : torch.Tensor
        One layer of the KV pool, ``[slots, KV heads, head_dim]``.
    rows : torch.Tensor
        The batch's rows of the page table, ``[batch_size, columns]``; the tree's slots stand behind
        those of the tokens before it.
    lengths : torch.Tensor
        Tokens before each tree, ``[batch_size]``.
    seen : torch.Tensor
        Whether node i sees the j-th slot of its tree, ``[batch_size, n, slots of a tree]`` bool.

    Returns
    -------
    torch.Tensor
        ``[batch_size * n, query heads * head_dim]``, in q's dtype.
    """
    n, behind = seen.shape[1:]
    outputs = []
    for query, row, length, tree in zip(q, rows, lengths.tolist(), seen, strict=True):
        slots = row[: length + behind].long()
        key, value = (pool[slots].to(query.dtype).transpose(0, 1)[None] for pool in (keys, values))
        mask = torch.cat((tree.new_ones(n, length), tree), dim=1)
        output = scaled_dot_product_attention(
            query.transpose(0, 1)[None], key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
        outputs.append(output[0].transpose(0, 1).reshape(n, -1))
    return torch.cat(outputs)


def branches(topk: int, steps: int, written: int) -> torch.Tensor:
    """What the newest tokens of a draft model's branches see of the slots behind the text.

    A branch has ``steps`` slots, and sees the ``written`` first of them and none of another branch's,
    whose child it may be: so it is in SGLang's own backends (``generate_draft_decode_kv_indices``).

    Returns
    -------
    torch.Tensor
        ``[topk, topk * steps]`` bool.
    """
    seen = torch.zeros(topk, topk, steps, dtype=torch.bool)
    seen[range(topk), range(topk), :written] = True
    return seen.flatten(1)


def with_torch_native(
    factory: Any,
    backend_name: str,
    backend_map: dict[str, Callable[[], tuple[str, Any]]],
    error_template: str,
    stamps_children: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before SGLang looks up a draft model's backend: offers ``torch_native`` as well.

    ``stamps_children`` is SGLang's mark of the one that holds a backend for each step of the draft.
    """
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    topk, steps = factory.topk, factory.speculative_num_steps

    class Step(TorchNativeAttnBackend):
        """Decoding in one step of the draft, the first ``written - 1`` of whose tokens are there."""

        written = 0

        def forward_decode(
            self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
        ) -> torch.Tensor:
            from sglang.srt.mem_cache.memory_pool import KVWriteLoc

            if save_kv_cache:
                where = KVWriteLoc(forward_batch.out_cache_loc, None)
                self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)
            seen = branches(topk, steps, self.written).expand(len(forward_batch.seq_lens), -1, -1)
            return _of_layer(self, q, layer, forward_batch, seen)

    class Steps:
        """The backends of all steps; SGLang's ``*MultiStepDraftBackend``."""

        def __init__(self) -> None:
            self.attn_backends = []
            for written in range(1, steps):
                step = Step(factory.draft_model_runner)
                step.written = written
                self.attn_backends.append(step)

        def init_forward_metadata(self, forward_batch: Any) -> None:
            for backend in self.attn_backends:
                backend.init_forward_metadata(forward_batch)

    def decode() -> tuple[str, Any]:
        return "torch_native", Steps()

    def extend() -> tuple[str, Any]:
        return "torch_native", TorchNativeAttnBackend(factory.draft_model_runner)

    offered = backend_map | {"torch_native": decode if stamps_children else extend}
    return (factory, backend_name, offered, error_template, stamps_children), {}


def gather_spec_extras(
    indices: torch.Tensor,
    topk_p_buf: torch.Tensor,
    topk_index_buf: torch.Tensor,
    output_tokens_buf: torch.Tensor,
    hidden_states_buf: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """Rows ``indices`` of each buffer; in place of SGLang's function of this name."""
    buffers = (topk_p_buf, topk_index_buf, output_tokens_buf, hidden_states_buf)
    return tuple(None if buffer is None else buffer[indices] for buffer in buffers)


def length_of_padding(backend: Any) -> int:
    """A method that ``torch_native`` attention lacks: the length of the rows with which DP attention
    fills a rank's batch up."""
    return 1


def keep_overlap(server_args: Any) -> None:
    """In place of SGLang's word that overlap is not implemented for speculation on a CPU."""


def require_compiler(server_args: Any) -> None:
    """Before NGRAM is set up: ends the process with one line where its corpus cannot be compiled."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    missing = [name for name in (compiler, "ninja") if shutil.which(name) is None]
    if missing:
        print(
            f"NGRAM speculation compiles C++ and needs {' and '.join(missing)}: install them "
            "(Debian and Ubuntu: apt install g++ ninja-build), or choose another "
            "--speculative-algorithm",
            file=sys.stderr,
        )
        raise SystemExit(2)


HOOKS: tuple[tuple[str, Callable[..., Any], str], ...] = (
    (
        "layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend",
        forward_extend,
        "AROUND",
    ),
    ("speculative.draft_utils.DraftBackendFactory._create_backend", with_torch_native, "BEFORE"),
    ("managers.overlap_utils.gather_spec_extras", gather_spec_extras, "REPLACE"),
    ("arg_groups.speculative_hook._disable_overlap_schedule_for_cpu", keep_overlap, "REPLACE"),
    ("arg_groups.speculative_hook._handle_ngram", require_compiler, "BEFORE"),
)
"""Functions below ``sglang.srt``, what stands at them, and how."""


def register() -> None:
    """What SGLang calls in each process."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, handler, kind in HOOKS:
        HookRegistry.register(f"sglang.srt.{target}", handler, HookType[kind])
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = length_of_padding
