"""Requests at their first decode step, on the simulated scheduler (``world.py``)."""

from __future__ import annotations

from stand_ins import Request
from world import advance, one_request


def test_skips_are_counted_by_reason() -> None:
    """Opt-outs, beams and multimodal requests are never compressed, and say why."""
    world, req = one_request(selector="recent")
    opted_out, beam, pictures = (
        Request(1 + i, [1, 2], 10_000, False if i == 0 else None) for i in range(3)
    )
    beam.beam_group = object()
    pictures.multimodal_inputs = object()
    for other in (opted_out, beam, pictures):
        assert world.prefill(other)
    advance(world, 40)
    assert len(req.windows) > 2
    assert [other.state for other in (opted_out, beam, pictures)] == [None] * 3
    assert world.coordinator.totals.skipped == {"opt_out": 1, "beam": 1, "multimodal": 1}
