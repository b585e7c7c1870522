"""The interval map of a row."""

from __future__ import annotations

from random import Random

import pytest

from kara_sglang.radix_integration.layout import Layout
from kara_sglang.radix_integration.row import Window


def test_the_interval_map_against_a_list() -> None:
    """Every token and slot of random layouts, counted one by one."""
    random = Random(3)
    for _ in range(200):
        page = random.choice([1, 4])
        windows, at, removed = [], 0, 0
        for _ in range(random.randrange(4)):
            at += page * random.randrange(3)
            width = page * random.randrange(2, 5)
            kept = page * random.randrange(1, width // page)
            windows.append(Window(at, at - removed, width, kept))
            at += width
            removed += width - kept
        layout = Layout(tuple(windows))
        layout.check(page)
        total = at + 3 * page
        # The token at whose border each slot border lies; None inside a window.
        border: list[int | None] = [0]
        token = 0
        while token < total:
            window = next((one for one in windows if one.logical_start == token), None)
            if window is None:
                token += 1
                border.append(token)
            else:
                token += window.width
                border += [None] * (window.kept - 1) + [token]
        starts = {one.kv_start: one for one in windows}
        last = 0
        for slots, tokens in enumerate(border):
            last = slots if tokens is not None else last
            assert layout.tokens(slots) == border[last]
            if tokens is not None:
                assert layout.slots(tokens) == slots
            assert last in starts or tokens is not None
        assert layout.removed == total - len(border) + 1
        for tokens in range(total):
            inside = [one for one in windows if 0 < tokens - one.logical_start < one.width]
            if inside:
                assert layout.slots(tokens) == inside[0].kv_start
            whole = [one for one in windows if one.logical_start + one.width <= tokens]
            assert layout.within(tokens).windows == tuple(whole)


@pytest.mark.parametrize("reach", [0, 1, 5, 8])
def test_where_a_prefix_ends_clean(reach: int) -> None:
    """The largest length up to a given one, outside windows, with ``reach`` slots of no window before
    it, or in front of all windows."""
    windows = (Window(8, 8, 8, 4), Window(16, 12, 8, 4), Window(30, 22, 8, 4))
    layout = Layout(windows)
    for slots in (*range(9), 12, *range(16, 23), *range(26, 40)):

        def clean(length: int) -> bool:
            inside = [one for one in windows if one.kv_start < length]
            return not inside or length >= inside[-1].kv_start + 4 + reach

        expected = max(length for length in range(slots + 1) if clean(length))
        assert layout.ending_clean(slots, reach) == expected


@pytest.mark.parametrize(
    "window",
    [
        Window(8, 8, 8, 8),  # nothing was removed
        Window(8, 8, 8, 0),
        Window(9, 9, 8, 4),
        Window(8, 8, 6, 4),
        Window(8, 4, 8, 4),  # its slots do not follow from the windows before
    ],
)
def test_a_broken_map_is_noticed(window: Window) -> None:
    with pytest.raises(RuntimeError, match=r"^kv-compress: "):
        Layout((window,)).check(4)
    with pytest.raises(RuntimeError, match="does not continue"):
        Layout((Window(8, 8, 8, 4), Window(12, 8, 8, 4))).check(4)
