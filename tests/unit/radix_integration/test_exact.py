"""Exact prefixes: where a first window begins, and when a row stays out of the tree."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kara_sglang.radix_integration.exact import allow_insert, bar_insert, first_base


@pytest.mark.parametrize(
    ("committed", "protected", "base"),
    [(33, 32, 48), (48, 32, 48), (33, 64, 64), (33, 65, 80), (0, 0, 0)],
)
def test_a_first_window_begins_behind_prefill_and_tree(
    committed: int, protected: int, base: int
) -> None:
    kv = SimpleNamespace(kv_committed_len=committed, cache_protected_len=protected)
    assert first_base(kv, 16) == base


@pytest.mark.parametrize("asked", [False, True])
def test_a_compressed_row_is_barred_until_its_kv_is_computed_anew(asked: bool) -> None:
    """And what the client asked for comes back, however many windows were compressed."""
    req = SimpleNamespace(skip_radix_cache_insert=asked)
    state = SimpleNamespace(insert_skipped=None)
    allow_insert(req, state)
    assert req.skip_radix_cache_insert is asked
    for _ in range(2):
        bar_insert(req, state)
        assert req.skip_radix_cache_insert is True
    allow_insert(req, state)
    assert req.skip_radix_cache_insert is asked
