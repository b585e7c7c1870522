"""Who is compressed and when, on the simulated scheduler (``world.py``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import GROUP, Finish, Request, Setting
from world import World, advance, answer, one_request, votes

from kara_sglang.config import SELECTORS, KaraConfig
from kara_sglang.scheduler.graphs import FLAG, Graphs
from kara_sglang.scheduler.latch import LOOK_EVERY
from kara_sglang.scheduler.metrics import Totals


@pytest.mark.parametrize("selector", SELECTORS)
def test_windows_follow_each_other(selector: str) -> None:
    """The first starts behind the prompt, each further one behind the R kept tokens."""
    world, req = one_request(selector=selector)
    kept = 8 if selector == "identity" else 4
    advance(world, 100)
    starts = [window.kv_start for window in req.windows]
    assert starts == [5 + kept * i for i in range(len(starts))] and len(starts) >= 11
    assert [window.logical_start for window in req.windows] == [5 + 8 * i for i in range(len(starts))]
    assert len(req.slots) == 105 - len(starts) * (8 - kept)


def test_a_window_is_compressed_in_the_step_in_which_it_is_due() -> None:
    """Not with one token less than W and the delay behind the prompt."""
    world, req = one_request(selector="recent", window=8, delay=3)
    advance(world, 8 + 3)
    assert not req.windows
    world.before_decode()
    assert len(req.windows) == 1 and len(req.slots) == 5 + 4 + 3


@pytest.mark.parametrize("attribute", ["to_finish", "length", "finished_reason"])
def test_a_request_about_to_finish_is_left_alone(attribute: str) -> None:
    """Its window would be compressed for nothing."""
    world, req = one_request(selector="recent")
    advance(world, 8 + 2)
    if attribute == "length":
        req.sampling_params.max_new_tokens = len(req.output_ids) + 1
    else:
        setattr(req, attribute, "abort")
    world.coordinator.before_decode(world.batch)
    assert req.state.windows == []


def test_a_window_that_began_without_a_recorder_is_chosen_without_queries() -> None:
    """The window in progress does not wait for one; the next one votes."""
    config = KaraConfig(window=8, delay=2, retain=0.5, query_heads="all", policy="periodic")
    world = World(Setting(config, units=GROUP, trouble=0.0, num_pages=2000), seed=0)
    first = Request(0, [1, 2, 3, 4, 5], 10_000, None)
    second = Request(1, [1, 2, 3], 10_000, None)
    assert world.prefill(first) and world.prefill(second)
    advance(world, 20)
    first.finished_reason = Finish("stop")
    world.release(first, checkpoint=False)  # in the middle of the second's third window
    world.drop([first])
    advance(world, 21)
    assert votes(first) == "aa" and votes(second) == "nnna"
    assert [w.logical_start for w in second.windows] == [3, 11, 19, 27]
    totals = world.coordinator.totals
    assert (totals.windows, totals.without_queries, totals.skipped) == (6, 3, {})


@pytest.mark.parametrize("selector", ["kara", "causal", "snapkv"])
def test_without_a_ring_unit_windows_are_those_of_keys(selector: str) -> None:
    """The same tokens in the same places at the same time as for a request that asks for `keys`."""
    rows = []
    for options in (None, {"selector": "keys"}):
        config = KaraConfig(selector=selector, window=8, delay=2, policy="periodic")
        world = World(Setting(config, units=0, trouble=0.0), seed=0)
        req = Request(0, [1, 2, 3], 10_000, options)
        assert world.prefill(req)
        advance(world, 50)
        rows.append(req)
        assert req.state.without_queries() == world.coordinator.totals.without_queries
    assert torch.equal(rows[0].kept, rows[1].kept) and votes(rows[0]) == "nnnnn"
    assert [window.mark for window in rows[1].windows] == [""] * 5
    assert [row.state.without_queries() for row in rows] == [5, 0]


@pytest.mark.parametrize("selector", ["identity", "recent", "keys"])
def test_only_selectors_with_queries_count_windows_without(selector: str) -> None:
    world, req = one_request(selector=selector)
    advance(world, 50)
    assert len(req.windows) == 5
    assert world.coordinator.totals.without_queries == req.state.without_queries() == 0


@pytest.mark.parametrize("selector", ["identity", "kara", "recent"])
def test_a_window_of_which_all_is_kept_bars_nobody_from_the_tree(selector: str) -> None:
    """``identity``, and any other at a share of 1: the row still is what the tree would say."""
    world, req = one_request(selector=selector, retain=1.0)
    advance(world, 40)
    assert len(req.windows) > 2 and not req.skip_radix_cache_insert
    req.finished_reason = Finish("length")
    req.output_ids = [7] * (len(req.token_at) - 5)
    cached = len(world.tree)
    world.release(req, checkpoint=True)
    assert len(world.tree) == cached + 1 and len(world.tree[-1].ids) == len(req.token_at)


@pytest.mark.parametrize("mine", [True, False])
def test_ranks_that_disagree_about_whether_raise(mine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something is due on one rank and nothing on the other: both take part in the comparison, in every
    step, so neither waits for the other, and nothing has been done to a row yet."""
    worlds = [one_request(debug_checks=True)[0] for _ in range(2)]
    for world in worlds:
        world.scheduler.attn_tp_group = SimpleNamespace(world_size=2, cpu_group="ranks")
    world = worlds[0]
    asked: list[torch.Tensor] = []

    def agreeing(bounds: torch.Tensor, *, group: object, **_: Any) -> None:
        assert group == "ranks"
        asked.append(bounds.clone())

    monkeypatch.setattr(torch.distributed, "all_reduce", agreeing)
    req = world.batch.reqs[0]
    while len(req.slots) < 5 + 8 + 2:
        advance(world, 1)
    steps = len(asked)
    assert steps == world.steps and len({tuple(one.tolist()) for one in asked}) == 1, "nothing was due"
    world.before_decode()
    assert len(asked) == steps + 1 and len(req.windows) == 1
    other = asked[0] if mine else asked[-1]  # what the other rank says of the next step

    def disagreeing(bounds: torch.Tensor, **_: Any) -> None:
        torch.maximum(bounds, other, out=bounds)

    world.decode(world.batch.reqs)
    while mine and len(req.slots) < 5 + 4 + 8 + 2:
        advance(world, 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", disagreeing)
    windows = list(req.state.windows)
    with pytest.raises(RuntimeError, match="tensor-parallel ranks disagree; this one takes"):
        world.coordinator.before_decode(world.batch)
    assert req.state.windows == windows


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("units", [1, GROUP])
def test_warming_up_leaves_no_trace(selector: str, units: int) -> None:
    """A pass over slots that nobody holds, also where the ring has room for a recorder of the mean."""
    config = KaraConfig(selector=selector, window=32, delay=2, policy="periodic")
    world = World(Setting(config, page=16, units=units, trouble=0.0), seed=0)
    world.coordinator.warm_up()
    assert world.coordinator.totals == Totals()
    assert sorted(world.allocator.free) == list(range(1, world.setting.num_pages + 1))
    world.run()


@pytest.mark.parametrize("units", [7, 2])
@pytest.mark.parametrize("policy", ["periodic", "pressure", "threshold"])
def test_a_step_costs_what_happens_in_it(policy: str, units: int) -> None:
    """Seven requests run for 600 steps, and each is looked at when a window falls due, when one begins
    that wants a recorder, and never else; nobody is a candidate for long, or asks what is needed."""
    config = KaraConfig(
        window=50, delay=5, query_heads="mean", policy=policy, threshold=300, min_pool_usage=1.0
    )
    world = World(Setting(config, units=units, trouble=0.0, num_pages=20_000, real=False), seed=0)
    coordinator = world.coordinator
    count: Counter[str] = Counter()

    def counted(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (coordinator.calendar, "make_date"),
        (coordinator, "_candidate"),
        (coordinator, "is_compressing"),
        (coordinator.newcomers, "start"),
    ):
        setattr(owner, name, counted(name, getattr(owner, name)))
    for i in range(7):
        assert world.prefill(Request(i, [1, 2, i], 1000, None))
        answer(world, 3)
    answer(world, 600)
    windows = 7 * 13
    assert count["start"] == 621
    assert count["make_date"] <= 4 * windows
    # A candidate for at most so many steps as windows that fall due nearby are spread over.
    assert count["_candidate"] <= (0 if policy == "pressure" else 8 * windows)
    assert count["is_compressing"] <= 621 // LOOK_EVERY + 2 * windows
    taken = sum(len(req.windows) for req in world.batch.reqs)
    assert taken == 0 if policy == "pressure" else 7 * 11 <= taken <= windows


def test_who_decodes_beside_a_prefill_runs() -> None:
    """SGLang takes them out of its running batch until that step is over."""
    world, req = one_request(selector="recent")
    coordinator, scheduler = world.coordinator, world.scheduler
    assert coordinator.running == [req]
    mode = SimpleNamespace(is_mixed=lambda: True)
    scheduler.last_batch = SimpleNamespace(forward_mode=mode, decoding_reqs=[req])
    scheduler.running_batch = SimpleNamespace(reqs=[])
    assert coordinator.running == [req]
    mode.is_mixed = lambda: False
    assert coordinator.running == []


class Watched(list):
    """Counts who is looked at."""

    looks = 0

    def __iter__(self) -> Any:
        for one in super().__iter__():
            Watched.looks += 1
            yield one

    def __reversed__(self) -> Any:
        for one in super().__reversed__():
            Watched.looks += 1
            yield one

    def __getitem__(self, index: Any) -> Any:
        Watched.looks += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("number", [2, 7])
def test_a_step_without_a_date_looks_at_two_requests(number: int) -> None:
    """The first and the last, to see whether they are new; however many run."""
    config = KaraConfig(window=500, delay=5, query_heads="mean", policy="periodic")
    world = World(Setting(config, units=7, trouble=0.0, num_pages=20_000, real=False), seed=0)
    for i in range(number):
        assert world.prefill(Request(i, [1, 2, i], 1000, None))
    answer(world, 5)
    world.batch.reqs = Watched(world.batch.reqs)
    for _ in range(20):
        Watched.looks = 0
        world.coordinator.before_decode(world.batch)
        assert Watched.looks == 2


def test_more_requests_than_the_largest_graph_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    world, _ = one_request(selector="keys")
    world.coordinator.graphs = Graphs([1, 2])
    for i in (1, 2):
        advance(world, 3)
        assert not caplog.records
        assert world.prefill(Request(i, [1, 2, i], 1000, None))
    advance(world, 3)
    [record] = caplog.records
    assert "3 requests run" in record.getMessage() and FLAG in record.getMessage()


def test_the_prefix_cache_learns_what_a_token_is() -> None:
    """Shared prefixes: the model's vocabulary, not that of the text's owner."""
    config = KaraConfig(selector="keys", window=32, delay=2, prefix_reuse="auto")
    world = World(Setting(config, page=16, trouble=0.0), seed=0)
    assert world.scheduler.tree_cache.vocab_size == world.scheduler.model_config.vocab_size
