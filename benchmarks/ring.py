"""The query ring that a model would get: what a benchmark needs to size one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kara_sglang.compat import sliding_window
from kara_sglang.config import KaraConfig
from kara_sglang.scheduler.ring.recorder import QueryRecorder


def ring_of(model: str, settings: dict[str, Any]) -> QueryRecorder:
    """A ring without memory of its own, for the model in a folder or on the hub, without tensor
    parallelism.

    Parameters
    ----------
    model : str
    settings : dict
        As for :meth:`KaraConfig.from_settings`.
    """
    import torch
    from transformers import AutoConfig

    from kara_sglang.scheduler.reserved import query_ring, shape_of

    config = AutoConfig.from_pretrained(model)
    heads = config.num_attention_heads
    model_config = SimpleNamespace(
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        get_total_num_kv_heads=lambda: config.num_key_value_heads,
        dtype=torch.float32,
        hf_text_config=config,
        sliding_window_size=getattr(config, "sliding_window", None),
    )
    settled = KaraConfig.from_settings(settings).reaching(sliding_window.longest(model_config))
    return query_ring(shape_of(model_config, sliding_window.full_layers(model_config)), settled)
