"""The projection to GPUs."""

from __future__ import annotations

import pytest
from counted import result

from kara_sglang.benchmarks.arithmetic import Gpu
from kara_sglang.benchmarks.models import Model
from kara_sglang.benchmarks.serving import projection


def counted_pool() -> dict:
    """Three rows in a pool for three: half the steps with twice the requests, a quarter with four
    times as many; compressed requests hold less each."""
    runs = []
    for row, running, steps, slots in (
        ("stock", 3, 400, 1600),
        ("kara-0.5", 6, 200, 1700),
        ("kara-0.25", 12, 100, 1800),
    ):
        run = result(row, 0, 1.0, scenario="pool", point="3 fit", pool=3376)
        run["counters"] = run["counters"] | {"schedule": {str(running): [steps, steps * slots]}}
        runs.append(run)
    scale = {"window": 64, "delay": 16, "prompt": 64, "output": 1024}
    return {"scale": scale, "runs": runs}


def card_for(model: Model, pool: int, bandwidth: float, flop_rate: float) -> projection.Card:
    memory = (pool * model.kv_bytes + 2e9 * model.parameters) / 0.9
    return projection.Card("imagined", memory, Gpu("imagined", bandwidth, flop_rate, flop_rate))


def gains(model: Model, card: projection.Card, output: int = 1024) -> list[float]:
    rows = projection.counted(counted_pool())[3]
    base = rows["stock"].rate(model, card, output)
    return [rows[name].rate(model, card, output) / base for name in projection.ROWS]


def test_a_projection_has_the_right_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unstretched and at no cost of its own, the gain is what the bottleneck says."""
    monkeypatch.setattr(projection, "ring_bytes", lambda *_: 0)
    monkeypatch.setattr(projection, "pass_floor", lambda *_: 0.0)
    heavy = Model("heavy weights", 1, 1, 1, 1, 1000.0)
    # The weights' read is all: as many times faster as there are fewer steps.
    assert gains(heavy, card_for(heavy, 3376, 1e12, 1e30)) == pytest.approx([2, 4])
    # The arithmetic is all: every token costs the same, whoever it runs beside.
    assert gains(heavy, card_for(heavy, 3376, 1e30, 1e12)) == pytest.approx([1, 1])
    # The KV's read is all: fewer slots are read for the same tokens.
    light = Model("light weights", 100, 1, 100, 100, 1e-9)
    wanted = [400 * 1600 / (200 * 1700), 400 * 1600 / (100 * 1800)]
    assert gains(light, card_for(light, 3376, 1e12, 1e30)) == pytest.approx(wanted)
    # Stretched along one axis, the schedule is the same.
    for pool, output in ((10 * 3376, 1024), (8 * 3376, 8192)):
        assert gains(light, card_for(light, pool, 1e12, 1e30), output) == pytest.approx(wanted)


def test_a_projection_charges_the_ring_and_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, card = projection.MODELS[0], projection.CARDS[1]
    whole = gains(model, card, 8192)
    assert 1.7 < whole[0] < 2 and 3 < whole[1] < 4
    monkeypatch.setattr(projection, "ring_bytes", lambda *_: 0)
    without_ring = gains(model, card, 8192)
    monkeypatch.setattr(projection, "pass_floor", lambda *_: 0.0)
    for a, b, c in zip(whole, without_ring, gains(model, card, 8192), strict=True):
        assert a < b < c < 1.1 * a


def test_a_projection_says_what_it_is() -> None:
    answer = counted_pool()
    table = projection.table(answer)
    assert (
        table.startswith("*A projection") and "| Qwen3-8B | 24 GB (L4) | 35,400 | 8,192 | 4 |" in table
    )
    assert "25% of the load" in table
    del answer["runs"][1]
    with pytest.raises(ValueError, match="no pool"):
        projection.counted(answer)
