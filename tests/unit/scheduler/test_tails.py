"""Requests that decode in a step that prefills others: their places among its tokens."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from kara_sglang.scheduler.tails import Tails

STEP = SimpleNamespace(
    req_pool_indices=torch.tensor([7, 3, 5]), positions=torch.tensor([0, 1, 2, 40, 90])
)


def test_they_are_the_last_tokens() -> None:
    tails = Tails.of(STEP, SimpleNamespace(decoding_reqs=["first", "second"]))
    assert tails is not None
    assert (tails.first, tails.rows.tolist(), tails.positions.tolist()) == (3, [3, 5], [40, 90])
    # Padded to a size that has a graph.
    assert tails.queries(torch.arange(8)).tolist() == [3, 4]


def test_a_step_that_prefills_only_has_none() -> None:
    for none in (None, []):
        assert Tails.of(STEP, SimpleNamespace(decoding_reqs=none)) is None
