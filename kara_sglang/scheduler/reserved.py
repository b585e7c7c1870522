"""What compression takes beside a model's weights, before SGLang sizes its KV pool.

The server allocates it; the doctor, the plan and benchmarks ask how large it would be.
"""

from __future__ import annotations

from typing import Any

import torch

from kara_sglang.config import KaraConfig
from kara_sglang.kernels.backend import WindowShape
from kara_sglang.kernels.record import PAGE
from kara_sglang.scheduler import policy
from kara_sglang.scheduler.pace import PLAIN, Pace
from kara_sglang.scheduler.ring.demand import Demand
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder, cheapest
from kara_sglang.scheduler.ring.size import Room, Size, ring_size


def shape_of(model: Any, full_layers: int | None = None) -> AttentionShape:
    """The heads of a server without tensor parallelism, on the ``meta`` device.

    Parameters
    ----------
    model
        SGLang's ``ModelConfig``, or anything with its attributes.
    full_layers
        Those that a pass works over; None: all.
    """
    return AttentionShape(
        num_layers=model.num_hidden_layers if full_layers is None else full_layers,
        num_q_heads=model.num_attention_heads,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.head_dim,
        dtype=model.dtype,
        device=torch.device("meta"),
    )


def query_ring(
    shape: AttentionShape, config: KaraConfig, room: Room | None = None, pace: Pace = PLAIN
) -> QueryRecorder:
    """The recorder of a rank, with its ring on ``shape.device``, as large as ``ring/size.py`` says;
    without pages where the settings keep no queries.

    Parameters
    ----------
    shape : AttentionShape
    config : KaraConfig
    room : Room
        None: nobody says how much memory is free.
    pace : Pace
    """
    lag = policy.lag(config)
    dtype = config.ring_dtype(shape.dtype) if config.keeps_queries else shape.dtype
    page, demand = PAGE * shape.entry_bytes(dtype), Demand(0, config.window, config.delay, pace)
    heads = 1 if config.query_heads == "mean" else shape.group
    least = demand.most(cheapest(shape.group, config.query_heads)) * page
    size = Size(0, "no queries are kept")
    if config.keeps_queries:
        size = ring_size(config, demand.usual(heads) * page, least, room or Room())
    return QueryRecorder(
        shape,
        config.window,
        config.delay,
        size.bytes,
        dtype,
        lag=lag,
        checked=config.debug_checks,
        why=size.why,
        pace=pace,
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
        voices=shape.group if config.keeps_queries else 0,
        query_count=config.window + config.delay,
    )
