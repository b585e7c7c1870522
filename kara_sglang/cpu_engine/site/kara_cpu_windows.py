"""A plugin for SGLang with what gpt-oss and other models whose sliding-window layers have a KV pool of
their own lack on a CPU without SGLang's own kernels.

* ``torch_native`` attention reads those layers with the slots of the others' pool, and knows no sinks;
  so SGLang does not let gpt-oss start with it,
* the experts' activation is compiled when it is first used, with a C++ compiler; here it runs as it is
  written.

The experts must be in 16 or 32 bits: MXFP4 needs a GPU.

SGLang finds the plugin by ``kara_cpu_windows-0.dist-info`` beside this file, as it finds any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def forward(
    original: Callable[..., torch.Tensor],
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Around the backend's attention of a step."""
    mode, pool = forward_batch.forward_mode, backend.token_to_kv_pool
    own_pool = backend.use_sliding_window_kv_pool and pool.layers_mapping[layer.layer_id][1]
    if mode.is_idle() or (sinks is None and not own_pool):
        return original(backend, q, k, v, layer, forward_batch, save_kv_cache)
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    if not (mode.is_decode() or mode.is_extend_without_speculative()):
        raise NotImplementedError(f"{mode.name} with attention sinks or a sliding-window KV pool")
    if save_kv_cache:
        where = KVWriteLoc(forward_batch.out_cache_loc, backend.swa_out_cache_loc)
        pool.set_kv_buffer(layer, where, k, v)
    rows = backend.req_to_token_pool.req_to_token[forward_batch.req_pool_indices]
    if own_pool:
        rows = pool.translate_loc_from_full_to_swa(rows)
    lengths = forward_batch.seq_lens.tolist()
    news = [1] * len(lengths) if mode.is_decode() else forward_batch.extend_seq_lens.tolist()
    return attention(
        q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
        pool.get_key_buffer(layer.layer_id),
        pool.get_value_buffer(layer.layer_id),
        rows,
        lengths,
        news,
        layer.scaling,
        window=layer.sliding_window_size,
        sinks=sinks,
    )


def attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    lengths: Sequence[int],
    news: Sequence[int],
    scale: float,
    *,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a batch's new tokens.

    Parameters
    ----------
    q : torch.Tensor
        Those of all requests one after the other, ``[tokens, query heads, head_dim]``.
    keys, values : torch.Tensor
        One layer of its KV pool, ``[slots, KV heads, head_dim]``.
    rows : torch.Tensor
        Slots in that pool of each request's tokens, ``[batch_size, columns]``.
    lengths, news : sequence of int
        Tokens of each request, and how many of them are new.
    scale : float
    window : int or None
        Tokens before its own that a token sees; None or -1: all.
    sinks : torch.Tensor or None
        Logits, ``[query heads]``, that take part in the softmax and stand for no token.

    Returns
    -------
    torch.Tensor
        ``[tokens, query heads * head_dim]``, in q's dtype.
    """
    outputs, first = [], 0
    for row, length, new in zip(rows, lengths, news, strict=True):
        query = q[first : first + new]
        first += new
        at = torch.arange(length - new, length)[:, None]
        before = at - torch.arange(length)
        seen = before >= 0
        if window is not None and window >= 0:
            seen &= before <= window
        slots = row[:length].long()
        key, value = (pool[slots].to(q.dtype).transpose(0, 1) for pool in (keys, values))
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
        mask = mask.expand(q.shape[1], -1, -1)
        if sinks is not None:
            # One more key, whose logit is the sink and whose value is 0.
            key, value = (torch.cat((part, torch.zeros_like(part[:, :1])), 1) for part in (key, value))
            sink = sinks.to(q.dtype)[:, None, None].expand(-1, new, 1)
            mask = torch.cat((mask, sink), 2)
        output = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key[None],
            value[None],
            attn_mask=mask[None],
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(output[0].transpose(0, 1).reshape(new, -1))
    return torch.cat(outputs)


def backends_of(chosen: Callable[[Any], tuple[str, str]], settings: Any) -> tuple[str, ...]:
    """What SGLang's checks of a model are told of its backends for prefill and decoding: that it is
    another one of a CPU, which has what ``torch_native`` lacks."""
    return tuple("intel_amx" if one == "torch_native" else one for one in chosen(settings))


BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"


def register() -> None:
    """What SGLang calls in each process."""
    from sglang.srt.arg_groups import model_hook
    from sglang.srt.layers.moe import fused_moe_native
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{BACKEND}.forward", forward, HookType.AROUND)
    # In this module only: others must know the backend.
    model_hook.attention_backends_of = partial(backends_of, model_hook.attention_backends_of)
    written = inspect.unwrap(fused_moe_native.swiglu_gpt_oss_sigmoid_alpha)
    fused_moe_native.swiglu_gpt_oss_sigmoid_alpha = written
