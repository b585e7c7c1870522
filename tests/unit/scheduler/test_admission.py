"""What admission reserves against a plain simulation of how a request really grows."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_policy import AddReqResult

from kara_sglang.radix_integration.row import Geometry
from kara_sglang.scheduler.admission import adder_class
from kara_sglang.scheduler.forecast import growth
from kara_sglang.scheduler.runtime import runtime

NO_TOKEN = AddReqResult.NO_TOKEN


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
        return NO_TOKEN if total_tokens > 700 else Admission(req.sampling_params.max_new_tokens)


class Params:
    max_new_tokens = 1000


class Req:
    sampling_params = Params()
    output_ids: tuple = ()
    rid = "one"


class HalfCoordinator:
    """Promises half of everything, and says in turn whether it is going to keep that."""

    def __init__(self, *acting: bool, long: float | None = None) -> None:
        self.acting = list(acting)
        self.longer = SimpleNamespace(reserve=lambda _req: long)

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
    assert adder._select_prefill_admission(Req(), total_tokens=1300) is NO_TOKEN


def test_adder_counts_on_compression_only_where_it_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the policy does not act it reserves like stock; it is asked once per scheduling step."""
    monkeypatch.setattr(runtime, "coordinator", HalfCoordinator(False, True))
    adder = adder_class(lambda _scheduler: StockAdder, None)()
    assert adder._get_running_request_total_token_offset(Req()) == 1000
    assert adder._select_prefill_admission(Req(), total_tokens=700) == Admission(1000)
    assert adder._select_prefill_admission(Req(), total_tokens=1100) is NO_TOKEN
    later = adder_class(lambda _scheduler: StockAdder, None)()
    assert later._get_running_request_total_token_offset(Req()) == 500


def test_a_long_answer_reserves_all_that_it_will_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the policy does, and whatever SGLang expects of the answers that run."""
    monkeypatch.setattr(runtime, "coordinator", HalfCoordinator(False, long=1700.0))
    adder = adder_class(lambda _scheduler: StockAdder, None)()
    assert adder._get_running_request_total_token_offset(Req()) == 1700


@pytest.mark.parametrize("there", [True, False])
def test_a_row_comes_back_only_into_memory_that_is_there(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """What the prefix cache counts as its to give up may stay where it is, with HiCache."""
    coordinator, asked = HalfCoordinator(True), []
    coordinator.returning = SimpleNamespace(make_room=lambda offer: asked.append(offer) or there)
    monkeypatch.setattr(runtime, "coordinator", coordinator)
    adder = adder_class(lambda _scheduler: StockAdder, None)()
    adder._offer = SimpleNamespace(needs=100)
    assert adder._select_prefill_admission(Req(), total_tokens=1101) is NO_TOKEN
    assert not asked, "nothing is given up for who is not admitted"
    expected = Admission(500) if there else NO_TOKEN
    assert adder._select_prefill_admission(Req(), total_tokens=1100) == expected
    assert asked == [adder._offer]


def test_adder_is_stocks_without_a_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "coordinator", None)
    assert adder_class(lambda _scheduler: StockAdder, None) is StockAdder
