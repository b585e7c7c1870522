"""What ``debug_checks`` and the checks of every pass notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stand_ins import KV_HEADS, LAYERS, Finish, Request, Setting
from world import World, advance, answer, one_request, votes

from kara_sglang.config import SELECTORS, KaraConfig
from kara_sglang.kernels.record import PAGE


def corrupt_committed(world: World, req: Request) -> None:
    req.kv.kv_allocated_len += 1


def corrupt_batch(world: World, req: Request) -> None:
    world.batch.seq_lens_cpu = world.batch.seq_lens_cpu - 1


def corrupt_device_length(world: World, req: Request) -> None:
    world.batch.seq_lens = world.batch.seq_lens - 1


def corrupt_logical_length(world: World, req: Request) -> None:
    world.coordinator.compaction.lengths.removed[req.kv.req_pool_idx] += 1


def corrupt_row(world: World, req: Request) -> None:
    world.req_to_token[req.kv.req_pool_idx, 6] = world.req_to_token[req.kv.req_pool_idx, 7]


def corrupt_generation(world: World, req: Request) -> None:
    world.row_generation[req.kv.req_pool_idx] += 1


def corrupt_protected(world: World, req: Request) -> None:
    req.kv.cache_protected_len = 9


@pytest.mark.parametrize(
    "corrupt,message",
    [
        (corrupt_committed, "committed 15, allocated 16, in the batch 15"),
        (corrupt_batch, "in the batch 14"),
        (corrupt_device_length, "its row has 14 slots and lacks 0 tokens; it has 15"),
        (corrupt_logical_length, "lacks 1 tokens; it has 15, and 0 were removed"),
        (corrupt_row, "holds the same page twice"),
        (corrupt_generation, "the row of request 0 has a new owner"),
        (corrupt_protected, "the 9 tokens that the prefix tree owns"),
    ],
)
def test_debug_checks_notice(corrupt: Callable[[World, Request], None], message: str) -> None:
    """Whatever disagrees before a pass stops the server, with the numbers."""
    world, req = one_request(selector="recent", debug_checks=True)
    advance(world, 8 + 2)
    corrupt(world, req)
    with pytest.raises(RuntimeError, match=message):
        world.coordinator.before_decode(world.batch)


@pytest.mark.parametrize("first,second", [(21, 22), (16, 17), (20, 36)])
def test_debug_checks_notice_torn_pages(first: int, second: int) -> None:
    """With pages of 16 a row is made of whole ones, in order."""
    config = KaraConfig(selector="recent", window=32, delay=2, debug_checks=True, policy="periodic")
    world = World(Setting(config, page=16, trouble=0.0), seed=0)
    req = Request(0, list(range(16)), 10_000, None)
    assert world.prefill(req)
    advance(world, 32 + 2)
    row = world.req_to_token[req.kv.req_pool_idx]
    row[[first, second]] = row[[second, first]]
    with pytest.raises(RuntimeError, match="does not consist of whole pages"):
        world.coordinator.before_decode(world.batch)


@pytest.mark.parametrize("stored", ["model", "fp8", "fp4"])
@pytest.mark.parametrize("heads", ["all", "mean"])
def test_what_lay_in_the_ring_before_does_not_matter(heads: str, stored: str) -> None:
    """After `/resume_memory_occupation` anything may: the ring has been given back meanwhile."""
    world, req = one_request(selector="kara", query_heads=heads, query_dtype=stored)
    for part in world.recorder.ring.parts:
        part.view(torch.uint8).fill_(0xFF)  # NaN, or the largest numbers
    advance(world, 100)  # scores, and so the kept tokens, are checked against the true queries
    assert len(req.windows) >= 11 and votes(req) == heads[0] * len(req.windows)


@pytest.mark.parametrize("heads", ["all", "mean"])
def test_debug_checks_notice_a_step_that_recorded_nothing(heads: str) -> None:
    """As in a CUDA graph that was captured without its recording launches: the window would be chosen
    by what lay in the ring before."""
    world, req = one_request(selector="kara", query_heads=heads, debug_checks=True)
    advance(world, 8 + 2)
    world.coordinator.before_decode(world.batch)
    assert len(req.state.windows) == 1
    world, _ = one_request(selector="kara", query_heads=heads, debug_checks=True)
    advance(world, 8)
    record = world.recorder.record
    world.recorder.record = lambda *_: None
    advance(world, 1)
    world.recorder.record = record
    advance(world, 1)
    with pytest.raises(
        RuntimeError, match="the query of position 13 in layer 0, it holds none of this request's"
    ):
        world.coordinator.before_decode(world.batch)


@pytest.mark.parametrize("heads", ["all", "mean"])
def test_debug_checks_tell_a_pages_owner_from_its_last_one(heads: str) -> None:
    """The same positions in the same pages, but the first request's: a step of the second one's was not
    recorded."""
    world, first = one_request(selector="kara", query_heads=heads, debug_checks=True)
    advance(world, 8)
    pages = {*first.state.recorder.pages[0]}
    first.finished_reason = Finish("abort")
    world.release(first, checkpoint=False)
    world.drop([first])
    assert world.prefill(Request(1, [1, 2, 3, 4, 5], 10_000, None))
    [second] = world.batch.reqs
    record = world.recorder.record
    advance(world, 5)
    assert {*second.state.recorder.pages[0]} == pages
    world.recorder.record = lambda *_: None
    advance(world, 1)
    world.recorder.record = record
    advance(world, 4)
    with pytest.raises(RuntimeError, match="request 1: the ring should hold the query of position 10"):
        world.coordinator.before_decode(world.batch)


@pytest.mark.parametrize("kept", [[0, 1, 2, 2], [3, 2, 1, 0], [0, 1, 2, 8], [-1, 0, 1, 2], [0, 1, 2]])
def test_debug_checks_notice_a_bad_selection(kept: list[int]) -> None:
    """Kernels that return anything but R ascending positions of the window are caught."""
    world, _ = one_request(selector="recent", debug_checks=True)
    advance(world, 8 + 2)
    bad = torch.tensor(kept).expand(LAYERS, KV_HEADS, -1)
    world.coordinator.kernels.compress = lambda pool, jobs, positions: [bad]
    with pytest.raises(RuntimeError, match="selection must be 4 strictly ascending positions"):
        world.coordinator.before_decode(world.batch)


@pytest.mark.parametrize("selector", SELECTORS)
def test_several_windows_of_a_request_in_one_pass(selector: str, tmp_path: Path) -> None:
    """As if they had gone one after another: the model checks rows, lengths, K, V and the trace; of two
    requests, so that what each gives back is told apart."""
    config = KaraConfig(
        selector,
        window=8,
        delay=2,
        policy="periodic",
        period=50,
        debug_checks=True,
        trace=str(tmp_path),
        query_mem_gb=1.0,
    )
    world = World(Setting(config, trouble=0.0, num_pages=2000), seed=0)
    first, second = Request(0, [1, 2, 3, 4, 5], 93, None), Request(1, [1, 2, 3], 200, {"retain": 0.25})
    assert world.prefill(first) and world.prefill(second)
    answer(world, 49)
    assert world.windows == 0
    answer(world, 1)
    assert world.most_of_one >= 3 and len(first.windows) + len(second.windows) == 8
    answer(world, 50)
    assert first.finished() and world.traces == 1


@pytest.mark.parametrize("heads", ["all", "mean"])
def test_queries_that_were_overwritten_are_not_used(heads: str) -> None:
    """Where passes come too late for the ring, old windows are chosen without queries, all are
    compressed in their order, and those that the ring still covers are voted on."""
    world, req = one_request(selector="kara", query_heads=heads)
    hold_back, world.coordinator.policy.due = world.coordinator.policy.due, lambda *_, **__: []
    advance(world, 213)
    assert req.windows == []
    world.coordinator.policy.due = hold_back
    advance(world, 18)  # scores, and so the kept tokens, are checked against the true queries
    # The table has room for so many blocks; the last is that of the newest token before the first pass.
    begin = req.windows[0].logical_start
    oldest = ((begin + 213 - 1) // PAGE - world.recorder.num_blocks + 1) * PAGE
    first = next(i for i in range(20) if begin + 8 * i >= oldest)
    assert first > 0
    assert votes(req) == "n" * first + heads[0] * (len(req.windows) - first)
    assert len(req.windows) > first + 2
    assert world.coordinator.totals.without_queries == first
