"""Compressed prefixes, case by case."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from prefixes import POOL, SHARED, Request, World, finished, looked_up
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams
from sglang.srt.mem_cache.common import match_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from kara_sglang.radix_integration.prefix import Sharing, layout_of, prefix_of, removed_of
from kara_sglang.radix_integration.row import Window


def test_where_a_text_leaves_a_window_decides_what_is_reused() -> None:
    """W of two pages at 12, R of one: 24 tokens are 3 + 1 + 1 pages of slots."""
    world = World(page=4, seed=0)
    finished(world, SHARED, windows=1)
    assert looked_up(world, [*SHARED, 1]) == (24, 20)
    assert looked_up(world, [*SHARED[:23], 6, 1]) == (20, 16)  # in the page behind the window
    assert looked_up(world, [*SHARED[:20], 6, 6]) == (20, 16)  # right behind it
    assert looked_up(world, [*SHARED[:19], 6, 6]) == (12, 12)  # inside: up to its start
    assert looked_up(world, [*SHARED[:13], 6, 6]) == (12, 12)
    assert looked_up(world, [*SHARED[:11], 6, 6]) == (8, 8)  # in the exact part
    assert looked_up(world, SHARED) == (20, 16)  # the last token is never taken from the cache
    assert looked_up(world, SHARED[:20]) == (12, 12)  # so a window that ends with the text is not
    assert looked_up(world, [*SHARED, 1], b"quarter") == (12, 12)  # others' windows
    assert looked_up(world, [*SHARED, 1], None) == (12, 12)  # opted out


def test_exact_wins_and_the_compressed_copy_ages_out() -> None:
    """Matching what is there twice touches the exact copy alone; LRU then takes the other."""
    world = World(page=4, seed=0)
    finished(world, SHARED, windows=1)
    finished(world, SHARED, windows=0, settings=None)
    assert looked_up(world, [*SHARED, 1]) == (24, 24)
    assert POOL - world.allocator.available_size() == 24 + 8  # the window and the page behind it
    world.evict(8)
    assert world.cache.evictable_size() == 24
    assert looked_up(world, [*SHARED, 1]) == (24, 24)
    world.evict(8)  # the exact answer, which is one node
    assert looked_up(world, [*SHARED, 1]) == (12, 12)


def test_twins_share_one_copy() -> None:
    """A second request with the same tokens and settings leaves nothing of its own behind."""
    world = World(page=4, seed=0)
    finished(world, SHARED, windows=1)
    free = world.allocator.available_size()
    finished(world, SHARED, windows=1)
    assert world.allocator.available_size() == free


def test_windows_that_were_chosen_differently_are_not_twins() -> None:
    """Of all heads and of their mean: both stay, and the first that was there is not passed off as the
    other. A third request may continue on either."""
    world = World(page=4, seed=0)
    for mark in ("all", "mean"):
        free = world.allocator.available_size()
        finished(world, SHARED, windows=1, mark=mark)
        assert free - world.allocator.available_size() == (20 if mark == "all" else 8)
    assert looked_up(world, [*SHARED, 1]) == (24, 20)


def test_a_window_behind_a_reused_one() -> None:
    """A continued text is compressed further on, and a third request continues that."""
    world = World(page=4, seed=0)
    finished(world, SHARED, windows=1)
    req = Request(50, (None, None), b"half", [*SHARED, 1, 2, 3])
    world.match(req)
    world.prefill(req)
    assert (req.prefix_len, req.kv.cache_protected_len, req.kv.kv_committed_len) == (24, 20, 23)
    req.full_untruncated_fill_ids.extend([1] * 12)
    assert world.grow(req, 35)
    world.write_row(req)
    req.kv.kv_committed_len = req.kv.kv_allocated_len = 35
    world.compress(req, gap=0)
    assert layout_of(req).windows[1] == Window(28, 24, 8, 4, "all")
    world.release(req, checkpoint=True)
    world.check()
    assert looked_up(world, [*req.tokens, 5]) == (36, 28)
    assert prefix_of(req).windows == ()


def test_a_gain_that_is_too_small_is_passed_over_and_noted() -> None:
    """Exact KV reaches 12 of these tokens, the compressed row 24; the loser is not touched."""
    world = World(page=4, seed=0)
    finished(world, SHARED, windows=1)
    for least, found, passed_over in ((12, (24, 20), 0), (13, (12, 12), 12), (100, (12, 12), 12)):
        world.cache.sharing_of = lambda req, n=least: Sharing(req.settings, n)
        req = Request(90, (None, None), b"half", [*SHARED, 1])
        for _ in range(2):  # asked again, it is the same text
            result = match_kv_cache(req, world.cache, req.full_untruncated_fill_ids, max_prefix_len=24)
            slots = req.prefix_len if result.cache_protected_len is None else result.cache_protected_len
            assert (req.prefix_len, slots) == found
            assert prefix_of(req).passed_over == passed_over


@pytest.mark.parametrize("device", range(0, 21, 2))
def test_what_lies_on_the_host_counts_slots_there_and_tokens_here(
    device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of 20 slots, of which SGLang finds the first on the device and as many as it likes behind
    them on the host, and loads those or none. Inside the window, which is slots 10 to 13, all falls
    back to its start."""
    world = World(page=2, seed=0)
    finished(world, SHARED, windows=1, settings=b"half of four")
    match_prefix = UnifiedRadixCache.match_prefix
    for host in range(0, 21 - device, 2):

        def elsewhere(cache: Any, params: Any, host: int = host) -> Any:
            result = match_prefix(cache, params)
            assert result.device_prefix_len == 20
            return result._replace(device_prefix_len=device, host_hit_length=host)

        def tokens(slots: int) -> int:
            return slots if slots <= 10 else 10 if slots < 14 else slots + 4

        monkeypatch.setattr(UnifiedRadixCache, "match_prefix", elsewhere)
        for loaded in {0, host}:
            req = Request(90, (None, None), b"half of four", [*SHARED, 1])
            match_kv_cache(req, world.cache, req.full_untruncated_fill_ids, max_prefix_len=24)
            assert req.prefix_len == tokens(device)
            assert req.prefix_len + req.host_hit_length == tokens(device + host)
            assert req.kv.cache_protected_len == min(device, 10) if device < 14 else device
            if req.host_hit_length:
                monkeypatch.setattr(
                    UnifiedRadixCache, "init_load_back", lambda *_, slots=loaded: (slots, "node")
                )
                params = InitLoadBackParams("node", req.host_hit_length, req=req)
                more, node = world.cache.init_load_back(params)
                assert (more, node) == (req.host_hit_length if loaded else 0, "node")
                req.prefix_len += more
            assert removed_of(req) == (4 if req.prefix_len >= 18 else 0)


def test_behind_window_layers_only_the_device_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load may fail, and the device's part might not end with the uncompressed slots they see."""
    world = World(page=4, seed=0)
    finished(world, SHARED, windows=1)
    key = RadixKey(array("q", SHARED[:12]))
    monkeypatch.setattr(world.cache, "cache_controller", object())
    asked = []
    look = world.cache.tree_core.match_prefix
    core = SimpleNamespace(
        match_prefix=lambda params: asked.append("host") or look(params),
        match_full_device_prefix=world.cache.tree_core.match_full_device_prefix,
    )
    monkeypatch.setattr(world.cache, "tree_core", core)
    for reach, looks in ((4, []), (0, ["host"])):
        world.cache.reach = reach
        assert world.cache._reach(key) == 12
        assert asked == looks
