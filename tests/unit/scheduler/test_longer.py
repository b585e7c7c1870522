"""Answers that outgrow the pool, on the simulated scheduler (``world.py``) and by arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers import scheduler
from stand_ins import Finish, Request, Setting
from world import World

from kara_sglang.config import KaraConfig
from kara_sglang.radix_integration.row import Geometry, ceil_align
from kara_sglang.scheduler.forecast import LAST, longest
from kara_sglang.scheduler.longer import ASKED, GONE, Asked, longest_answers
from kara_sglang.scheduler.pace import Pace
from kara_sglang.scheduler.runtime import (
    after_retraction_order,
    around_add_request_to_queue,
    around_init_req_max_new_tokens,
    runtime,
)


class Pool(World):
    """A server whose pool is too small for what is asked; it remembers what was reserved and held."""

    def __init__(self, setting: Setting, seed: int) -> None:
        super().__init__(setting, seed)
        self.reserved: dict[str, list[float]] = {}  # by request, pages with what it will take, by step
        self.held: dict[str, list[int]] = {}  # pages in the same steps
        self.at_once = 0

    def before_decode(self) -> None:
        super().before_decode()
        longer = self.coordinator.longer
        long = [req for req in self.batch.reqs if longer.is_long(req)]
        self.at_once = max(self.at_once, len(long))
        for req in long:
            held = ceil_align(len(req.slots), self.page)
            self.held.setdefault(req.rid, []).append(held)
            self.reserved.setdefault(req.rid, []).append(held + longer.reserve(req))

    def retract(self, req: Request, *, paused: bool = False) -> None:
        assert not self.coordinator.longer.is_long(req), "the long answer cannot come back"
        super().retract(req, paused=paused)

    def send(self, req: Request) -> None:
        self.cap(req)
        self.queue.append(req)

    def finish(self) -> None:
        for _ in range(20_000):
            if not self.queue and not self.batch.reqs:
                return
            self.step()
        raise AssertionError("nobody gets on")


def server(**more: Any) -> Setting:
    """Pages of 4, windows of 32 of which 8 are kept, a pool of 256 slots."""
    config = {"window": 32, "delay": 8, "retain": 0.25, "policy": "pressure"} | more.pop("config", {})
    setting = {"page": 4, "num_pages": 64, "max_running": 0, "trouble": 0.0, "real": False} | more
    return Setting(KaraConfig(**config), **setting)


@st.composite
def small_servers(draw: st.DrawFn) -> Setting:
    """Any geometry and any policy, in a pool of a few windows."""
    page = draw(st.sampled_from([1, 4, 16]))
    window = max(8, page * draw(st.integers(1, 3)))
    delay = draw(st.sampled_from([0, 1, 7, 20]))
    config = KaraConfig(
        policy=draw(st.sampled_from(["pressure", "periodic", "threshold"])),
        selector=draw(st.sampled_from(["kara", "keys"])),
        window=window,
        retain=draw(st.sampled_from([0.01, 0.25, 0.5, 0.8])),
        delay=delay,
        period=draw(st.sampled_from([1, 5])),
        threshold=draw(st.sampled_from([0, 100, 10_000])),
        min_pool_usage=draw(st.sampled_from([0.2, 1.0])),
        query_mem_gb=1.0,
    )
    slots = draw(st.integers(2, 3)) * (window + delay) + draw(st.integers(60, 100))
    units, overlap = draw(st.integers(0, 4)), draw(st.booleans())
    return Setting(
        config,
        page=page,
        units=units,
        overlap=overlap,
        real=False,
        trouble=0.0,
        max_running=0,
        num_pages=-(-slots // page),
    )


@settings(max_examples=25, deadline=None)
@given(small_servers(), st.integers(1, 40), st.lists(st.integers(2, 40), max_size=3))
def test_what_is_reserved_covers_the_whole_life(
    setting: Setting, prompt: int, others: list[int]
) -> None:
    """A request asks for more than the pool holds, beside others: it is as long as the arithmetic says,
    holds at most what was reserved in every step before, and is never computed again."""
    world = Pool(setting, seed=0)
    pool = setting.num_pages * setting.page
    req = Request(0, [1] * prompt, 4 * pool, None)
    world.send(req)
    for number, tokens in enumerate(others, 1):
        world.send(Request(number, [2 + number] * 9, tokens, None))
    world.finish()
    geometry, kept = world.coordinator.geometry, world.kept_of(req)
    stock, most = longest_answers(prompt, pool, 1 << 20, geometry, kept)
    written = len(req.output_ids)
    assert (req.finished_reason, req.retraction_count) == ("length", 0)
    if kept == setting.config.window or most == stock:
        assert written == stock
    else:
        # With overlap the newest token is not known yet where the answer is let go on.
        assert written in (min(most, 4 * pool), min(most, 4 * pool) - 1)
    assert world.coordinator.totals.long_answers == (req.rid in world.reserved) == (written > stock)
    for step, reserved in enumerate(world.reserved.get(req.rid, [])):
        assert max(world.held[req.rid][step:]) <= reserved


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_longest_against_a_plain_simulation(data: Any) -> None:
    """So many tokens fit the room, and those of one more window do not."""
    window = data.draw(st.integers(1, 60))
    geometry = Geometry(1, window, data.draw(st.integers(0, 40)))
    kept = data.draw(st.integers(1, window))
    uncompressed = data.draw(st.integers(-20, window + geometry.delay))
    room = data.draw(st.integers(0, 500))

    def peak(tokens: int) -> int:
        """Most slots from the window's start on, where each goes as it falls due."""
        held = most = uncompressed
        grown = 0
        for _ in range(tokens):
            if held >= window + geometry.delay:
                held, grown = held - window, grown + kept
            held += 1
            most = max(most, grown + held)
        return most

    tokens = longest(geometry, room, uncompressed, kept)
    if room < window + geometry.delay + LAST:
        assert tokens == 0
        return
    assert peak(tokens) <= max(room, uncompressed)
    if kept < window:
        assert peak(tokens + window + LAST) > room - LAST


@pytest.mark.parametrize(
    "policy", [{"min_pool_usage": 1.0}, {"policy": "threshold", "threshold": 10_000}]
)
def test_until_it_comes_near_its_cap_an_answer_is_like_others(policy: dict[str, Any]) -> None:
    """It reserves what stock's does and may be retracted; from there on it reserves all, and its
    windows go although the policy leaves everybody's whole."""
    world = Pool(server(config=policy), seed=0)
    req = Request(0, [1, 2, 3], 5000, None)
    world.send(req)
    longer, cap = world.coordinator.longer, req.sampling_params.max_new_tokens
    assert cap == 256 - 4 - 4 - 1
    while not longer.is_long(req):
        assert (req.sampling_params.max_new_tokens, longer.reserve(req)) == (cap, None)
        world.step()
    assert len(req.output_ids) in range(cap - 32 - 8 - LAST, cap - 32 - 8)
    windows = [len(req.windows)]
    while len(req.output_ids) < cap:
        world.step()
        windows.append(len(req.windows))
    assert windows[0] == 1, "all of them fitted, and from this step on one goes in each"
    assert max(after - before for before, after in itertools.pairwise(windows)) == 1
    assert windows[-1] == (len(req.token_at) - 4 - 8) // 32
    world.finish()
    assert len(req.output_ids) > 3 * cap


def test_the_second_one_ends_at_its_cap_or_follows_the_first() -> None:
    world = Pool(server(num_pages=160), seed=0)
    first, second, third = (Request(n, [n] * 3, 1400, None) for n in range(3))
    for req in (first, second):
        world.send(req)
    cap = second.sampling_params.max_new_tokens
    while not first.finished():
        world.step()
    world.send(third)
    world.finish()
    lengths = sorted(len(req.output_ids) for req in (first, second))
    assert lengths == [cap, 1400]
    assert len(third.output_ids) == 1400 and third.retraction_count == 0
    assert (world.at_once, world.coordinator.totals.long_answers) == (1, 2)


@pytest.mark.parametrize(
    ("options", "tokens"), [(False, 5000), ({"selector": "identity"}, 5000), ({"retain": 1}, 5000)]
)
def test_who_is_not_compressed_keeps_stocks_cap(options: Any, tokens: int) -> None:
    world = Pool(server(), seed=0)
    req = Request(0, [1, 2, 3], tokens, options)
    world.send(req)
    cap = req.sampling_params.max_new_tokens
    world.finish()
    assert len(req.output_ids) == cap
    assert world.coordinator.totals.long_answers == 0


def test_abort_frees_the_place() -> None:
    world = Pool(server(), seed=0)
    req, other = (Request(n, [n] * 3, 5000, None) for n in range(2))
    world.send(req)
    longer = world.coordinator.longer
    while not longer.is_long(req) or len(req.output_ids) < 400:
        world.step()
    req.to_finish = Finish("abort")
    world.send(other)
    while not longer.is_long(other):
        world.step()
    assert req.finished_reason == "abort" and not req.kv.holds_kv
    world.run()  # nothing is left


def test_where_everybody_is_retracted_the_long_one_ends() -> None:
    """SGLang's ``retract_all``: one that has not passed its cap comes back, is compressed again, and
    may be long again; one that has is gone."""
    for written, gone in ((230, False), (400, True)):
        world = World(server(), seed=0)
        req = Request(0, [1, 2, 3], 5000, None)
        world.cap(req)
        cap = req.sampling_params.max_new_tokens
        assert world.prefill(req)
        while len(req.output_ids) < written:
            world.step()
        assert world.coordinator.longer.is_long(req)
        world.retract(req, paused=True)
        assert world.coordinator.longer.one is None
        assert req.sampling_params.max_new_tokens == cap
        assert (world.gone, world.queue) == ((1, []) if gone else (0, [req]))
        while world.queue or world.batch.reqs:
            world.step()
        assert gone or len(req.output_ids) > cap + 400
        world.run()


def test_none_becomes_long_while_a_prompt_is_prefilled_in_chunks() -> None:
    """Its slots cannot be given up, and what is to come was reserved beside an answer with its cap."""
    world = Pool(server(), seed=0)
    req = Request(0, [1, 2, 3], 5000, None)
    world.send(req)
    world.scheduler.chunked_req = object()
    while len(req.output_ids) < 240:
        world.step()
    assert world.coordinator.longer.one is None
    world.scheduler.chunked_req = None
    world.finish()
    assert len(req.output_ids) > 700


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enable_hierarchical_cache", True),
        ("enable_priority_preemption", True),
        ("disagg_decode_prealloc_queue", True),
        ("server_args.retraction_policy", "priority"),
    ],
)
def test_servers_that_keep_stocks_cap(field: str, value: Any) -> None:
    world = World(server(), seed=0)
    assert world.coordinator.longer.allowed
    *path, name = field.split(".")
    setattr(operator.attrgetter(*path)(world.scheduler) if path else world.scheduler, name, value)
    assert not world.coordinator.longer.allowed
    req = Request(0, [1, 2, 3], 5000, None)
    world.cap(req)
    assert not hasattr(req, ASKED)
    drafts = World(server(pace=Pace(tokens=4)), seed=0)
    assert not drafts.coordinator.longer.allowed


def test_what_a_request_asks_for_is_bound_by_context_and_the_servers_limit() -> None:
    world = World(server(context=700), seed=0)
    longer = world.coordinator.longer

    def asked(tokens: int | None, cap: int) -> Asked | None:
        req = Request(0, [1, 2, 3], cap, None)
        longer.remember(req, tokens)
        return getattr(req, ASKED, None)

    assert asked(None, 247) == Asked(700 - 3 - 2, 247)
    assert asked(300, 247) == Asked(300, 247)
    assert asked(200, 200) is None
    assert asked(None, 0) is None, "its prompt fills the pool"
    world.scheduler.max_new_tokens_limit = 250
    assert asked(None, 247) == Asked(250, 247)


def test_the_long_one_is_kept_whatever_the_order() -> None:
    longer = World(server(), seed=0).coordinator.longer
    reqs = [Request(n, [1], 9, None) for n in range(5)]
    assert longer.keep([4, 2, 0, 1, 3], reqs) == [4, 2, 0, 1, 3]
    longer.one = (reqs[3], SimpleNamespace())
    assert longer.keep([4, 2, 0, 1, 3], reqs) == [3, 4, 2, 0, 1]


def test_how_long_an_answer_may_be() -> None:
    """What /server_info says of a short prompt; without compression it is stock's."""
    world = World(server(), seed=0)
    longer = world.coordinator.longer
    assert longer.answers(kept=32) == (247, 247)
    # 27 windows go while the row has 248 slots; 8 of the 32 tokens of each are held.
    assert longer.answers(kept=8) == (247, 1 + 248 + 26 * 24 + 3)
    world.scheduler.enable_hierarchical_cache = True
    assert longer.answers(kept=8) == (247, 247)
    assert longest_answers(10, 256, 200, longer.geometry, 8) == (188, 188), "the context ends it"
    assert longest_answers(240, 256, 9999, longer.geometry, 8) == (11, 11), "no room for a window"


def test_the_hooks_pass_on_what_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a coordinator all is SGLang's; with one the queue is closed to who cannot come back."""
    req = Request(0, [1, 2, 3], 5000, None)
    seen: list[Any] = []

    def cap(_scheduler: Any, capped: Request) -> None:
        capped.sampling_params.max_new_tokens = 247

    def add(*given: Any) -> None:
        seen.append(given)

    monkeypatch.setattr(runtime, "coordinator", None)
    around_init_req_max_new_tokens(cap, "scheduler", req)
    assert not hasattr(req, ASKED)
    assert after_retraction_order([1, 0], [0, 1], [req, req]) == [1, 0]
    around_add_request_to_queue(add, "scheduler", req)

    world = World(server(), seed=0)
    monkeypatch.setattr(runtime, "coordinator", world.coordinator)
    req.sampling_params.max_new_tokens = None
    around_init_req_max_new_tokens(cap, "scheduler", req)
    assert getattr(req, ASKED) == Asked((1 << 20) - 3 - 2, 247)
    world.coordinator.longer.one = (req, SimpleNamespace())
    assert after_retraction_order([1, 0], [0, 1], [req, Request(1, [1], 9, None)]) == [0, 1]
    around_add_request_to_queue(add, "scheduler", req, is_retracted=True)
    assert seen == [("scheduler", req, False), ("scheduler", req, True)]

    req.output_ids = [1] * 247
    told: list[Any] = []
    world.scheduler._release_aborted_request = told.append
    channel = SimpleNamespace(send_output=lambda abort, _req: told.append(abort.finished_reason))
    world.scheduler.ipc_channels = SimpleNamespace(send_to_tokenizer=channel)
    monkeypatch.setattr(scheduler, "_make_abort_req", lambda _req, **given: SimpleNamespace(**given))
    around_add_request_to_queue(add, "scheduler", req)
    assert len(seen) == 2
    assert told == [req, {"type": "abort", "message": GONE, "status_code": 503}]


def test_histories_have_long_answers() -> None:
    """Among random ones, with aborts and forced retractions, in pools of a few hundred slots."""
    long = gone = 0
    for seed in range(12):
        random = Random(seed)
        setting = server(
            overlap=random.random() < 0.5,
            max_running=3,
            trouble=random.choice([0.0, 0.003]),
            steps=700,
            options=(None, None, False, {"retain": 0.5}),
            config={"policy": random.choice(["pressure", "periodic"]), "debug_checks": True},
        )
        world = Thirsty(dataclasses.replace(setting, num_pages=random.randint(30, 80)), seed)
        world.run()
        long += world.coordinator.totals.long_answers
        gone += world.gone
    assert long > 12 and gone > 0


class Thirsty(World):
    """Where nobody says how long an answer may be."""

    def cap(self, req: Request) -> None:
        if self.chance(0.5):
            req.sampling_params.max_new_tokens = 700
        super().cap(req)
