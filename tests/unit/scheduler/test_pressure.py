"""The policy ``pressure``, on the simulated scheduler (``world.py``)."""

from __future__ import annotations

from stand_ins import Request, Setting
from world import World, answer

from kara_sglang.config import KaraConfig


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
    assert 750 <= held <= 800, "compressed down to the mark and no further"
