"""Who records, on the simulated scheduler (``world.py``)."""

from __future__ import annotations

import pytest
from stand_ins import GROUP, Request, Setting
from world import World, advance, votes

from kara_sglang.config import KaraConfig
from kara_sglang.scheduler.ring.handout import MOST_IN_A_ROW


def voted_share(requests: list[Request]) -> list[float]:
    return [sum(voter != "n" for voter in votes(req)) / len(req.windows) for req in requests]


@pytest.mark.parametrize("heads,units", [("all", 2), ("all", 3), ("mean", 1), ("auto", 1)])
@pytest.mark.parametrize("running", [2, 3])
@pytest.mark.parametrize("together", [True, False])
def test_recorders_go_round(heads: str, units: int, running: int, together: bool) -> None:
    """With room for one recorder, each of two or three requests votes on as many windows as the
    others, also where their windows begin in the same steps; and all windows are compressed."""
    config = KaraConfig(window=8, delay=2, query_heads=heads, policy="periodic")
    world = World(Setting(config, units=units, trouble=0.0, num_pages=4000), seed=0)
    requests = [Request(i, [1, 2, 3, i], 10_000, None) for i in range(running)]
    for req in requests:
        assert world.prefill(req)
        advance(world, 0 if together else 3)
    advance(world, 900)
    assert min(len(req.windows) for req in requests) >= 900 // 8 - 1
    shares = voted_share(requests)
    # A change of owners costs a window, or less.
    expected = MOST_IN_A_ROW / (MOST_IN_A_ROW + 1) / running
    assert max(shares) - min(shares) <= 0.05 and 0.95 * expected <= sum(shares) / running, shares


def test_pages_are_kept_for_those_that_asked_in_vain_longest() -> None:
    """Windows that begin in nearly the same steps: the first in each row does not win every time."""
    config = KaraConfig(window=64, delay=16, policy="periodic")
    world = World(Setting(config, page=16, units=2, trouble=0.0, num_pages=2000, real=False), seed=0)
    requests = [Request(i, list(range(20 + 3 * i)), 10_000, None) for i in range(7)]
    for req in requests:
        assert world.prefill(req)
    advance(world, 1900)
    voted = [sum(voter != "n" for voter in votes(req)) for req in requests]
    assert min(voted) >= 6 and max(voted) <= 12, voted


def test_one_recorder_less_than_requests_costs_little_more_than_its_windows() -> None:
    """Only as many recorders change hands as requests have asked in vain."""
    config = KaraConfig(window=32, delay=2, query_heads="mean", policy="periodic")
    world = World(Setting(config, units=4, trouble=0.0, num_pages=9000, real=False), seed=0)
    requests = [Request(i, [1, 2, 3, i], 10_000, None) for i in range(5)]
    for req in requests:
        assert world.prefill(req)
        advance(world, 6)
    advance(world, 1600)
    shares = voted_share(requests)
    assert min(shares) >= 0.6, shares


def test_who_records_all_heads_gives_way_first() -> None:
    """Some windows after the ring is full, everybody has a recorder of the mean."""
    config = KaraConfig(window=8, delay=2, query_heads="auto", policy="periodic")
    world = World(Setting(config, units=2 * GROUP, trouble=0.0, num_pages=2000, real=False), seed=0)
    requests = [Request(i, [1, 2, 3, i], 10_000, None) for i in range(2 * GROUP)]
    for req in requests:
        assert world.prefill(req)
        advance(world, 1)
    advance(world, 12)
    assert [votes(req) for req in requests] == ["a", "a", "n", "n"]
    advance(world, 40)
    assert all(votes(req)[-1] == "m" for req in requests)
    advance(world, 40)
    assert all(votes(req)[-5:] == "mmmmm" for req in requests)


def test_nobody_gives_way_while_there_is_room() -> None:
    """Recorders stay with their requests, and every window is voted on."""
    config = KaraConfig(window=8, delay=2, query_heads="all", policy="periodic")
    world = World(Setting(config, units=3 * GROUP, trouble=0.0, num_pages=2000, real=False), seed=0)
    requests = [Request(i, [1, 2, 3, i], 10_000, None) for i in range(3)]
    for req in requests:
        assert world.prefill(req)
        advance(world, 5)
    recorders = [req.state.recorder for req in requests]
    advance(world, 200)
    assert [req.state.recorder for req in requests] == recorders
    assert voted_share(requests) == [1, 1, 1]


def test_who_needs_no_queries_takes_no_recorder() -> None:
    """On a server that records: others find the whole ring, and its own windows come all the same."""
    config = KaraConfig(window=8, delay=2, query_heads="all", policy="periodic")
    world = World(Setting(config, units=GROUP, trouble=0.0, num_pages=2000), seed=0)
    keys = Request(0, [1, 2, 3], 10_000, {"selector": "keys"})
    kara = Request(1, [1, 2, 4], 10_000, None)
    assert world.prefill(keys)
    advance(world, 30)
    assert world.recorder.in_use == 0 and len(keys.windows) == 3
    assert world.prefill(kara)
    advance(world, 30)
    assert set(world.recorder.active) == {kara.kv.req_pool_idx}
    assert len(kara.windows) == 3 and len(keys.windows) == 7
    assert votes(kara) == "aaa" and world.coordinator.totals.without_queries == 0
