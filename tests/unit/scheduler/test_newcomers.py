"""Requests at their first decode step, on the simulated scheduler (``world.py``)."""

from __future__ import annotations

import torch
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
    world.retract(opted_out)
    world.queue.remove(opted_out)
    assert world.prefill(opted_out)
    advance(world, 2)
    assert world.coordinator.totals.skipped["opt_out"] == 1, "a retracted one is not another"


def test_newcomers_stand_at_either_end_of_the_batch() -> None:
    """Behind a step that mixed, those that it prefilled come first; others are appended. Their age is
    their place."""
    world, old = one_request(selector="recent")
    advance(world, 1)
    mixed, appended = ([Request(10 * k + i, [1, 2], 10_000, None) for i in range(2)] for k in (1, 2))
    for req in (*mixed, *appended):
        assert world.prefill(req)
    batch, order = world.batch, [1, 2, 0, 3, 4]
    batch.reqs = [batch.reqs[place] for place in order]
    for name in ("seq_lens", "seq_lens_cpu"):
        setattr(batch, name, getattr(batch, name)[torch.tensor(order)])
    advance(world, 1)
    assert [req.state.order for req in (old, *mixed, *appended)] == [1, 2, 3, 4, 5]
    assert batch.reqs == [*mixed, old, *appended]
