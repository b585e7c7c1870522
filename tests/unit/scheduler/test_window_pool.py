"""A pool of sliding-window layers, by SGLang's own pools, allocator and records."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GEMMA_3, GPT_OSS
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.common import free_kv_row_segments, free_swa_out_of_window_slots
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from swa_pools import swa_allocator, swa_pool

from kara_sglang.scheduler import window_pool

SIZE, PAGE, REACH = 512, 4, 9


def allocator() -> SWATokenToKVPoolAllocator:
    made = swa_allocator(swa_pool(SIZE, PAGE), PAGE)
    # SGLang checks then that each page of one pool is one of the other's (SGLANG_DEBUG_MEMORY_POOL).
    made.swa_attn_allocator.debug_mode = made.full_attn_allocator.debug_mode = True
    return made


class Row:
    """A request's row that grows, loses what SGLang's eviction takes, and what is cut out of it."""

    def __init__(self, prompt: int) -> None:
        self.allocator = allocator()
        self.table = torch.zeros(1, SIZE, dtype=torch.int32)
        self.kv = ReqKvInfo(req_pool_idx=0)
        self.tokens: list[int] = []  # which one each slot is for
        self.partner: dict[int, int] = {}  # of each token, when it came
        self.written = 0
        self.grow(prompt)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def grow(self, count: int) -> None:
        for _ in range(count):
            before, after = (torch.tensor([self.length + one]) for one in (0, 1))
            last = self.table[0, self.length - 1 :][:1] if self.length else torch.tensor([-1])
            [slot] = self.allocator.alloc_extend(before, before, after, after, last.long(), 1)
            self.table[0, self.length] = slot
            self.tokens.append(self.written)
            self.partner[self.written] = int(self.allocator.full_to_swa_index_mapping[slot])
            self.written += 1
        self.kv.kv_committed_len = self.kv.kv_allocated_len = self.length

    def evict(self) -> None:
        """What ``ScheduleBatch._evict_swa`` comes to."""
        free_swa_out_of_window_slots(
            SimpleNamespace(kv=self.kv),
            self.length,
            sliding_window_size=REACH,
            page_size=PAGE,
            req_to_token_pool=SimpleNamespace(req_to_token=self.table),
            token_to_kv_pool_allocator=self.allocator,
        )

    def cut(self, start: int, end: int) -> None:
        """As a pass does."""
        slots = self.table[0, start:end].clone()
        alone = window_pool.cut(self.kv, start, end)
        self.table[0, start : start + self.length - end] = self.table[0, end : self.length].clone()
        del self.tokens[start:end]
        self.kv.kv_committed_len = self.kv.kv_allocated_len = self.length
        self.allocator.free_group_begin()
        window_pool.free(self.allocator, slots, start, alone)
        self.allocator.free_group_end()

    def check(self) -> None:
        """Tokens below the cursor have no partner, others have their own; nobody else holds slots."""
        cursor = self.kv.get_evicted_seqlen(ComponentType.SWA)
        assert cursor % PAGE == 0 and cursor <= max(0, self.length - REACH)
        mapping = self.allocator.full_to_swa_index_mapping
        partners = mapping[self.table[0, : self.length].long()].tolist()
        expected = [0 if i < cursor else self.partner[token] for i, token in enumerate(self.tokens)]
        assert partners == expected
        pages, gone = -(-self.length // PAGE), cursor // PAGE
        assert self.allocator.full_available_size() == SIZE - pages * PAGE
        assert self.allocator.swa_available_size() == SIZE // 2 - (pages - gone) * PAGE
        pool = self.allocator.get_kvcache()
        window_pool.check_seen(pool, self.table[0], self.length, REACH)

    def end(self) -> None:
        """What SGLang does when the request gives its row back."""
        free_kv_row_segments(
            self.allocator,
            [(self.table[0, : self.length], 0)],
            swa_evicted_seqlen=self.kv.get_evicted_seqlen(ComponentType.SWA),
            swa_dead_lo=self.kv.swa_dead_lo(PAGE),
        )
        assert self.allocator.full_available_size() == SIZE
        assert self.allocator.swa_available_size() == SIZE // 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cut_rows_keep_their_partners(data: st.DataObject) -> None:
    """Whether SGLang has evicted nothing, a part or all of what is cut out."""
    row = Row(data.draw(st.integers(1, 40), "prompt"))
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        step = data.draw(st.sampled_from(("grow", "evict", "cut")))
        pages = (row.length - REACH) // PAGE  # a pass leaves what window layers see
        if step == "grow":
            row.grow(data.draw(st.integers(1, 20), "tokens"))
        elif step == "evict":
            row.evict()
        elif pages > 0:
            start = data.draw(st.integers(0, pages - 1), "start")
            row.cut(start * PAGE, data.draw(st.integers(start + 1, pages), "end") * PAGE)
        row.check()
    row.end()


def test_a_slot_that_is_seen_and_has_no_partner() -> None:
    row = Row(40)
    row.evict()
    pool, cursor = row.allocator.get_kvcache(), row.kv.get_evicted_seqlen(ComponentType.SWA)
    assert cursor == 28
    window_pool.check_seen(pool, row.table[0], row.length, row.length - cursor)
    with pytest.raises(RuntimeError, match="1 of the last 13 slots"):
        window_pool.check_seen(pool, row.table[0], row.length, row.length - cursor + 1)


def test_slots_are_those_of_the_layers_that_see_all() -> None:
    row = Row(40)
    cache = SimpleNamespace(full_evictable_size=lambda: 7, evictable_size=lambda: 3)
    scheduler: Any = SimpleNamespace(token_to_kv_pool_allocator=row.allocator, tree_cache=cache)
    assert window_pool.is_used(scheduler)
    assert window_pool.free_slots(scheduler) == SIZE - 40 > row.allocator.available_size()
    assert window_pool.evictable_slots(scheduler) == 7
    pool = row.allocator.get_kvcache()
    assert window_pool.full_pool(pool) is pool.full_kv_pool
    assert len(window_pool.full_pool(pool).k_buffer) == 2

    scheduler.token_to_kv_pool_allocator = SimpleNamespace(available_size=lambda: 5)
    assert not window_pool.is_used(scheduler)
    assert window_pool.free_slots(scheduler) == 5
    assert window_pool.evictable_slots(scheduler) == 3
    assert window_pool.full_pool(pool.full_kv_pool) is pool.full_kv_pool


def test_a_pool_is_known_by_its_layers() -> None:
    made = allocator()
    pool = made.get_kvcache()
    assert window_pool.is_known(pool, made, [1, 3])
    for layers in ([1], [3, 1], [0, 2], [0, 1, 2, 3]):
        assert not window_pool.is_known(pool, made, layers)
    made._swa_req_ring = True
    assert not window_pool.is_known(pool, made, [1, 3])


@pytest.mark.parametrize(
    ("config", "flags", "layers"),
    [
        (GPT_OSS, {}, 12 + 0.8 * 12),
        (GPT_OSS, {"swa_full_tokens_ratio": 0.5}, 12 + 0.5 * 12),
        (GEMMA_3, {}, 48),
    ],
    ids=["gpt-oss", "half", "gemma"],
)
def test_layers_of_a_slot(
    tmp_path: Path, config: dict[str, Any], flags: dict[str, Any], layers: float
) -> None:
    """By SGLang's own settings and ``ModelConfig``."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(str(tmp_path))
    assert model.is_hybrid_swa == (config is GPT_OSS)
    record = ServerArgs(model_path=str(tmp_path), device="cpu", **flags)
    assert window_pool.layers_per_slot(resolving_view(record), model) == pytest.approx(layers)
