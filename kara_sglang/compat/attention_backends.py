"""Which of SGLang's attention backends a step uses (``layers/attention/hybrid_attn_backend.py``)."""

from __future__ import annotations

from typing import Any


def decode_verifies(resolved: Any) -> bool:
    """Whether drafts are verified by the backend for decode steps, and not by that for prefills;
    ``resolved`` is ``resolving_view(server_args)``."""
    return bool(resolved.speculative_attention_mode == "decode")


def writing(resolved: Any) -> str | None:
    """The backend of steps that generate tokens, which writes their K and V; None: not chosen yet.
    ``resolved`` as above."""
    decodes = resolved.speculative_algorithm is None or decode_verifies(resolved)
    own = resolved.decode_attention_backend if decodes else resolved.prefill_attention_backend
    return own or resolved.attention_backend
