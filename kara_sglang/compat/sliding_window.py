"""Sliding-window layers beside full ones: in one KV pool as in Gemma 3, or in one of their own as in
gpt-oss (``scheduler/window_pool.py``).

A pass works over the full layers only. A window layer reads the last slots of a row: SGLang's attention
backends count its window back from the KV length and ask no position. While a row ends with as many
uncompressed tokens as the window reaches back, these are the newest tokens in order. What lies before
them is never read again, because rows only grow. So ``delay`` is no shorter than the longest window,
and a compressed prefix is used where it ends with as many uncompressed tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention

SLIDING = "sliding_attention"
"""What configs call such a layer in ``layer_types``."""


def reach(layer: RadixAttention) -> int:
    """Tokens before its own that an attention layer sees; 0 for a full one, which sees all."""
    size = layer.sliding_window_size
    return 0 if size in (None, -1) else int(size)


def longest(model: Any) -> int:
    """The longest window in tokens, a token's own included; 0 without window layers.

    Parameters
    ----------
    model
        SGLang's ``ModelConfig``.
    """
    return int(model.sliding_window_size or 0) if SLIDING in _layer_types(model) else 0


def full_layers(model: Any) -> int:
    """How many layers a pass works over; ``model`` as for :func:`longest`."""
    return int(model.num_hidden_layers) - list(_layer_types(model)).count(SLIDING)


def _layer_types(model: Any) -> tuple[str, ...]:
    return tuple(getattr(model.hf_text_config, "layer_types", None) or ())
