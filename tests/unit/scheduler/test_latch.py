"""When SGLang looks at its queue again, on the simulated scheduler (``world.py``)."""

from __future__ import annotations

import pytest
from world import advance, one_request

from kara_sglang.scheduler.latch import LOOK_EVERY


@pytest.mark.parametrize("selector", ["kara", "identity"])
def test_passes_let_sglang_look_at_its_queue(selector: str) -> None:
    """Only they do, within a few steps, and not in each step when each has a pass."""
    world, _ = one_request(selector=selector, window=4, delay=0)
    full, looked = [], 0
    for _ in range(60):
        before = len(world.batch.reqs[0].windows)
        world.batch.batch_is_full = True
        advance(world, 1)
        full.append((len(world.batch.reqs[0].windows) > before, world.batch.batch_is_full))
        looked += not world.batch.batch_is_full
    assert sum(passed for passed, _ in full) >= 14
    assert 60 // LOOK_EVERY - 1 <= looked <= 60 // LOOK_EVERY
    world.coordinator.policy.due = lambda *_, **__: []
    world.batch.batch_is_full = True
    advance(world, LOOK_EVERY)
    world.batch.batch_is_full = True  # what was passed before was looked at
    advance(world, 4 * LOOK_EVERY)
    assert world.batch.batch_is_full
