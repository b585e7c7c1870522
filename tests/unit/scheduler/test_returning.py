"""Rows of retracted requests: what is copied, what comes back, and what must not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import Request, Setting
from world import World, advance, one_request

from kara_sglang.config import KaraConfig
from kara_sglang.radix_integration.prefix import prefix_of
from kara_sglang.scheduler import window_pool
from kara_sglang.scheduler.host_rows import HostRows
from kara_sglang.scheduler.pace import Pace
from kara_sglang.scheduler.returning import retracted_of


def running(**config: Any) -> tuple[World, Request]:
    """A request with windows of 8 behind 5 tokens, and all that it has written so far."""
    world, req = one_request(**config)
    for _ in range(40):
        world.before_decode()
        world.decode([req])
        req.output_ids.append(7)
    assert len(req.windows) == 4
    return world, req


def copy_of(req: Request) -> Any:
    back = retracted_of(req)
    return None if back is None else back.copy


def test_a_row_goes_on_where_it_was() -> None:
    world, req = running()
    windows, state = req.windows, req.state
    world.retract(req)
    assert copy_of(req).slots == 5 + 40 - 4 * 4
    world.queue.remove(req)
    assert world.prefill(req)
    totals = world.coordinator.totals
    assert totals.retracted_tokens_returned == 45
    advance(world, 9)
    assert req.state is state and req.windows[:4] == windows and len(req.windows) == 5
    assert retracted_of(req) is None and prefix_of(req).returned is None


def test_a_row_that_is_back_may_go_again_before_it_decodes() -> None:
    world, req = running()
    windows, never = req.windows, req.never_inserts
    for _ in range(2):
        world.retract(req)
        assert copy_of(req) is not None and retracted_of(req).insert_skipped == never
        world.queue.remove(req)
        assert world.prefill(req)
    advance(world, 2)
    assert req.windows[:4] == windows
    world.check_contents()


def test_what_was_in_flight_is_no_part_of_it() -> None:
    """With overlap scheduling the row holds a token whose output is dropped: one is computed."""
    world, req = running()
    req.output_ids.pop()
    world.retract(req)
    assert copy_of(req).tokens == 5 + 40 - 1


def test_without_host_memory_the_output_is_compressed_again() -> None:
    world, req = running(retracted_mem_gb=0)
    world.retract(req)
    assert copy_of(req) is None and req.skip_radix_cache_insert
    assert world.coordinator.returning.to_hold(req) == (46, 5)
    world.queue.remove(req)
    assert world.prefill(req)
    assert req.skip_radix_cache_insert, "until its prefill has been published"
    advance(world, 2)
    assert [window.mark for window in req.windows] == ["none"] * 5, "nobody recorded them"
    assert world.coordinator.totals.retracted_tokens_returned == 0


def test_beside_a_pool_of_window_layers_all_is_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prefill that is kept out of the prefix cache would hold slots there that nobody counts."""
    world, req = running()
    monkeypatch.setattr(window_pool, "is_used", lambda _scheduler: True)
    assert req.skip_radix_cache_insert and not world.coordinator.returning.allowed
    world.coordinator.forget(req)
    assert retracted_of(req) is None and not req.skip_radix_cache_insert
    assert world.coordinator.returning.to_hold(req) == (46, 46)


def test_a_bound_on_host_memory_counts_who_waits() -> None:
    world, req = running()
    returning = world.coordinator.returning
    returning.most_bytes = returning._rows.block_bytes
    world.retract(req)
    assert len(copy_of(req).blocks) == 1
    other = Request(1, [9, 9], 10_000, None)
    assert world.prefill(other)
    advance(world, 3)
    world.retract(other)
    assert copy_of(other) is None, "full"
    world.queue.clear()  # both are aborted
    world.coordinator.returning.step()
    last = Request(2, [8, 8], 10_000, None)
    assert world.prefill(last)
    advance(world, 3)
    world.retract(last)
    assert copy_of(last) is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("return_hidden_states", True),
        ("session", object()),
        ("input_embeds", [[0.5]]),
        ("return_logprob", True),
    ],
)
def test_requests_of_which_sglang_wants_a_whole_prefill(field: str, value: Any) -> None:
    world, req = running()
    setattr(req, field, value)
    req.logprob = SimpleNamespace(input_token_logprobs_val=None)
    world.retract(req)
    assert retracted_of(req) is not None and copy_of(req) is None


def test_logprobs_of_the_prompt_are_not_asked_twice() -> None:
    world, req = running()
    req.return_logprob, req.logprob = True, SimpleNamespace(input_token_logprobs_val=[None])
    world.retract(req)
    assert copy_of(req) is not None


@pytest.mark.parametrize("change", ["drafts", "decode server", "no prefix cache"])
def test_servers_on_which_nothing_comes_back(change: str) -> None:
    world, req = running()
    scheduler, returning = world.scheduler, world.coordinator.returning
    assert returning.allowed
    if change == "drafts":
        returning.pace = Pace(tokens=4)
    elif change == "decode server":
        scheduler.disagg_decode_prealloc_queue = object()
    else:
        scheduler.tree_cache.disable = True
    world.coordinator.returning.keep(req)
    assert not returning.allowed and returning._kept is None


def test_kv_that_is_void_does_not_come_back() -> None:
    """A server that is paused, or flushed, may get other weights."""
    world, req = running()
    world.retract(req)
    world.coordinator.returning.drop_all()
    assert copy_of(req) is None and not prefix_of(req).waits
    assert world.coordinator.returning.offer(req) is None


def test_ranks_of_which_one_has_no_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them compute the row again, or none."""
    world, req = running()
    ranks, asked = SimpleNamespace(world_size=2, rank_in_group=0, cpu_group="the CPU group"), []
    world.scheduler.attn_tp_group = ranks

    def least(mine: torch.Tensor, *, op: Any, group: Any) -> None:
        assert (op, group) == (torch.distributed.ReduceOp.MIN, ranks.cpu_group)
        asked.append(int(mine))
        mine.fill_(0)

    monkeypatch.setattr(torch.distributed, "all_reduce", least)
    returning = world.coordinator.returning
    returning.keep(req)
    assert returning._kept is None
    monkeypatch.setattr(HostRows, "take", lambda *_: None)
    returning.keep(req)
    assert returning._kept is None and asked == [1, 0]
    ranks.world_size = 1
    returning.keep(req)
    assert returning._kept is None and asked == [1, 0]


def test_what_is_computed_again_is_counted_whole() -> None:
    """However many chunks its prefill takes; of a row that is back, the rest."""
    world, req = running()
    world.retract(req)
    returning, totals = world.coordinator.returning, world.coordinator.totals
    req.is_retracted, req.full_untruncated_fill_ids = True, [7] * 5000
    req.prefix_len = 700
    returning.admitted(req)
    assert copy_of(req) is None and totals.retracted_tokens_computed == 4300
    req.is_retracted = False
    returning.admitted(req)
    assert totals.retracted_tokens_computed == 4300


def test_who_opts_out_is_stocks() -> None:
    setting = Setting(KaraConfig(window=8, delay=2, policy="periodic"), trouble=0.0, num_pages=2000)
    world = World(setting, seed=0)
    req = Request(0, [1, 2, 3], 10_000, False)
    assert world.prefill(req)
    advance(world, 3)
    world.retract(req)
    assert retracted_of(req) is None and not req.skip_radix_cache_insert


def test_fewer_slots_than_admission_counted_on_are_an_error() -> None:
    world, req = running()
    world.retract(req)
    req.prefix_len = world.match(req, [*req.origin_input_ids, *req.output_ids])
    returning = world.coordinator.returning
    offer = returning.offer(req)
    assert returning.make_room(offer)
    world.allocator.free.clear()
    assert not returning.make_room(offer)
    with pytest.raises(RuntimeError, match=r"admitted with a row of 29 slots, and \d+ are not free"):
        returning.bring_back(req, offer)


def test_a_prefix_that_is_gone_comes_from_the_copy() -> None:
    """And what the prefix cache still holds is shared, up to the first window."""
    setting = Setting(KaraConfig(window=8, delay=2, policy="periodic"), trouble=0.0, num_pages=2000)
    for evicted in (False, True):
        world = World(setting, seed=0)
        req = Request(0, [1, 2, 3, 4, 5], 10_000, None)
        assert world.prefill(req)
        world.publish()
        for _ in range(40):
            world.before_decode()
            world.decode([req])
            req.output_ids.append(7)
        world.retract(req)
        if evicted:
            assert world.make_room(2000)
        world.queue.remove(req)
        assert world.prefill(req)
        assert req.kv.cache_protected_len == (0 if evicted else 5)
        world.check_contents()
        world.check_pages()
        assert torch.equal(
            world.req_to_token[req.kv.req_pool_idx, : len(req.slots)].long(), torch.tensor(req.slots)
        )
