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
    return verify(
        q.view(-1, n, layer.tp_q_head_num, layer.qk_head_dim),
        pool.get_key_buffer(layer.layer_id),
        pool.get_value_buffer(layer.layer_id),
        backend.req_to_token_pool.req_to_token[forward_batch.req_pool_indices],
        forward_batch.seq_lens,
        forward_batch.spec_info.custom_mask.view(-1, n, n),
        layer.scaling,
    )


def verify(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of draft trees: a node sees all tokens before its tree, its ancestors and itself.

    Parameters
    ----------
    q : torch.Tensor
        ``[batch_size, n, query heads, head_dim]``.
    keys, values : torch.Tensor
        One layer of the KV pool, ``[slots, KV heads, head_dim]``.
    rows : torch.Tensor
        The batch's rows of the page table, ``[batch_size, columns]``; the nodes' slots stand behind
        those of the tokens before them.
    lengths : torch.Tensor
        Tokens before each tree, ``[batch_size]``.
    seen : torch.Tensor
        Whether node i sees node j, ``[batch_size, n, n]`` bool.

    Returns
    -------
    torch.Tensor
        ``[batch_size * n, query heads * head_dim]``, in q's dtype.
    """
    n = q.shape[1]
    outputs = []
    for query, row, length, tree in zip(q, rows, lengths.tolist(), seen, strict=True):
        slots = row[: length + n].long()
        key, value = (pool[slots].to(query.dtype).transpose(0, 1)[None] for pool in (keys, values))
        mask = torch.cat((tree.new_ones(n, length), tree), dim=1)
        output = scaled_dot_product_attention(
            query.transpose(0, 1)[None], key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
        outputs.append(output[0].transpose(0, 1).reshape(n, -1))
    return torch.cat(outputs)


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

    class Step(TorchNativeAttnBackend):
        """Decoding in one step of the draft: as many more tokens as there were steps."""

        ahead = 0

        def forward_decode(
            self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
        ) -> torch.Tensor:
            lengths = forward_batch.seq_lens
            forward_batch.seq_lens = lengths + self.ahead
            try:
                return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
            finally:
                forward_batch.seq_lens = lengths

    class Steps:
        """The backends of all steps; SGLang's ``*MultiStepDraftBackend``."""

        def __init__(self) -> None:
            self.attn_backends = []
            for ahead in range(1, factory.speculative_num_steps):
                step = Step(factory.draft_model_runner)
                step.ahead = ahead
                self.attn_backends.append(step)

        def init_forward_metadata(self, forward_batch: Any) -> None:
            for backend in self.attn_backends:
                backend.init_forward_metadata(forward_batch)

    def decode() -> tuple[str, Any]:
        if factory.topk != 1:
            raise ValueError(
                "a draft model's tree is not supported by torch_native attention; "
                "use --speculative-eagle-topk 1"
            )
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
