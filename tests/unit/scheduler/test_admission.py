"""What admission reserves against a plain simulation of how a request really grows."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kara_sglang.radix_integration.row import Geometry
from kara_sglang.scheduler.admission import adder_class
from kara_sglang.scheduler.forecast import growth
from kara_sglang.scheduler.pace import PLAIN
from kara_sglang.scheduler.runtime import runtime
from kara_sglang.scheduler.shortage import needed, short_of_slots


def simulated_peak(geometry: Geometry, uncompressed: int, kept: int, tokens: int) -> int:
    """Most slots above today's that a request holds while it generates ``tokens``, step by step."""
    held = uncompressed
    peak = grown = 0
    for _ in range(tokens):
        if held >= geometry.window + geometry.delay:  # before the step, as the pass does
            held -= geometry.window
            grown += kept
        held += 1
        peak = max(peak, grown + held - uncompressed)
    return peak


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_reserve_covers_the_peak_and_little_more(data: Any) -> None:
    page = data.draw(st.sampled_from([1, 16, 64]))
    window = page * data.draw(st.integers(1, 8))
    kept = page * data.draw(st.integers(1, window // page))
    geometry = Geometry(page, window, data.draw(st.integers(0, 100)))
    uncompressed = data.draw(st.integers(0, window + geometry.delay))
    tokens = data.draw(st.integers(0, 2000))
    reserve = growth(geometry, tokens, uncompressed, kept)
    overdue = growth(geometry, tokens, uncompressed + 5 * window, kept)
    assert 0 <= overdue <= tokens, "memory that is not free yet is no reserve"
    peak = simulated_peak(geometry, uncompressed, kept, tokens)
    assert peak <= reserve + 1
    assert reserve <= peak + (window - kept) + 1


def test_identity_reserves_what_stock_does() -> None:
    assert growth(Geometry(16, 64, 16), 1000, 30, kept=64) == 1000


@dataclass(frozen=True)
class Admission:
    max_new_tokens: int
    is_chunked: bool = False


class StockAdder:
    """The two methods of SGLang's PrefillAdder that the plugin overrides."""

    def __init__(self) -> None:
        self.running_batch = SimpleNamespace(reqs=["one", "two"])
        self.can_run_list = ["three"]

    def _get_running_request_total_token_offset(self, req: Any) -> float:
        return req.sampling_params.max_new_tokens

    def _select_prefill_admission(self, req: Any, *, total_tokens: int, **_kwargs: Any) -> Any:
        return "no room" if total_tokens > 700 else Admission(req.sampling_params.max_new_tokens)


class Params:
    max_new_tokens = 1000


class Req:
    sampling_params = Params()
    output_ids: tuple = ()
    rid = "one"


class HalfCoordinator:
    """Promises half of everything, and says in turn whether it is going to keep that."""

    def __init__(self, *acting: bool) -> None:
        self.acting = list(acting)

    def is_compressing(self, running: Any) -> bool:
        assert running.reqs == ["one", "two"]
        return self.acting.pop(0)

    def reserve(self, req: Req, tokens: float, running: int) -> float:
        assert running == 4, "those that run, those admitted in this step, and the candidate"
        return tokens / 2


def test_adder_reserves_the_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both checks of a candidate, and every running request, use what will be held."""
    monkeypatch.setattr(runtime, "coordinator", HalfCoordinator(True))
    adder = adder_class(lambda _scheduler: StockAdder, None)()
    assert adder._get_running_request_total_token_offset(Req()) == 500
    assert adder._select_prefill_admission(Req(), total_tokens=1100) == Admission(500)
    assert adder._select_prefill_admission(Req(), total_tokens=1300) == "no room"


def test_adder_counts_on_compression_only_where_it_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the policy does not act it reserves like stock; it is asked once per scheduling step."""
    monkeypatch.setattr(runtime, "coordinator", HalfCoordinator(False, True))
    adder = adder_class(lambda _scheduler: StockAdder, None)()
    assert adder._get_running_request_total_token_offset(Req()) == 1000
    assert adder._select_prefill_admission(Req(), total_tokens=700) == Admission(1000)
    assert adder._select_prefill_admission(Req(), total_tokens=1100) == "no room"
    later = adder_class(lambda _scheduler: StockAdder, None)()
    assert later._get_running_request_total_token_offset(Req()) == 500


def test_adder_is_stocks_without_a_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "coordinator", None)
    assert adder_class(lambda _scheduler: StockAdder, None) is StockAdder


def test_a_step_may_need_a_page_for_each_request() -> None:
    """Free slots and those that the prefix cache would give up count alike."""
    for free, evictable, expected in ((48, 0, False), (40, 8, False), (47, 0, True), (0, 32, True)):
        scheduler = SimpleNamespace(
            page_size=16,
            token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda n=free: n),
            tree_cache=SimpleNamespace(evictable_size=lambda n=evictable: n),
        )
        assert short_of_slots(scheduler, SimpleNamespace(reqs=[1, 2, 3]), PLAIN) is expected


def test_what_requests_need_is_summed_up_to_the_mark() -> None:
    """100 slots held; two that run have 60 tokens to come, of which 0.5 are expected unless they ignore
    the end; those that wait count with prompt and answer, as many as have rows."""
    read: list[str] = []

    def req(name: str, prompt: int, ignore_eos: bool = False) -> SimpleNamespace:
        params = SimpleNamespace(max_new_tokens=60, ignore_eos=ignore_eos)
        return SimpleNamespace(
            rid=name, origin_input_ids=[1] * prompt, output_ids=[], sampling_params=params
        )

    class Queue(list):
        def __iter__(self):
            for one in super().__iter__():
                read.append(one.rid)
                yield one

    scheduler = SimpleNamespace(
        max_total_num_tokens=1000,
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 850),
        tree_cache=SimpleNamespace(evictable_size=lambda: 50),
        new_token_ratio_tracker=SimpleNamespace(current=0.5),
        get_num_allocatable_reqs=lambda _running, running_batch: 2,
        waiting_queue=Queue([req("a", 40), req("b", 140), req("no row", 1000)]),
    )
    running = SimpleNamespace(reqs=[req("x", 10), req("y", 10, ignore_eos=True)])
    # 100 + 30 + 60 = 190; a: 290; b: 490.
    for share, expected, until in ((0.19, True, []), (0.2, True, ["a"]), (0.49, True, ["a", "b"])):
        read.clear()
        assert needed(scheduler, running, share) is expected and read == until
    assert not needed(scheduler, running, 0.4901)
    scheduler.get_num_allocatable_reqs = lambda _running, running_batch: -1
    assert not needed(scheduler, running, 0.191)
