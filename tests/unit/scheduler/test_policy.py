"""Whose window is compressed when, and who records: order, limits, ties, and that nobody starves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kara_sglang.config import KaraConfig
from kara_sglang.scheduler import policy
from kara_sglang.scheduler.policy import (
    ENOUGH,
    SPREAD,
    Candidate,
    Periodic,
    Policy,
    Pressure,
    Threshold,
)


def candidate(index: int, **changes: int) -> Candidate:
    """With one window that is due, unless ``width`` says otherwise."""
    fields = {"order": index, "kv_len": 100, "overdue": 0, "uncompressed": 50, "gain": 8, "width": 1000}
    return Candidate(index=index, **(fields | changes))


@st.composite
def batches(draw: st.DrawFn) -> list[Candidate]:
    """Requests of a batch: ages all different and in any order, lengths with many ties."""
    size = draw(st.integers(0, 12))
    ages = draw(st.permutations(range(size)))
    small = st.integers(-3, 3)
    return [
        candidate(
            index,
            order=ages[index],
            kv_len=100 + draw(small),
            overdue=draw(small),
            uncompressed=50 + draw(small),
            gain=draw(st.sampled_from([0, 4, 8])),
        )
        for index in range(size)
    ]


POLICIES: list[Callable[[], Policy]] = [
    lambda: Periodic(1, 3),
    lambda: Threshold(100),
    lambda: Pressure(1, 3, 0.5),
]


@settings(max_examples=200)
@given(batches(), st.sampled_from(POLICIES))
def test_only_due_requests_ascending_and_deterministic(batch, make) -> None:
    """Ranks decide alike: the same batch gives the same list, all of it due."""
    chosen = make().due(batch)
    assert chosen == make().due(list(batch))
    assert chosen == sorted(set(chosen))
    assert all(batch[index].overdue >= 0 for index in chosen)


@settings(max_examples=200)
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_the_batch_does_not_matter(batch, random) -> None:
    """Who is chosen depends on lengths and ages, not on where in the batch a request stands."""
    shuffled = batch[:]
    random.shuffle(shuffled)
    for make in POLICIES:
        assert make().due(batch) == make().due(shuffled)


def late(batch: list[Candidate]) -> list[Candidate]:
    """Whoever is due has waited so long that nobody is spread over steps to come."""
    return [dataclasses.replace(c, overdue=c.overdue + SPREAD * (c.overdue >= 0)) for c in batch]


@settings(max_examples=200)
@given(batches(), st.integers(1, 13))
def test_periodic_takes_the_longest_waiting(batch, limit) -> None:
    """At most ``limit``; nobody left behind has waited longer, or as long and come earlier."""
    batch = late(batch)
    chosen = Periodic(1, limit).due(batch)
    ready = [c for c in batch if c.overdue >= 0]
    assert len(chosen) == min(limit, len(ready))
    left = [c for c in ready if c.index not in chosen]
    for taken in (batch[index] for index in chosen):
        assert all((taken.overdue, -taken.order) > (c.overdue, -c.order) for c in left)


@pytest.mark.parametrize("make", [Periodic, lambda *numbers: Pressure(*numbers, 0.8)])
@pytest.mark.parametrize("period", [1, 4, 16])
@pytest.mark.parametrize("size", [1, 7, 32, 300])
def test_what_falls_due_together_is_spread(make: Callable, size: int, period: int) -> None:
    """No pass takes more than its share, and nobody waits longer than the spread and a period."""
    one = make(period, 1000)
    share = -(-size // max(1, SPREAD // period - 1))
    waiting = list(range(size))
    for step in range(SPREAD + 2 * period):
        batch = [candidate(index, overdue=step) for index in waiting]
        chosen = one.due(batch)
        assert len(chosen) <= share + 1
        waiting = [index for index in waiting if index not in chosen]
        if step >= SPREAD + period:
            assert not waiting


@settings(max_examples=200)
@given(batches(), st.integers(95, 105))
def test_threshold_takes_whoever_is_long_enough(batch, threshold) -> None:
    """Without a limit, whatever the pool says."""
    expected = [c.index for c in batch if c.overdue >= 0 and c.kv_len >= threshold]
    assert Threshold(threshold).due(batch) == expected


@settings(max_examples=200)
@given(batches(), st.integers(1, 13))
def test_pressure_takes_what_frees_most(batch, limit) -> None:
    """The largest gains, then the longest, then the oldest."""
    batch, one = late(batch), Pressure(1, limit, 0.5)
    for _ in range(SPREAD):
        chosen = one.due(batch)
    ready = [c for c in batch if c.overdue >= 0]
    assert len(chosen) == min(limit, len(ready))
    left = [c for c in ready if c.index not in chosen]

    def rank(c: Candidate) -> tuple[int, int, int]:
        return (c.gain, c.uncompressed, -c.order)

    for taken in (batch[index] for index in chosen):
        assert all(rank(taken) > rank(c) for c in left)


@pytest.mark.parametrize("rank", [Periodic.rank, Pressure.rank])
@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(-20, 90), st.sampled_from([0, 4, 8])), max_size=9), st.data())
def test_windows_that_have_piled_up_are_taken_in_their_order(rank, rows, data) -> None:
    """Of all windows that are due the first ones, several of one request among them: as if each window
    stood in the line for itself."""
    batch = [
        candidate(i, overdue=overdue, uncompressed=overdue + 10, gain=gain, width=16)
        for i, (overdue, gain) in enumerate(rows)
    ]
    limit = data.draw(st.integers(1, 40))
    line = []
    for one in batch:
        while one.overdue >= 0:
            line.append((rank(one), one.index))
            one = one.behind()
    expected = sorted(index for _, index in sorted(line)[:limit])
    assert policy._first(batch, limit, rank) == expected
    for one in batch:
        assert one.windows == sum(index == one.index for _, index in line)


@pytest.mark.parametrize("urgent", [False, True])
@pytest.mark.parametrize("requests", [1, 3, 40])
def test_windows_left_whole_are_spread_from_the_step_on_in_which_pressure_acts(
    requests: int, urgent: bool
) -> None:
    """Ten of each request: no step is held up by more than its share, nor by more than the limit, and
    all are gone when they could be; at once where slots run out."""
    limit, old = 8, 10
    one = Pressure(1, limit, 0.8)
    one.due([])
    piled = [16 * old - 1] * requests
    steps = []
    while any(held >= 0 for held in piled):
        batch = [candidate(i, overdue=held, width=16) for i, held in enumerate(piled)]
        chosen = one.due(batch, urgent=urgent)
        for index in chosen:
            piled[index] -= 16
        steps.append(len(chosen))
    assert sum(steps) == requests * old
    if urgent:
        assert max(steps[:-1], default=limit) == limit
    else:
        assert max(steps) == min(limit, -(-requests * old // SPREAD))
        assert len(steps) <= SPREAD + -(-requests * old // limit)


def test_pressure_goes_on_until_there_is_enough() -> None:
    """A need that stays near the mark does not switch it on and off."""
    one = Pressure(1, 8, 0.8)
    said = [
        one.is_compressing(lambda share, n=need: n >= share)
        for need in (0.79, 0.8, 0.79, 0.73, 0.71, 0.79)
    ]
    assert said == [False, True, True, True, False, False] and 0.71 < 0.8 * ENOUGH < 0.73


@pytest.mark.parametrize("make", [lambda p: Periodic(p, 8), lambda p: Pressure(p, 8, 0.0)])
@pytest.mark.parametrize("period", [1, 2, 7, 64])
def test_the_period_is_counted_in_steps(make: Callable[[int], Policy], period: int) -> None:
    """Every ``period``-th step has a pass, with or without candidates in between."""
    one = make(period)
    random = Random(0)
    for step in range(1, 5 * period + 1):
        batch = [candidate(0)] if random.random() < 0.5 or step % period == 0 else []
        assert one.due(batch) == ([0] if step % period == 0 else [])


def test_the_pressure_counter_runs_while_the_pool_has_room() -> None:
    """The first pass under pressure is not later for that."""
    one = Pressure(4, 8, 0.5)
    assert [one.due([]) for _ in range(7)] == [[]] * 7
    assert one.due([candidate(0)]) == [0]


def test_settings_choose_the_policy() -> None:
    """Each name with its own numbers."""
    shared = {"period": 3, "max_requests_per_pass": 5, "threshold": 77, "min_pool_usage": 0.6}
    periodic = policy.build(KaraConfig(policy="periodic", **shared))
    assert isinstance(periodic, Periodic) and (periodic.period, periodic.limit) == (3, 5)
    assert (periodic.floor, periodic.wait) == (0, 2)
    threshold = policy.build(KaraConfig(policy="threshold", **shared))
    assert isinstance(threshold, Threshold) and (threshold.floor, threshold.wait) == (77, 0)
    punctual = policy.build(KaraConfig("recent", policy="punctual", **shared))
    assert punctual.due([candidate(i) for i in range(9)]) == list(range(9))
    pressure = policy.build(KaraConfig(policy="pressure", **shared))
    assert isinstance(pressure, Pressure) and pressure.min_usage == 0.6
    assert [bool(pressure.due([candidate(i) for i in range(9)])) for _ in range(3)] == [
        False,
        False,
        True,
    ]
    assert len(pressure.due([candidate(i) for i in range(9)])) == 0


@pytest.mark.parametrize("period,limit", [(1, 1), (1, 2), (4, 3), (16, 8)])
def test_nobody_starves(period: int, limit: int) -> None:
    """Thousands of steps, requests that come and go, capacity just enough: waits stay bounded."""
    random = Random(period * 100 + limit)
    window = 16 * period // limit + 16  # a little more room than 12 requests need
    one = Periodic(period, limit)
    overdue: dict[int, int] = {}
    arrived = longest = 0
    for _ in range(6000):
        while len(overdue) < 12 and random.random() < 0.2:
            overdue[arrived] = -random.randint(1, window)
            arrived += 1
        batch = [
            candidate(index, order=order, overdue=late)
            for index, (order, late) in enumerate(overdue.items())
        ]
        names = list(overdue)
        for index in one.due(batch):
            overdue[names[index]] -= window
        overdue = {name: late + 1 for name, late in overdue.items() if random.random() > 0.002}
        longest = max([longest, *overdue.values()])
    assert arrived > 20
    assert longest <= period * (12 // limit + 2), longest


@pytest.mark.parametrize("make", [lambda n: Periodic(n, 8), lambda n: Pressure(n, 8, 0.8)])
def test_nothing_is_put_off_when_slots_run_out(make: Callable) -> None:
    """Nine fall due in one step: as many go as a pass takes, else one; at the period either way."""
    batch = [candidate(i, overdue=0, order=i) for i in range(9)]
    assert len(make(1).due(batch)) == 1 and make(5).due(batch) == []
    assert make(1).due(batch, urgent=True) == list(range(8))
    assert make(5).due(batch, urgent=True) == []
    assert make(1).due([candidate(0, overdue=-1)], urgent=True) == []


@pytest.mark.parametrize("make", [Periodic, lambda *numbers: Pressure(*numbers, 0.8)])
@pytest.mark.parametrize("period,limit", [(1, 1), (1, 2), (4, 3), (16, 8)])
def test_windows_in_time_are_those_that_passes_can_take(
    make: Callable, period: int, limit: int
) -> None:
    """Against a simulation of requests whose windows fall due every W steps."""
    window, steps = 16, 4000
    for running in (1, 2, 5, 12, 40):
        one = make(period, limit)
        uncompressed = [n % window for n in range(running)]
        taken = 0
        for _ in range(steps):
            batch = [
                candidate(i, overdue=held - window, uncompressed=held, width=window)
                for i, held in enumerate(uncompressed)
            ]
            for index in one.due([c for c in batch if c.overdue >= 0]):
                uncompressed[index] -= window
                taken += 1
            uncompressed = [held + 1 for held in uncompressed]
        assert one.in_time(running, window) == pytest.approx(
            taken * window / (steps * running), abs=0.03
        )
    assert Threshold(0).in_time(10**6, 16) == 1


def test_only_pressure_asks_what_is_needed() -> None:
    """Below its mark nothing is compressed; the others always act, whatever it would cost to ask."""
    for needed in (True, False):
        asked: list[float] = []
        assert (
            Pressure(1, 8, 0.8).is_compressing(lambda share, n=needed, a=asked: a.append(share) or n)
            is needed
        )
        assert asked == [0.8]

    def never(_share: float) -> bool:
        raise AssertionError("asked")

    assert Periodic(1, 8).is_compressing(never) and Threshold(0).is_compressing(never)
