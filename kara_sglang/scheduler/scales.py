"""The softmax scale of each layer for keys as they are stored.

An fp8 pool keeps ``K / k_scale`` and attention multiplies logits by ``k_scale``, one float per layer
(``layers/quantization/kv_cache.py``); so do scores. ``v_scale`` multiplies all scores of a layer alike,
and what is kept is decided layer by layer, so it may be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of pools that keep scaled numbers."""
UNSCALED_BACKENDS = ("torch_native",)
"""Attention backends that store K and V as they are, whatever scales a checkpoint has."""


def softmax_scales(
    layers: Sequence[RadixAttention], dtype: torch.dtype, backend: str | None
) -> list[float]:
    """One per layer, to be asked again before each pass: other weights may come with other scales.

    Parameters
    ----------
    layers
        The model's, in order.
    dtype
        Of the KV pool's numbers (``KVCache.dtype``).
    backend
        Attention backend that writes what a window holds (``compat/attention_backends.py``).
    """
    if dtype not in FP8 or backend in UNSCALED_BACKENDS:
        return [float(layer.scaling) for layer in layers]
    return [float(layer.scaling) * _key_scale(layer) for layer in layers]


def _key_scale(layer: RadixAttention) -> float:
    """What a layer's keys are divided by when stored (``MHATokenToKVPool.set_kv_buffer``)."""
    # A checkpoint's scale is a tensor with its float beside it; ``--quantization-param-path`` sets the
    # former to a float and leaves the latter alone.
    scale = layer.k_scale if layer.k_scale_float is None else layer.k_scale_float
    return 1.0 if scale is None else float(scale)
