"""What a row knows of itself: states that must not be compressed, and where windows begin."""

from __future__ import annotations

from typing import Any

import pytest

from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.radix_integration.row import (
    Geometry,
    RequestState,
    Window,
    ceil_align,
)

GEOMETRY = Geometry(page_size=4, window=16, delay=2)


def state(**changes: Any) -> RequestState:
    return RequestState(
        **{"selector": REGISTRY["recent"](), "kept": 8, "seed": 0, "base": 20} | changes
    )


@pytest.mark.parametrize(
    "changes,kv_len,protected,message",
    [
        ({"base": 21}, 90, 20, "base 21 is no multiple of page 4"),
        ({"kept": 6}, 90, 20, "R 6 is no multiple of page 4"),
        ({"kept": 0}, 90, 20, r"R 0 not in \(0, 16\]"),
        ({"kept": 20}, 90, 20, r"R 20 not in \(0, 16\]"),
        ({}, 90, 24, "window at 20 reaches into the 24 tokens that the prefix tree owns"),
        ({}, 37, 20, "window at 20 taken at KV length 37, due at 38"),
        ({"removed": 8}, 90, 20, "8 removed, windows say otherwise"),
        ({"windows": [Window(16, 16, 16, 8)], "removed": 8}, 90, 20, "window at 20 overlaps"),
        ({"windows": [Window(8, 8, 16, 8)], "removed": 8}, 90, 20, "window at 20 leaves a gap behind"),
    ],
)
def test_a_broken_state_is_not_compressed(
    changes: dict[str, Any], kv_len: int, protected: int, message: str
) -> None:
    """Each invariant of a window raises with its numbers; the state just short of it does not."""
    state().check(GEOMETRY, 38, 20)
    state(windows=[Window(8, 8, 16, 8)], removed=8, reused=1).check(GEOMETRY, 38, 20)
    with pytest.raises(RuntimeError, match=f"kv-compress: .*{message}"):
        state(**changes).check(GEOMETRY, kv_len, protected)


def test_commit_and_beginnings_of_windows() -> None:
    """Host arithmetic of windows: one begins at the base and at each W tokens behind it."""
    one = state(selector=REGISTRY["kara"]())
    assert one.due_at(GEOMETRY) == 38 and one.uncompressed(19) == 0 and one.uncompressed(25) == 5
    assert [n for n in range(60) if one.next_window(n, GEOMETRY) == 0] == [20, 36, 52]
    assert [one.next_window(n, GEOMETRY) for n in (3, 19, 21, 35, 37)] == [17, 1, 15, 1, 15]
    assert one.commit(GEOMETRY, "none") == Window(20, 20, 16, 8, "none")
    assert (one.base, one.removed) == (28, 8)
    assert one.commit(GEOMETRY, "mean") == Window(36, 28, 16, 8, "mean")
    assert (one.base, one.removed, one.without_queries()) == (36, 16, 1)
    one.check(GEOMETRY, 36 + 18, 20)
    one.reused = 1  # the first came with the prefix
    assert one.without_queries() == 0
    assert [ceil_align(n, 16) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]
