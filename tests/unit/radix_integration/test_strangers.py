"""Ids that are no tokens stay out of the prefix cache."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
import torch
from prefixes import SHARED, VOCAB, Request, World, finished, looked_up
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.common import match_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixKey

from kara_sglang.radix_integration.keys import FIRST_ID, Text, physical_key, seed_of
from kara_sglang.radix_integration.row import Window, ceil_align

SEED = seed_of(b"half", None, None)


def forged(tokens: list[int], page: int) -> list[int]:
    """The physical key of ``tokens`` in pages of ``page``, as a client can compute it: a window from
    the first page border behind 9 tokens on."""
    start = ceil_align(9, page)
    window = Window(start, start, 2 * page, page, "all")
    return physical_key(Text(SEED, memoryview(array("q", tokens))), (window,)).tolist()


@pytest.mark.parametrize("page", [1, 4])
def test_a_forged_key_matches_nothing_and_stays_out(page: int) -> None:
    """Whoever knows a text can write its physical key. As a text of its own it finds nothing, leaves
    nothing behind, and who shares the text notices nothing: before and after the window is there."""
    world = World(page, seed=0)
    tail = [5] * (2 * page)
    text = forged(SHARED, page) + tail
    free = world.allocator.available_size()

    def attack() -> None:
        before = world.cache.all_values_flatten().tolist()
        req = Request(77, (None, None), b"half", text)
        world.match(req)
        assert (req.prefix_len, req.slots) == (0, [])
        req.lock = world.cache.lock(req.last_node)
        assert world.grow(req, len(text))
        req.kv.req_pool_idx = world.free_rows.pop()
        world.write_row(req)
        req.kv.kv_committed_len = req.kv.kv_allocated_len = len(text)
        for done, up_to in ((False, len(text) // 2), (False, len(text)), (True, len(text))):
            req.done = done
            world.cache.checkpoint(req, up_to=up_to)
        assert req.kv.cache_protected_len == 0
        world.allocator.free_segment(torch.tensor(req.slots), start_pos=0)
        world.cache.unlock(req.lock)
        world.free_rows.append(req.kv.req_pool_idx)
        assert world.cache.all_values_flatten().tolist() == before

    attack()  # nobody has written the window yet
    assert world.allocator.available_size() == free
    finished(world, SHARED, windows=1)
    honest = looked_up(world, [*SHARED, *tail, 1])
    assert honest == (24, 24 - page)
    attack()
    assert looked_up(world, [*SHARED, *tail, 1]) == honest
    world.check()


STRANGERS = [-1, -(2**63), VOCAB, 2**31, 2**32, FIRST_ID, 2 * FIRST_ID - 1, 2**63 - 1]


@pytest.mark.parametrize("ident", STRANGERS)
def test_one_stranger_bars_a_text(ident: int) -> None:
    """Negative, between the vocabulary and 2^32, a window's, and beyond."""
    world = World(page=1, seed=0)
    finished(world, SHARED, windows=0, settings=None)
    assert looked_up(world, [*SHARED, 1]) == (24, 24)
    assert looked_up(world, [*SHARED, ident, 1]) == (0, 0)
    assert looked_up(world, [*SHARED, VOCAB - 1, 1]) == (24, 24)


def test_a_waiting_text_with_a_stranger_touches_nothing() -> None:
    """SGLang walks the tree for those that wait: a forged key would split windows and keep them."""
    world = World(page=1, seed=0)
    finished(world, SHARED, windows=1)
    walked: list[RadixKey] = []
    world.cache.tree_core = SimpleNamespace(
        match_prefix=lambda params: walked.append(params.key) or SimpleNamespace(cache_actions=[])
    )
    world.cache.touch_prefix(RadixKey(array("q", forged(SHARED, 1))))
    assert walked == []
    world.cache.touch_prefix(RadixKey(array("q", SHARED)))
    assert len(walked) == 1


def test_images_are_no_strangers() -> None:
    """SGLang writes numbers of its own for the image of a request; they, and no other, may pass."""
    world = World(page=1, seed=0)
    image = MultimodalDataItem(modality=Modality.IMAGE)
    image.set_hash(1234)
    pads = image.padding_sequence(6)
    assert min(pads) > VOCAB
    for text, reuse in (([1, 2, *pads, 3, 4], 9), ([1, 2, *pads[:5], pads[5] + 1, 3, 4], 0)):
        req = Request(5, (None, None), None, text)
        req.multimodal_inputs = SimpleNamespace(mm_items=[image])
        req.kv.req_pool_idx, req.slots = 1, world.allocator.alloc(10).tolist()
        world.write_row(req)
        req.lock = world.cache.lock(world.cache.match_prefix(params_of(req)).last_device_node)
        world.cache.checkpoint(req, up_to=10)
        again = Request(6, (None, None), None, text)
        again.multimodal_inputs = req.multimodal_inputs
        assert (
            match_kv_cache(
                again, world.cache, again.full_untruncated_fill_ids, max_prefix_len=9
            ).device_prefix_len
            == reuse
        )


def params_of(req: Request) -> MatchPrefixParams:
    return MatchPrefixParams(key=RadixKey(req.full_untruncated_fill_ids), req=req)
