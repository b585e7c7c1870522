"""The guard of the ring: whether a window's queries are its own."""

from __future__ import annotations

import pytest
import torch

from kara_sglang.kernels.record import PAGE, Step
from kara_sglang.scheduler.ring.check import RingCheck


def test_the_check_knows_what_was_written_for_whom() -> None:
    """Each layer by itself; the mean's only page; places written again a page later; a new owner."""
    check = RingCheck((2, 3 * PAGE + 1), torch.device("cpu"))
    pages = torch.tensor([[-1, -1], [0, 1], [2, -1]], dtype=torch.int32)[:, None]
    rows = torch.tensor([0, 1, 2])

    def step(position: int) -> Step:
        return Step(torch.tensor([99, position, position + 100]), rows, pages)

    for position in range(70, 78):
        check.record(slice(0, 2), step(position))
    check.require("a", ((0,), (1,)), 70, 8)
    check.require("b", ((2,),), 170, 8)
    with pytest.raises(RuntimeError, match="position 69 in layer 0, it holds none of this request's"):
        check.require("a", ((0,), (1,)), 69, 8)
    check.record(slice(1, 2), step(70 + PAGE))
    with pytest.raises(RuntimeError, match=r"request b: .* position 170 in layer 1, .* position 234"):
        check.require("b", ((2,),), 170, 8)
    check.forget((1,))
    check.require("a", ((0,),), 71, 7)
    with pytest.raises(RuntimeError, match="position 71 in layer 0, it holds none of this request's"):
        check.require("a", ((0,), (1,)), 71, 7)
