"""Compressed prefixes in SGLang's real tree and allocators, against a dictionary of token tuples.

The dictionary knows every cached prefix by what it stands for: who may use it, its tokens, and how they
are cut into single pages and windows. It knows nothing of trees, physical keys, hashes or the index.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, ReqKvInfo
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import match_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from kara_sglang.radix_integration import keys
from kara_sglang.radix_integration.compressed import CompressedRadixCache
from kara_sglang.radix_integration.keys import FIRST_ID, Text, first_stranger, physical_key, seed_of
from kara_sglang.radix_integration.layout import (
    MOST_FOLLOWERS,
    MOST_STARTS,
    MOST_TRIES,
    Layout,
    LayoutIndex,
    tries_of_a_look,
)
from kara_sglang.radix_integration.prefix import forget_match, layout_of, prefix_of
from kara_sglang.radix_integration.row import STATE, VOTERS, Window, ceil_align

ROW = 200
POOL = 1200
ROWS = 4
VOCAB = 1000
# One request's settings -> window and kept tokens, in pages. None: exact KV only.
SETTINGS = {b"half": (2, 1), b"quarter": (4, 1), b"half of four": (4, 2)}

Who = tuple[str | None, str | None]  # extra_key, cache_salt
EVERYONE: list[Who] = [(None, None), (None, None), ("lora", None), (None, "salt")]
Tokens = tuple[int, ...]
Cuts = tuple[tuple[int, int, int, str], ...]  # windows: start, width, kept, mark
Chain = tuple[Who, Tokens, Cuts, bytes | None]  # settings: None without windows


class Request:
    """What the cache reads and writes of SGLang's ``Req``."""

    def __init__(self, rid: int, who: Who, settings: bytes | None, tokens: list[int]) -> None:
        self.rid = f"r{rid}"
        self.extra_key, self.cache_salt = who
        self.settings = settings
        self.origin_input_ids = array("q", tokens)
        self.full_untruncated_fill_ids = array("q", tokens)
        self.kv = ReqKvInfo()
        self.done = False
        self.prefix_len = 0
        self.lock: Any = None
        self.last_node: Any = None
        self.multimodal_inputs: Any = None
        self.priority = self.session = self.session_id = self.kv_rotation_base = None
        self.slots: list[int] = []  # of its row, kept beside it

    def finished(self) -> bool:
        return self.done

    def _compute_max_prefix_len(self, input_len: int) -> int:
        return max(0, input_len - 1)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self.full_untruncated_fill_ids)

    @property
    def who(self) -> Who:
        return self.extra_key, self.cache_salt


@dataclass
class Model:
    """Cached prefixes: who, tokens, windows, their settings -> slots of the last page or window."""

    page: int
    known: dict[Chain, list[int]] = field(default_factory=dict)
    # Windows and settings of what is cached for some tokens.
    cuts: dict[tuple[Who, Tokens], set[tuple[Cuts, bytes | None]]] = field(default_factory=dict)

    def chains(self, req: Request, windows: tuple[Window, ...], length: int) -> Iterator[Chain]:
        """All prefixes of a text's first ``length`` tokens that end at a page's or window's border."""
        starts = {window.logical_start: window for window in windows}
        at, cuts = 0, ()
        while True:
            window = starts.get(at)
            if window is not None:
                cuts = (*cuts, (at, window.width, window.kept, window.mark))
            at += window.width if window is not None else self.page
            if at > length:
                return
            yield req.who, req.tokens[:at], cuts, req.settings if cuts else None

    def front(self, chain: Chain) -> Chain:
        """The chain without its last page or window."""
        who, tokens, cuts, settings = chain
        start = len(tokens) - self.page
        if cuts and cuts[-1][0] + cuts[-1][1] == len(tokens):
            start, cuts = cuts[-1][0], cuts[:-1]
        return who, tokens[:start], cuts, settings if cuts else None

    def slots(self, chain: Chain) -> list[int]:
        """Slots of a whole chain, in order; KeyError where a part of it is not cached."""
        parts = []
        while chain[1]:
            parts.append(self.known[chain])
            chain = self.front(chain)
        return [slot for part in reversed(parts) for slot in part]

    def insert(self, chains: Iterable[Chain], slots: list[int]) -> list[int]:
        """Put a row in; returns the slots that its text has in the cache now."""
        at, now = 0, []
        for chain in chains:
            _, tokens, cuts, settings = chain
            is_window = cuts and cuts[-1][0] + cuts[-1][1] == len(tokens)
            end = at + (cuts[-1][2] if is_window else self.page)
            now += self.known.setdefault(chain, slots[at:end])
            self.cuts.setdefault(chain[:2], set()).add((cuts, settings))
            at = end
        return now

    def longest(self, req: Request, limit: int) -> list[Chain]:
        """What covers most of the request's first tokens; the exact one alone where there is one."""
        for end in range(limit // self.page * self.page, 0, -self.page):
            key = req.who, req.tokens[:end]
            found = self.cuts.get(key, ())
            usable = [one for one in found if one[1] is None or one[1] == req.settings]
            if exact := [one for one in usable if one[1] is None]:
                usable = exact
            if usable:
                return [(*key, *one) for one in usable]
        return []

    def evict(self, gone: set[int]) -> None:
        """Forget what was freed: whole pages and whole windows."""
        for chain, slots in list(self.known.items()):
            if gone & set(slots):
                assert gone >= set(slots), "half a part was evicted"
                del self.known[chain]
                self.cuts[chain[:2]].remove(chain[2:])

    def check(self) -> None:
        """Nothing was evicted in front of something that stays."""
        for chain in self.known:
            front = self.front(chain)
            assert front in self.known or not front[1], "a front part was evicted"

    def clear(self) -> None:
        self.known.clear()
        self.cuts.clear()

    def all_slots(self) -> list[int]:
        return [slot for slots in self.known.values() for slot in slots]


class World:
    """Requests that come, grow, are compressed, share, and go, on a small pool."""

    def __init__(self, page: int, seed: int, capacity: int = 10_000) -> None:
        self.random = Random(seed)
        self.page = page
        rows = ReqToTokenPool(size=ROWS, max_context_len=ROW, device="cpu", enable_memory_saver=False)
        kind = (torch.float32, "cpu", SimpleNamespace(), False)
        self.allocator = (
            TokenToKVPoolAllocator(POOL, *kind)
            if page == 1
            else PagedTokenToKVPoolAllocator(POOL, page, *kind)
        )
        self.cache = CompressedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=page,
                tree_components=(ComponentType.FULL,),
            )
        )
        self.cache.settings_of = lambda req: req.settings
        self.cache.vocab_size = VOCAB
        self.cache.layouts = LayoutIndex(capacity)
        self.cache.debug_checks = True
        self.complete = capacity > 1000  # the index forgets nothing
        self.model = Model(page)
        self.rows = rows.req_to_token
        self.free_rows = list(range(1, ROWS + 1))
        self.live: list[Request] = []
        # With the windows in which they were left.
        self.texts: list[tuple[Who, tuple[int, ...], bytes | None, tuple[Window, ...]]] = []
        self.arrived = 0
        self.seen: Counter[str] = Counter()

    # -- what happens ------------------------------------------------------------------------------

    def text(self) -> tuple[Who, list[int], bytes | None]:
        """A text that continues, forks from, or has nothing to do with an earlier one."""
        random = self.random
        fresh = [random.randrange(3) for _ in range(random.randrange(1, 6 * self.page + 2))]
        if not self.texts or random.random() < 0.1:
            return random.choice(EVERYONE), fresh, random.choice([*SETTINGS, None])
        who, old, settings, windows = random.choice(self.texts[-20:])
        if random.random() < 0.1:
            who = random.choice(EVERYONE)
        if random.random() < 0.3:
            settings = random.choice([*SETTINGS, None])
        cut = len(old) if random.random() < 0.5 else random.randrange(len(old) + 1)
        if windows and random.random() < 0.1:
            window = random.choice(windows)
            cut = window.logical_start + random.choice([0, window.width])
        for window in windows:
            where = cut - window.logical_start
            if cut < len(old) and old[cut] != fresh[0] and 0 <= where <= window.width:
                at = {0: "at a window", window.width: "behind a window"}
                self.seen[f"leaves {at.get(where, 'inside a window')}"] += 1
        return who, [*old[:cut], *fresh][: ROW // 2], settings

    def arrive(self) -> None:
        who, tokens, settings = self.text()
        self.arrived += 1
        req = Request(self.arrived, who, settings, tokens)
        self.match(req)
        if self.random.random() < 0.3 or not self.free_rows:
            return  # it only looked
        self.prefill(req)

    def match(self, req: Request) -> None:
        """As ``Req.init_next_round_input`` does; compares reach, order of preference and slots."""
        limit = len(req.tokens) - 1
        result = match_kv_cache(req, self.cache, req.full_untruncated_fill_ids, max_prefix_len=limit)
        if result.cache_protected_len is None:
            req.kv.cache_protected_len = req.prefix_len
        layout = layout_of(req)
        assert req.prefix_len - layout.removed == req.kv.cache_protected_len
        layout.check(self.page)
        slots = self.cache.prefix_device_indices(req).tolist() if req.prefix_len else []
        cuts = tuple((one.logical_start, one.width, one.kept, one.mark) for one in layout.windows)
        found: Chain = (req.who, req.tokens[: req.prefix_len], cuts, req.settings if cuts else None)
        assert slots == self.model.slots(found)
        strangers = any(not 0 <= ident < VOCAB for ident in req.tokens[:limit])
        best = [] if strangers else self.model.longest(req, limit)
        if self.complete or not cuts:
            assert found in best or not self.complete or found[1] == () == tuple(best)
        if best and best[0][1] == found[1]:
            assert found in best, "exact KV must win a tie"
        if req.settings is None:
            assert not cuts
        self.seen["compressed" if layout.windows else "exact" if slots else "miss"] += 1
        req.slots = slots

    def prefill(self, req: Request) -> None:
        req.lock = self.cache.lock(req.last_node)
        layout = layout_of(req)
        length = len(req.tokens) - layout.removed
        if not self.grow(req, length):
            self.cache.unlock(req.lock)
            req.lock = None
            return
        req.kv.req_pool_idx = self.free_rows.pop()
        self.write_row(req)
        req.kv.kv_committed_len = req.kv.kv_allocated_len = length
        self.live.append(req)
        self.checkpoint(req, len(req.tokens))
        state = SimpleNamespace(
            windows=list(layout.windows),
            removed=layout.removed,
            base=ceil_align(max(length, req.kv.cache_protected_len), self.page),
        )
        setattr(req, STATE, state)

    def grow(self, req: Request, length: int) -> bool:
        """Give the row slots for ``length`` entries; False where the pool is too small."""
        while len(req.slots) < length:
            if self.allocator.available_size() < self.page:
                self.evict(self.page)
            if self.allocator.available_size() < self.page:
                assert self.cache.evictable_size() == 0
                protected = req.kv.cache_protected_len
                if own := req.slots[protected:]:
                    self.allocator.free_segment(torch.tensor(own), start_pos=protected)
                    req.slots = req.slots[:protected]
                return False
            req.slots += self.allocator.alloc(self.page).tolist()
        return True

    def write_row(self, req: Request) -> None:
        self.rows[req.kv.req_pool_idx, : len(req.slots)] = torch.tensor(req.slots, dtype=torch.int32)

    def decode(self, req: Request, count: int) -> None:
        held = req.kv.kv_committed_len
        if len(req.tokens) + count > ROW:
            return
        before = list(req.slots)
        if not self.grow(req, held + count):
            req.slots = []
            self.release(req, checkpoint=False, own=before)
            return
        self.write_row(req)
        req.full_untruncated_fill_ids.extend(self.random.randrange(3) for _ in range(count))
        req.kv.kv_committed_len = req.kv.kv_allocated_len = held + count

    def compress(self, req: Request, gap: int, mark: str = "all") -> None:
        """A pass over one window, ``gap`` pages behind the base."""
        if req.settings is None:
            return
        state = getattr(req, STATE)
        width, kept = (self.page * pages for pages in SETTINGS[req.settings])
        base = state.base + self.page * gap
        if req.kv.kv_committed_len < base + width:
            return
        state.windows.append(Window(base + state.removed, base, width, kept, mark))
        state.removed += width - kept
        state.base = base + kept
        freed = req.slots[base + kept : base + width]
        self.allocator.free_segment(torch.tensor(freed), start_pos=base + kept)
        req.slots[base + kept : base + width] = []
        self.write_row(req)
        req.kv.kv_committed_len -= width - kept
        req.kv.kv_allocated_len -= width - kept
        self.seen["window"] += 1

    def checkpoint(self, req: Request, up_to: int) -> None:
        layout = layout_of(req)
        before = (req.tokens, tuple(req.origin_input_ids))
        length = layout.tokens(up_to) if req.done else up_to
        expected = self.model.insert(self.model.chains(req, layout.windows, length), req.slots)
        self.cache.checkpoint(req, up_to=up_to)
        assert (req.tokens, tuple(req.origin_input_ids)) == before
        assert req.kv.cache_protected_len == len(expected)
        assert self.rows[req.kv.req_pool_idx, : len(expected)].tolist() == expected
        req.slots[: len(expected)] = expected

    def release(self, req: Request, *, checkpoint: bool, own: list[int] | None = None) -> None:
        """``mem_cache/common.py``, ``release_kv_cache``."""
        kv = req.kv
        if own is not None:  # growing failed half-way and gave its slots back
            self.free_rows.append(kv.req_pool_idx)
        elif checkpoint:
            req.done = True
            self.checkpoint(req, kv.kv_committed_len)
        if own is None:
            self.cache.free_kv_row(kv, [(kv.cache_protected_len, kv.kv_committed_len)])
            self.free_rows.append(kv.req_pool_idx)
        self.cache.unlock(req.lock)
        self.live.remove(req)
        if checkpoint:
            self.texts.append((req.who, req.tokens, req.settings, layout_of(req).windows))
        forget_match(req)

    def evict(self, count: int) -> None:
        before = set(self.model.all_slots())
        evictable = self.cache.evictable_size()
        free = self.allocator.available_size()
        locked = {slot for req in self.live for slot in req.slots[: req.kv.cache_protected_len]}
        self.cache.evict(EvictParams(num_tokens=count))
        freed = self.allocator.available_size() - free
        self.seen["evicted"] += freed > 0
        assert freed >= min(count, evictable)
        left = set(self.cache.all_values_flatten().tolist())
        gone = before - left
        assert len(gone) == freed and not gone & locked
        self.model.evict(gone)

    def flush(self) -> None:
        for req in list(self.live):
            self.release(req, checkpoint=self.random.random() < 0.5)
        self.seen["flush"] += 1
        self.cache.reset()
        self.allocator.clear()
        self.model.clear()
        assert self.allocator.available_size() == POOL and self.cache.layouts.num_windows == 0

    # -- what must hold ----------------------------------------------------------------------------

    def check(self) -> None:
        """The pool's arithmetic, and that the tree holds the dictionary's slots and no other."""
        held = sum(
            ceil_align(req.kv.kv_allocated_len, self.page) - req.kv.cache_protected_len
            for req in self.live
        )
        cached = self.cache.evictable_size() + self.cache.protected_size()
        assert self.allocator.available_size() + cached + held == POOL
        self.model.check()
        slots = self.model.all_slots()
        assert len(slots) == cached == len(set(slots))
        assert set(slots) == set(self.cache.all_values_flatten().tolist())
        own = [slot for req in self.live for slot in req.slots[req.kv.cache_protected_len :]]
        assert len(own) == len(set(own)) and not set(own) & set(slots)

    def step(self) -> None:
        random = self.random
        dice = random.random()
        if dice < 0.35:
            self.arrive()
        elif dice < 0.85 and self.live:
            req = random.choice(self.live)
            self.decode(req, random.randrange(1, 5 * self.page + 2))
            if req in self.live and random.random() < 0.7:
                mark = "mean" if random.random() < 0.1 else "all"
                self.compress(req, gap=random.choice([0, 0, 0, 0, 1]), mark=mark)
        elif dice < 0.97 and self.live:
            self.release(random.choice(self.live), checkpoint=random.random() < 0.8)
        elif dice < 0.999:
            self.evict(random.randrange(1, 8 * self.page))
        else:
            self.flush()


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("block", range(2))
def test_tree_and_index_are_the_dictionary(page: int, block: int) -> None:
    """Matches reach as far as any cached prefix does, with the slots that were put there for those
    tokens; exact KV wins ties; nothing locked is evicted; the pool's arithmetic holds."""
    world = World(page, seed=1000 * page + block)
    for count in range(5000):
        world.step()
        if count % 10 == 0:
            world.check()
    world.flush()
    seen = world.seen
    assert min(seen[kind] for kind in ("compressed", "exact", "window", "evicted")) > 100, seen
    assert min(seen[f"leaves {where} a window"] for where in ("inside", "at", "behind")) > 10, seen
    assert seen["flush"] > 1, seen


def test_a_forgetful_index_costs_misses_only() -> None:
    """Eight windows, one layout for a text: whatever is matched is right all the same."""
    world = World(page=4, seed=7, capacity=8)
    for _ in range(5000):
        world.step()
        assert world.cache.layouts.num_windows <= 8
    world.check()
    world.flush()
    assert world.seen["compressed"] > 20


# -- single cases, on the same world -------------------------------------------------------------------

SHARED = [index % 7 for index in range(24)]  # six pages


def finished(
    world: World,
    tokens: list[int],
    windows: int,
    settings: bytes | None = b"half",
    mark: str = "all",
) -> Request:
    """A request whose answer of ``len(tokens) - 9`` tokens is compressed from page 3 on, and done."""
    req = Request(len(world.texts), (None, None), settings, tokens[:9])
    world.match(req)
    world.prefill(req)
    req.full_untruncated_fill_ids.extend(tokens[len(req.tokens) :])
    assert world.grow(req, len(tokens) - layout_of(req).removed)
    world.write_row(req)
    req.kv.kv_committed_len = req.kv.kv_allocated_len = len(tokens) - layout_of(req).removed
    for _ in range(windows):
        world.compress(req, gap=0, mark=mark)
    world.release(req, checkpoint=True)
    world.check()
    return req


def looked_up(world: World, tokens: list[int], settings: bytes | None = b"half") -> tuple[int, int]:
    """Tokens and slots of the cached prefix that a new request with ``tokens`` finds."""
    req = Request(99, (None, None), settings, tokens)
    world.match(req)
    return req.prefix_len, len(req.slots)


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


# -- ids that are no tokens ----------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    "ids,index",
    [([], None), ([0, VOCAB - 1], None), ([0, VOCAB], 1), ([-1, -1], 0), ([3, 2**62, -4], 1)],
)
def test_the_first_stranger(ids: list[int], index: int | None) -> None:
    assert first_stranger(array("q", ids), VOCAB) == index


# -- the interval map and the keys ---------------------------------------------------------------------


def test_the_interval_map_against_a_list() -> None:
    """Every token and slot of random layouts, counted one by one."""
    random = Random(3)
    for _ in range(200):
        page = random.choice([1, 4])
        windows, at, removed = [], 0, 0
        for _ in range(random.randrange(4)):
            at += page * random.randrange(3)
            width = page * random.randrange(2, 5)
            kept = page * random.randrange(1, width // page)
            windows.append(Window(at, at - removed, width, kept))
            at += width
            removed += width - kept
        layout = Layout(tuple(windows))
        layout.check(page)
        total = at + 3 * page
        # The token at whose border each slot border lies; None inside a window.
        border: list[int | None] = [0]
        token = 0
        while token < total:
            window = next((one for one in windows if one.logical_start == token), None)
            if window is None:
                token += 1
                border.append(token)
            else:
                token += window.width
                border += [None] * (window.kept - 1) + [token]
        starts = {one.kv_start: one for one in windows}
        last = 0
        for slots, tokens in enumerate(border):
            last = slots if tokens is not None else last
            assert layout.tokens(slots) == border[last]
            if tokens is not None:
                assert layout.slots(tokens) == slots
            assert last in starts or tokens is not None
        assert layout.removed == total - len(border) + 1
        for tokens in range(total):
            inside = [one for one in windows if 0 < tokens - one.logical_start < one.width]
            if inside:
                assert layout.slots(tokens) == inside[0].kv_start
            whole = [one for one in windows if one.logical_start + one.width <= tokens]
            assert layout.within(tokens).windows == tuple(whole)


@pytest.mark.parametrize(
    "window",
    [
        Window(8, 8, 8, 8),  # nothing was removed
        Window(8, 8, 8, 0),
        Window(9, 9, 8, 4),
        Window(8, 8, 6, 4),
        Window(8, 4, 8, 4),  # its slots do not follow from the windows before
    ],
)
def test_a_broken_map_is_noticed(window: Window) -> None:
    with pytest.raises(RuntimeError, match=r"^kv-compress: "):
        Layout((window,)).check(4)
    with pytest.raises(RuntimeError, match="does not continue"):
        Layout((Window(8, 8, 8, 4), Window(12, 8, 8, 4))).check(4)


def test_keys_are_tokens_and_ids_that_no_token_has() -> None:
    """One id per slot; the ids of a window say everything up to its end and nothing behind it."""
    tokens = list(range(100, 140))
    windows = (Window(8, 8, 8, 4), Window(20, 16, 8, 4))
    seed = seed_of(b"settings", "lora", "salt")

    def key(ids: list[int] = tokens, start: bytes = seed, cut: tuple = windows) -> list[int]:
        return physical_key(Text(start, memoryview(array("q", ids))), cut).tolist()

    one = key()
    assert len(one) == 40 - 8
    assert one[:8] == tokens[:8] and one[12:16] == tokens[16:20] and one[20:] == tokens[28:]
    drawn = one[8:12] + one[16:20]
    assert all(FIRST_ID <= ident < 2 * FIRST_ID for ident in drawn) and len(set(drawn)) == 8
    # The same in every process and on every rank.
    assert one[8] == 1305857510282797703
    for position, first_changed in ((3, 8), (15, 8), (17, 13), (27, 16), (30, 22)):
        other = key([*tokens[:position], 7, *tokens[position + 1 :]])
        differs = [index for index in range(32) if other[index] != one[index]]
        assert {8, 9, 10, 11} <= set(differs) or position > 15
        assert {16, 17, 18, 19} <= set(differs) or position > 27
        assert min(index for index in differs if index >= 8) == first_changed
    for start in (
        seed_of(b"other", "lora", "salt"),
        seed_of(b"settings", None, "salt"),
        seed_of(b"settings", "lora", None),
        seed_of(b"settings", "salt", "lora"),
    ):
        assert not set(key(start=start)[8:12]) & set(drawn)
    assert key(cut=(Window(8, 8, 8, 5), Window(20, 17, 8, 4)))[8:12] != one[8:12]
    chosen_by = [key(cut=(Window(8, 8, 8, 4, mark), windows[1])) for mark in (*VOTERS, "seed 1")]
    assert all(other[:8] == one[:8] and other[20:] == one[20:] for other in chosen_by)
    assert len({ident for other in (one, *chosen_by) for ident in other[8:12] + other[16:20]}) == 5 * 8
    assert seed_of(b"x", None, "") == seed_of(b"x", None, None)


# -- the index by itself -------------------------------------------------------------------------------


class Rows:
    """The tree, as far as the index asks it: physical keys, and which part of one it holds."""

    def __init__(self) -> None:
        self.keys: list[array] = []
        self.asked: list[int] = []  # lengths

    def put(self, text: list[int], layout: Layout) -> None:
        self.keys.append(physical_key(text_of(text), layout.windows))

    def __call__(self, ids: array) -> int:
        self.asked.append(len(ids))
        common = (
            next((i for i, (a, b) in enumerate(zip(ids, key, strict=False)) if a != b), None)
            for key in self.keys
        )
        lengths = [
            min(len(ids), len(key)) if differs is None else differs
            for differs, key in zip(common, self.keys, strict=True)
        ]
        return max(lengths, default=0)


def text_of(tokens: list[int]) -> Text:
    return Text(b"seed", memoryview(array("q", tokens)))


def windows_from(start: int, *gaps: int, width: int = 8, kept: int = 4) -> Layout:
    """A window at ``start``, and one behind each gap."""
    windows, removed = [], 0
    for gap in (0, *gaps):
        start += gap
        windows.append(Window(start, start - removed, width, kept, "all"))
        start, removed = start + width, removed + width - kept
    return Layout(tuple(windows))


def search(index: LayoutIndex, rows: Rows, text: list[int], exact: int) -> int:
    """How far the index leads, in tokens; 0 where no further than exact KV does."""
    found = index.longest(b"seed", memoryview(array("q", text)), exact, rows)
    if found is None:
        return 0
    layout, ids = found
    assert rows(ids) == len(ids)
    return layout.tokens(len(ids))


def test_forks_of_different_length_are_all_found() -> None:
    """Each goes on behind one chain with windows of its own; the next step of each must find them."""
    stem, index, rows = list(range(3, 103)), LayoutIndex(), Rows()
    forks = []
    for n in range(16):
        text = [*stem[: 30 + 4 * n], *([1000 + n] * 40)]
        layout = windows_from(16, 10 + 4 * n, 0, 3)
        index.add(b"seed", memoryview(array("q", text)), layout)
        rows.put(text, layout)
        forks.append(text)
    for text in forks:
        assert search(index, rows, [*text, 5, 5], 16) == len(text)
    assert search(index, rows, [*stem[:50], 5], 16) == 50


def test_the_clean_part_behind_a_window_counts() -> None:
    """Two rows share their first window; one is compressed behind it, the other goes on without."""
    text, index, rows = list(range(3, 103)), LayoutIndex(), Rows()
    for length, layout in ((50, windows_from(16, 2, 2)), (90, windows_from(16))):
        index.add(b"seed", memoryview(array("q", text[:length])), layout)
        rows.put(text[:length], layout)
    assert search(index, rows, [*text, 5], 16) == 90
    assert search(index, rows, [*text[:48], 5], 16) == 48


def test_what_is_gone_is_not_looked_for_again_until_it_is_back() -> None:
    """A search notes what the tree has lost, and the same row is found when it is there again."""
    text, index, rows = list(range(3, 203)), LayoutIndex(), Rows()
    layout = windows_from(16, 2, 2, 2)
    index.add(b"seed", memoryview(array("q", text)), layout)
    assert search(index, rows, text, 100) == 0
    asked = len(rows.asked)
    assert asked and search(index, rows, text, 100) == 0 and len(rows.asked) == asked
    rows.put(text, layout)
    index.add(b"seed", memoryview(array("q", text)), layout)
    assert search(index, rows, text, 100) == len(text)


def test_the_oldest_goes_first_and_never_before_what_continues_it() -> None:
    """Eight beginnings: of three rows of three windows the last two stay, all of the first is gone."""
    index, rows, texts = LayoutIndex(capacity=8), Rows(), []
    for n in range(3):
        text = [n] * 60
        layout = windows_from(16 + n, 2, 2)
        index.add(b"seed", memoryview(array("q", text)), layout)
        rows.put(text, layout)
        texts.append(text)
        assert index.num_windows == min(4 * (n + 1), 8)
    assert [search(index, rows, text, 20) for text in texts] == [0, 60, 60]
    assert search(index, rows, texts[1], 20) == 60  # used: now the other one is older
    index.add(b"seed", memoryview(array("q", texts[0])), windows_from(16))
    assert [search(index, rows, text, 20) for text in texts] == [26, 60, 28]
    for n in range(50):
        index.add(b"other", memoryview(array("q", [9, n] * 30)), windows_from(n))
    assert set(index._starts) == {b"other"} and len(index._starts[b"other"]) == 4


def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts, from here on, tokens that are hashed and windows that are tried."""
    counts: Counter[str] = Counter()
    real, window_digest = keys.hashlib.blake2b, Text.window_digest

    class Hash:
        def __init__(self, data: bytes = b"", digest_size: int = 16, state: Any = None) -> None:
            self.state = state or real(data, digest_size=digest_size)

        def update(self, data: memoryview) -> None:
            counts["tokens"] += len(data)
            self.state.update(data)

        def copy(self) -> Hash:
            return Hash(state=self.state.copy())

        def digest(self) -> bytes:
            return self.state.digest()

    def tried(text: Text, front: bytes, window: Window) -> bytes:
        counts["tries"] += 1
        return window_digest(text, front, window)

    monkeypatch.setattr(keys, "hashlib", SimpleNamespace(blake2b=Hash))
    monkeypatch.setattr(Text, "window_digest", tried)
    return counts


LONG = [index * 7919 % 9973 for index in range(20_000)]
# Layouts of one text, and how far each is in the tree; 16,000 tokens of it are there exactly.
CROWDS: dict[str, list[tuple[Layout, int]]] = {
    "no row is left": [
        (windows_from(64 + 16 * n, *[8 * m] * 60), 0) for n in range(40) for m in range(9)
    ],
    "first windows are left": [
        (windows_from(64 + 16 * n, *[8 * m] * 60), 72 + 16 * n) for n in range(40) for m in range(9)
    ],
    "halves are left": [(windows_from(64 + n, *[n % 7] * 200), 1500) for n in range(60)],
    "many beginnings": [(windows_from(1 + n), 0) for n in range(15_000)],
    "many followers": [(windows_from(64, n), 72) for n in range(5_000)],
    "beginnings far behind": [(windows_from(15_000 + n), 0) for n in range(500)],
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_the_work_of_a_search_is_bounded(crowd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other clients have left behind, it runs in the scheduler: the text is hashed once, and a
    bounded number of windows are tried and rows looked at."""
    index = LayoutIndex()
    tokens = memoryview(array("q", LONG))
    rows = Rows()
    for layout, end in CROWDS[crowd]:
        index.add(b"seed", tokens, layout)
        if end:
            rows.put(LONG[:end], layout.within(end))
    mine = windows_from(40, *[0] * 2400)
    index.add(b"seed", tokens, mine)
    rows.put(LONG, mine)
    counts = hashed(monkeypatch)
    reached = 0
    for _ in range(12):
        rows.asked.clear()
        counts.clear()
        reached = max(reached, search(index, rows, [*LONG, 1], 16_000))
        digests = MOST_STARTS + counts["tries"]
        assert counts["tokens"] <= len(LONG) + 2 + keys._STRIDE * digests
        # One opening may pass the bound by as many as it has followers.
        assert counts["tries"] <= MOST_TRIES + len(LONG) // 8 + 2 * MOST_FOLLOWERS
        assert sum(map(tries_of_a_look, rows.asked)) <= MOST_TRIES + len(LONG) // 8 + 50
    # What a search finds gone is out of the way of the next ones. Only the longest beginnings are
    # looked at; one's own is, as a rule, as long as what is there exactly.
    far = crowd in ("many beginnings", "beginnings far behind")
    assert reached == (0 if far else len(LONG))
