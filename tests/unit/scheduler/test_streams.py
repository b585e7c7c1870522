"""Work of a pass is queued behind the step in flight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from kara_sglang.scheduler.streams import forward_stream


@pytest.mark.parametrize("overlap", [True, False])
def test_the_forward_stream_waits_for_the_host_and_is_left(overlap: bool) -> None:
    """For what the scheduler has queued before; without overlap there is one stream."""
    order: list[str] = []

    @contextlib.contextmanager
    def stream() -> Iterator[None]:
        order.append("enter")
        yield
        order.append("leave")

    scheduler = SimpleNamespace(
        enable_overlap=overlap,
        device_module=SimpleNamespace(current_stream=lambda: "scheduler's"),
        forward_stream=SimpleNamespace(wait_stream=lambda other: order.append(f"wait for the {other}")),
        forward_stream_ctx=stream(),
    )
    with forward_stream(scheduler):
        order.append("work")
    around = ["enter", "wait for the scheduler's"], ["leave"]
    assert order == ([*around[0], "work", *around[1]] if overlap else ["work"])
