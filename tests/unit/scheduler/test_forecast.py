"""What admission is promised, against what happens on the simulated scheduler (``world.py``)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stand_ins import Request, Setting
from world import World, advance, whole_life

from kara_sglang.config import SELECTORS, KaraConfig


@st.composite
def lone_servers(draw: st.DrawFn) -> Setting:
    """A server for one request, with a ring for it, of any selector and any geometry, whose passes keep
    up."""
    page = draw(st.sampled_from([1, 4, 16]))
    config = KaraConfig(
        policy="periodic",
        selector=draw(st.sampled_from(SELECTORS)),
        window=page * draw(st.integers(1, 8)),
        retain=draw(st.sampled_from([0.01, 0.25, 0.5, 1.0])),
        query_mem_gb=1.0,
        delay=draw(st.sampled_from([0, 1, 7, 40, 64])),
        query_heads=draw(st.sampled_from(["auto", "all", "mean"])),
        period=draw(st.sampled_from([1, 1, 5, 40])),
    )
    assume(config.period <= config.window)
    overlap = draw(st.booleans())
    return Setting(config, page=page, overlap=overlap, real=False, trouble=0.0, max_running=0)


REQUEST_OPTIONS = st.sampled_from(
    [None, {"retain": 0.01}, {"retain": 0.75}, {"selector": "kara"}, {"selector": "recent"}]
)


@settings(max_examples=150)
@given(lone_servers(), st.integers(1, 60), st.integers(1, 300), REQUEST_OPTIONS)
def test_with_a_ring_for_all_no_window_goes_without_queries(
    setting: Setting, prompt: int, tokens: int, options: Any
) -> None:
    """Whatever an answer's length: all windows that fall due are compressed, with their queries, and
    what is left over is nobody's loss."""
    world = World(setting, seed=0)
    req = Request(0, [1] * prompt, tokens, options)
    whole_life(world, req)
    totals, config = world.coordinator.totals, setting.config
    assert (totals.without_queries, totals.skipped) == (0, {})
    assert totals.windows == len(req.windows)
    # The last pass that it could be in has the KV of all but its last two tokens.
    left = prompt + tokens - 3 - world.first_window(req) - config.delay
    fewest = max(0, (left - (config.period - 1)) // config.window)
    assert fewest <= len(req.windows) <= max(0, (left + 1) // config.window)


@settings(max_examples=200)
@given(lone_servers(), st.integers(0, 3), st.integers(1, 60), st.integers(1, 300), REQUEST_OPTIONS)
def test_no_more_credit_than_what_happens(
    setting: Setting, units: int, prompt: int, tokens: int, options: Any
) -> None:
    """What admission reserves, for a request that waits and in each step of one that runs, is never
    less than what it will hold: with a ring or without one, and whatever share it asks for itself."""
    config = setting.config
    world = World(dataclasses.replace(setting, units=units), seed=0)
    coordinator = world.coordinator
    req = Request(0, [1] * prompt, tokens, options)
    reserves = [prompt + coordinator.reserve(req, tokens, 1)]
    assert world.prefill(req)
    held = []
    while not req.finished():
        world.step()
        held.append(len(req.slots))
        if not req.finished() and req.state is not None:
            left = tokens - len(req.output_ids)
            reserves.append(len(req.slots) + coordinator.reserve(req, left, 1))
    for step, reserve in enumerate(reserves):
        assert max(held[step:]) <= reserve
    # Nor is much more reserved than is needed: a window that just does not fall due.
    more = config.window - world.kept_of(req) + config.period + 2
    assert reserves[0] <= max(held) + more


def test_where_passes_fall_behind_less_is_promised() -> None:
    """Six requests want a pass in each step and a third, and get one in four: what is reserved covers
    what they come to hold together, also for those that ask for a tiny share."""
    config = KaraConfig(
        policy="periodic",
        selector="keys",
        window=8,
        delay=2,
        retain=0.25,
        period=4,
        max_requests_per_pass=1,
    )
    for options in (None, {"retain": 0.01}):
        setting = Setting(config, trouble=0.0, num_pages=9000, real=False, max_running=6)
        world = World(setting, seed=0)
        requests = [Request(i, [1, 2, i], 10_000, options) for i in range(6)]
        for req in requests:
            assert world.prefill(req)
        reserved = sum(3 + world.coordinator.reserve(req, 600, 6) for req in requests)
        promised = sum(3 + world.coordinator.reserve(req, 600, 1) for req in requests)
        advance(world, 600)
        held = sum(len(req.slots) for req in requests)
        assert promised < 0.6 * held, "passes do fall behind"
        assert held <= 1.02 * reserved


@pytest.mark.parametrize("threshold", [0, 100, 300, 10_000])
def test_below_the_threshold_nothing_is_promised(threshold: int) -> None:
    config = KaraConfig(selector="keys", window=8, delay=2, policy="threshold", threshold=threshold)
    world = World(Setting(config, trouble=0.0, num_pages=2000, real=False), seed=0)
    req = Request(0, [1, 2, 3], 400, None)
    reserve = 3 + world.coordinator.reserve(req, 400, 1)
    peak = max(whole_life(world, req))
    assert peak - 1 <= reserve <= peak + 8
