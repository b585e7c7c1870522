"""In what type SGLang keeps K and V, before its pool is there to say so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

NAMED = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Choices of ``--kv-cache-dtype`` that say it and that compression supports."""
AUTO = "auto"
"""The choice that leaves it to the model: its own dtype, or fp8 where its quantization says so."""


def dtype_of(choice: str, model_dtype: torch.dtype, model: Any) -> torch.dtype:
    """The dtype of the KV pool's numbers.

    Parameters
    ----------
    choice
        The resolved ``--kv-cache-dtype``, one of those above.
    model_dtype
        Of the model's activations.
    model
        Anything with the model's ``quant_config``, or without one.
    """
    if choice != AUTO:
        return NAMED[choice]
    from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype

    _, dtype = configure_kv_cache_dtype(
        server_args_kv_cache_dtype=choice,
        model=model,
        model_dtype=model_dtype,
        is_draft_worker=False,
        is_dflash=False,
        speculative_draft_attention_backend="",
    )
    return dtype


def planned_dtype(choice: str, model: Any) -> torch.dtype:
    """As :func:`dtype_of`, without weights: for SGLang's ``ModelConfig``.

    Raises
    ------
    ValueError
        One line, where the model's quantization cannot be read here.
    """
    quantized = None
    if choice == AUTO and model.quantization is not None:
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.model_loader.weight_utils import get_quant_config

        try:
            quantized = get_quant_config(model, LoadConfig(), {})
        except Exception as error:  # whatever a quantization method raises on a machine without a GPU
            raise ValueError(
                f"the model's quantization ({model.quantization}) does not say in what type it keeps "
                f"K and V ({type(error).__name__}); pass --kv-cache-dtype"
            ) from error
    return dtype_of(choice, model.dtype, SimpleNamespace(quant_config=quantized))
