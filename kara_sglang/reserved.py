"""What compression takes beside a model's weights, before SGLang sizes its KV pool.

The server allocates it; the doctor, the plan and benchmarks ask how large it would be.
"""

from __future__ import annotations

from typing import Any

import torch

from kara_sglang import policy
from kara_sglang.config import KaraConfig
from kara_sglang.kernels.backend import WindowShape
from kara_sglang.recorder import AttentionShape, QueryRecorder


def shape_of(model: Any) -> AttentionShape:
    """The heads of a server without tensor parallelism, on the ``meta`` device.

    Parameters
    ----------
    model
        SGLang's ``ModelConfig``, or anything with its attributes.
    """
    return AttentionShape(
        num_layers=model.num_hidden_layers,
        num_q_heads=model.num_attention_heads,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.head_dim,
        dtype=model.dtype,
        device=torch.device("meta"),
    )


def query_ring(shape: AttentionShape, config: KaraConfig) -> QueryRecorder:
    """The recorder of a rank, with its ring on ``shape.device``."""
    return QueryRecorder(
        shape,
        config.window,
        config.delay,
        config.query_bytes,
        config.ring_dtype(shape.dtype),
        lag=policy.lag(config),
        checked=config.debug_checks,
    )


def largest_window(shape: AttentionShape, config: KaraConfig) -> WindowShape:
    """The window that takes most of a pass's scratch: with all query heads, and kept whole."""
    return WindowShape(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        width=config.window,
        kept=config.window,
        units=shape.group if config.query_bytes else 0,
        query_count=config.window + config.delay,
    )
