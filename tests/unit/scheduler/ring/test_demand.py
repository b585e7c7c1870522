"""The demand for the ring's pages that is foreseen, against requests that decode token by token."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from kara_sglang.config import KaraConfig
from kara_sglang.kernels.record import PAGE
from kara_sglang.scheduler.reserved import query_ring
from kara_sglang.scheduler.ring.demand import Demand
from kara_sglang.scheduler.ring.recorder import AttentionShape


def held(start: int, window: int, delay: int, steps: int) -> list[int]:
    """Pages of a recorder of the mean after each step, where each window is taken when it is due."""
    base, pages = start, []
    for position in range(start, start + steps):
        if position - base >= window + delay:
            base += window
        pages.append(position // PAGE - base // PAGE + 1)
    return pages


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 300), st.integers(0, 150))
def test_no_step_takes_more_than_is_foreseen(start: int, step: int, window: int, delay: int) -> None:
    """And no less, once windows follow each other, where windows begin alike in their pages."""
    demand = Demand(1000, window, delay)
    demand.add(start, step, 2)
    steps = 5 * (window + delay)
    seen = [2 * pages for pages in held(start, window, delay, steps)]
    foreseen = [int(demand._totals[(step + number) % window]) for number in range(steps)]
    assert all(ours <= most for ours, most in zip(seen, foreseen, strict=True))
    if window % PAGE == 0:
        settled = window + delay
        assert seen[settled:] == foreseen[settled:]
    assert max(seen) <= 2 * demand.peak
    demand.add(start, step, -2)
    assert demand.spare == 1000


def test_requests_that_are_apart_share_pages() -> None:
    """With windows of 512 and a delay of 64: ten pages where all begin together, six in the mean."""
    together, apart = Demand(100, 512, 64), Demand(100, 512, 64)
    for number in range(16):
        if together.fits(1, 0, 1, 0):
            together.add(1, 0, 1)
        if apart.fits(1, 32 * number, 1, 0):
            apart.add(1, 32 * number, 1)
    assert (together.peak, 100 - together.spare) == (10, 100)
    assert 100 - apart.spare <= math.ceil(16 * apart.mean) == 96
    assert not together.fits(1, 0, 1, 0)


def test_what_others_will_want_is_left() -> None:
    demand = Demand(20, 512, 64)
    assert demand.fits(1, 7, 1, kept_free=10) and not demand.fits(1, 7, 1, kept_free=11)


def test_the_documented_rooms_are_the_rings() -> None:
    """Of Qwen3-8B in 2 GiB, with the default window and delay."""
    shape = AttentionShape(36, 32, 8, 128, torch.bfloat16, torch.device("meta"))
    rows = []
    for dtype in ("model", "fp8", "fp4"):
        ring = query_ring(shape, KaraConfig(query_mem_gb=2, query_dtype=dtype))
        together = ring.num_pages // ring.demand.peak
        rows.append(f"| `{dtype}` | {ring.room(4)} | {ring.room(1)} | {together} |")
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text.split("<!-- ring rooms -->\n")[1].splitlines()[2:5] == rows
