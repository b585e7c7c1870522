"""Whose K and V a window holds, where SGLang has more than one attention backend."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from kara_sglang.compat import attention_backends

BOTH = {"prefill_attention_backend": "torch_native", "decode_attention_backend": "intel_amx"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "intel_amx"),
        ({"speculative_algorithm": "NGRAM"}, "torch_native"),
        ({"speculative_algorithm": "EAGLE", "speculative_attention_mode": "decode"}, "intel_amx"),
        ({"speculative_attention_mode": "decode"}, "intel_amx"),
    ],
)
def test_drafts_are_written_by_the_backend_that_verifies_them(
    resolved: Callable[..., SimpleNamespace], changes: dict[str, str], expected: str
) -> None:
    """Which is that for prefills unless a flag says otherwise."""
    assert attention_backends.writing(resolved(**BOTH, **changes)) == expected
    one = resolved(attention_backend="triton", **changes)
    assert attention_backends.writing(one) == "triton"


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_sglang_chooses_alike(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own class of two backends, asked for the step that verifies drafts."""
    from sglang.srt.layers.attention import hybrid_attn_backend
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    flags = SimpleNamespace(speculative_attention_mode=mode)
    monkeypatch.setattr(hybrid_attn_backend, "get_spec", lambda: flags)
    runner, for_prefills, for_decoding = MagicMock(), MagicMock(), MagicMock()
    both = hybrid_attn_backend.HybridAttnBackend(runner, for_prefills, for_decoding)
    verifies = both._select_backend(ForwardMode.TARGET_VERIFY)
    assert (verifies is for_decoding) == attention_backends.decode_verifies(flags)
