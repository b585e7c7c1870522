"""The compressed prefix cache between a plain model of it and requests that come and go."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import match_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from kara_sglang.radix_integration.compressed import CompressedRadixCache
from kara_sglang.radix_integration.index import LayoutIndex
from kara_sglang.radix_integration.prefix import Sharing, forget_match, layout_of
from kara_sglang.radix_integration.row import STATE, Window, ceil_align

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
    def output_ids_through_stop(self) -> array[int]:
        """All that it has written: nothing stops it here but its end."""
        return self.full_untruncated_fill_ids[len(self.origin_input_ids) :]

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
        self.cache.sharing_of = lambda req: Sharing(req.settings) if req.settings else None
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
