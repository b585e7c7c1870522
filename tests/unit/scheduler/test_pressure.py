"""The policy ``pressure``, on the simulated scheduler (``world.py``, ``scarce.py``)."""

from __future__ import annotations

import itertools

import pytest
from scarce import ANSWER, Scarce
from stand_ins import Request, Setting
from world import World, answer

from kara_sglang.config import KaraConfig
from kara_sglang.scheduler.latch import LOOK_EVERY
from kara_sglang.scheduler.policy import SPREAD


def test_pressure_touches_nobody_unless_somebody_waits_for_room() -> None:
    """Neither while all fits, nor for those that wait for a row; and it ends with its cause."""
    config = KaraConfig(window=8, delay=2, policy="pressure")
    world = World(Setting(config, trouble=0.0, num_pages=2000), seed=0)
    req = Request(0, [1, 2, 3], 400, None)
    assert world.prefill(req)
    answer(world, 150)
    world.queue.append(Request(1, [1, 2, 4], 2000, None))
    rows, world.free_rows = world.free_rows, []
    answer(world, 50)
    assert req.windows == []
    world.free_rows = rows
    answer(world, 50)
    taken = len(req.windows)
    assert taken >= 5
    world.queue.clear()
    answer(world, 50)
    assert len(req.windows) == taken


def test_pressure_lasts_until_what_runs_fits() -> None:
    """Admitted on compression, two answers of 700 in 1,000 slots are compressed with nobody waiting."""
    config = KaraConfig(window=8, delay=2, policy="pressure")
    world = World(Setting(config, trouble=0.0, num_pages=1000), seed=0)
    running = [Request(i, [1, 2, i], 700, None) for i in range(2)]
    for req in running:
        assert world.prefill(req)
    answer(world, 690)  # fails where a slot is missing
    held = sum(len(req.slots) for req in running)
    assert 700 <= held <= 730, "compressed until nine tenths of the mark are enough, and no further"


ARRIVALS = {
    "at once": {0: 15},
    "when two are nearly done": {0: 2, 900: 12},
    "in waves": {0: 3, 500: 1, 600: 1, 1500: 3, 2000: 1, 2100: 4},
}


@pytest.mark.parametrize("retain", [0.5, 0.25])
@pytest.mark.parametrize("name", ARRIVALS)
def test_a_scarce_pool_is_served_as_fast_as_by_periodic(name: str, retain: float) -> None:
    """Whether requests queue from the first step on or come when others have written long answers that
    were left whole: as many steps, none of them held up longer, nobody retracted, fewer windows."""
    pressure, periodic = (
        Scarce(ARRIVALS[name], retain=retain, policy=policy) for policy in ("pressure", "periodic")
    )
    assert len(pressure.taken) <= 1.01 * len(periodic.taken)
    assert max(pressure.taken) <= max(periodic.taken)
    assert sum(pressure.taken) <= sum(periodic.taken)
    assert pressure.world.retractions == 0
    assert all(len(req.output_ids) == ANSWER for req in pressure.requests)


def test_windows_left_whole_make_room_for_those_that_come() -> None:
    """Two answers of 900 tokens hold 13 whole windows each. Ten requests come, and what these windows
    give back lets in as many as with ``periodic``, within the steps that they are spread over."""
    policies = ("pressure", "periodic")
    pressure, periodic = (Scarce({0: 2, 900: 10}, retain=0.25, policy=one) for one in policies)
    assert not any(pressure.taken[:900])
    assert sum(pressure.taken[900 : 900 + SPREAD]) >= 2 * 13
    soon = SPREAD + LOOK_EVERY
    started = [sum(wait <= soon for wait in one.steps_to_start) for one in (pressure, periodic)]
    assert started[0] >= started[1] >= 8


def test_a_long_period_does_not_leave_windows_behind() -> None:
    """A pass in each window's time: windows that were left whole go several at once, or passes would
    never catch up with them."""
    slow = Scarce({0: 2, 700: 12}, policy="pressure", period=64)
    periodic = Scarce({0: 2, 700: 12}, policy="periodic", period=64)
    assert len(slow.taken) <= 1.03 * len(periodic.taken)
    first = next(step for step, taken in enumerate(slow.taken) if taken)
    assert slow.taken[first] == 8 and sum(slow.taken[first : first + 3 * 64]) >= 2 * 10


def test_memory_near_the_mark_does_not_switch_it_on_and_off() -> None:
    """Requests that come one by one keep the need around the mark; it begins to act with one of them at
    most, not with windows."""
    served = Scarce({300 * i: 1 for i in range(12)}, policy="pressure")
    assert sum(served.taken) > 100
    begins = sum(now > before for before, now in itertools.pairwise(served.acting))
    assert 1 <= begins <= 12


def test_a_reserve_knows_that_windows_left_whole_will_go() -> None:
    """A request that holds 400 whole tokens when memory becomes short never holds more, though 200 are
    still to come; admission is told so at once."""
    config = KaraConfig(selector="keys", window=8, delay=2, policy="pressure")
    world = World(Setting(config, trouble=0.0, num_pages=2000), seed=0)
    req = Request(0, [1, 2, 3], 600, None)
    assert world.prefill(req)
    answer(world, 400)
    assert req.windows == []
    world.queue.append(Request(1, [1, 2, 4], 2000, None))
    held = len(req.slots)
    assert world.coordinator.is_compressing(world.batch)
    assert world.coordinator.reserve(req, 600 - len(req.output_ids), running=1) == 0
    for _ in range(198):
        answer(world, 1)
        assert len(req.slots) <= held
    assert len(req.slots) < 330
