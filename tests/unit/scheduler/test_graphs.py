"""The largest decode graph: what is said of it at start, and once when more requests run."""

from __future__ import annotations

import pytest

from kara_sglang.radix_integration.row import Geometry
from kara_sglang.scheduler.forecast import growth
from kara_sglang.scheduler.graphs import FLAG, Graphs, answer_in, slots_of

GEOMETRY = Geometry(page_size=16, window=512, delay=64)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_one_warning_when_the_largest_graph_is_passed(caplog: pytest.LogCaptureFixture) -> None:
    graphs = Graphs([1, 2, 8])
    for running in (1, 7, 8):
        graphs.step(running)
    assert warnings(caplog) == []
    for running in (9, 8, 12, 13):
        graphs.step(running)
    (line,) = warnings(caplog)
    assert "9 requests run" in line and "is for 8" in line and FLAG in line


def test_without_graphs_nobody_is_warned(caplog: pytest.LogCaptureFixture) -> None:
    graphs = Graphs([])
    graphs.step(1000)
    assert warnings(caplog) == [] and graphs.room(GEOMETRY, 256, 10_000, 64) == "no decode graphs"


def test_the_largest_graph_beside_what_the_pool_holds() -> None:
    graphs = Graphs([1, 4, 32])
    assert (
        graphs.room(GEOMETRY, 256, 65_536, 32)
        == "decode graphs for all 32 requests that may run at once"
    )
    text = graphs.room(GEOMETRY, 256, 65_536, 2048)
    assert "for up to 32 of 2048 requests" in text and FLAG in text
    # 2,048 slots each: six windows gave back 256 slots each before the row was as long.
    assert "shorter than 3584 tokens (2048 uncompressed)" in text


@pytest.mark.parametrize("kept", [64, 256, 512])
def test_answers_in_slots(kept: int) -> None:
    """As admission reckons: the longest answer fits at all times, and two windows more do not."""
    for slots in (100, 575, 576, 700, 1000, 2048, 10_000):
        tokens = answer_in(GEOMETRY, kept, slots)
        assert growth(GEOMETRY, tokens, 0, kept) <= slots + 3
        assert growth(GEOMETRY, tokens + 1024, 0, kept) > slots
        assert slots_of(GEOMETRY, kept, tokens) <= slots
        assert tokens == slots or kept < 512


def test_slots_at_an_answers_end() -> None:
    assert slots_of(GEOMETRY, 256, 575) == 575
    assert slots_of(GEOMETRY, 256, 576) == 320
    assert slots_of(GEOMETRY, 256, 4096) == 4096 - 7 * 256
