"""What has left a sliding window is counted off the KV length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from kara_sglang.radix_integration.row import RequestState, keep_state
from kara_sglang.scheduler import runtime


def told(req: Any, monkeypatch: pytest.MonkeyPatch, interval: str) -> list[tuple[int, int]]:
    """KV length and interval with which SGLang's own ``maybe_evict_swa`` comes to the prefix cache,
    through the hook."""
    monkeypatch.setenv("SGLANG_SWA_EVICTION_INTERVAL", interval)
    calls: list[tuple[int, int]] = []
    cache = SimpleNamespace(
        supports_swa=lambda: True,
        supports_auxiliary_swa=lambda: False,
        sliding_window_size=127,
        swa_retain_window=127,
        release_swa_prefix_lock=lambda _req: None,
        evict_sliding_windows=lambda _req, length, eviction_interval: calls.append(
            (length, eviction_interval)
        ),
    )
    groups = SimpleNamespace(free_group_begin=lambda: None, free_group_end=lambda: None)

    class Batch(ScheduleBatch):
        def __init__(self) -> None:
            self.tree_cache, self.token_to_kv_pool_allocator = cache, groups
            self.reqs, self.forward_mode = [req], ForwardMode.DECODE

        def _evict_swa(self, *args: Any, **named: Any) -> None:
            changed = runtime.before_evict_swa(self, *args, **named)
            if changed is None:
                super()._evict_swa(*args, **named)
            else:
                (_, *args), named = changed
                super()._evict_swa(*args, **named)

    Batch().maybe_evict_swa()
    return calls


def test_eviction_counts_kv_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's gate counts tokens, so what comes through it is gated again."""
    kv = SimpleNamespace(holds_kv=True, get_evicted_seqlen=lambda _component: 160)
    req: Any = SimpleNamespace(seqlen=1001, decode_batch_idx=400, kv=kv)
    assert told(req, monkeypatch, "64") == [(1000, 1)]
    state = RequestState(selector=None, kept=32, seed=0, base=100)
    keep_state(req, state)
    assert told(req, monkeypatch, "64") == [(1000, 1)]
    state.removed = 256
    assert told(req, monkeypatch, "64") == [(744, 64)]
    assert told(req, monkeypatch, "1") == [(744, 1)]
