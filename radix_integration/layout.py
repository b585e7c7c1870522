"""Which slot of a row stands for which token: the interval map.

A request's text and its KV row are the same sequence of parts, as half-open intervals (window k covers
W tokens from logical position a_k on and holds R slots from KV index b_k on)::

    part     exact      window 1        clean             window 2        clean
    tokens   [0, a_1)   [a_1, a_1 + W)  [a_1 + W, a_2)    [a_2, a_2 + W)  [a_2 + W, n)
    slots    [0, b_1)   [b_1, b_1 + R)  [b_1 + R, b_2)    [b_2, b_2 + R)  [b_2 + R, m)

Exact and clean parts hold one slot per token, in order; a clean part is exact but for what its tokens
saw of the windows before it. So ``a_1 = b_1``, and ``a_k - b_k`` is what the windows before k gave
back. All borders are page borders on both sides, because W, R and the first border are. A position
inside a window has no counterpart on the other side: there both maps fall back to the window's start,
which is where a text that differs inside a window can be continued from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from kara_sglang.radix_integration.row import Window


@dataclass(frozen=True, slots=True)
class Layout:
    """The compressed windows of a row, ascending; without any, slots and tokens are the same."""

    windows: tuple[Window, ...] = ()

    @staticmethod
    def of(windows: Iterable[Window]) -> Layout:
        """Of a row with these windows; one of which all is kept is exact."""
        return Layout(tuple(window for window in windows if window.freed))

    @property
    def removed(self) -> int:
        """Logical length minus KV length."""
        return sum(window.freed for window in self.windows)

    def within(self, tokens: int) -> Layout:
        """The windows that lie wholly in the first ``tokens`` tokens."""
        whole = bisect_right(self.windows, tokens, key=lambda one: one.logical_start + one.width)
        return self if whole == len(self.windows) else Layout(self.windows[:whole])

    def slots(self, tokens: int) -> int:
        """KV length of the first ``tokens`` tokens; inside a window: up to the window's start."""
        inside = self.within(tokens)
        if len(inside.windows) < len(self.windows):
            tokens = min(tokens, self.windows[len(inside.windows)].logical_start)
        return tokens - inside.removed

    def tokens(self, slots: int) -> int:
        """Logical length of the first ``slots`` slots; inside a window: up to the window's start."""
        removed = 0
        for window in self.windows:
            if slots <= window.kv_start:
                break
            if slots < window.kv_start + window.kept:
                return window.logical_start
            removed += window.freed
        return slots + removed

    def ending_clean(self, slots: int, reach: int) -> int:
        """The most of the first ``slots`` slots, which end outside windows, that ends with ``reach``
        slots that are no window's, or in front of the first window."""
        for window in reversed(self.windows):
            end = window.kv_start + window.kept
            if slots >= end + reach:
                return slots
            slots = min(slots, window.kv_start)
        return slots

    def check(self, page_size: int) -> None:
        """Raise ``RuntimeError`` where an invariant of the map does not hold."""
        removed = end = 0
        for window in self.windows:
            borders = (window.logical_start, window.kv_start, window.width, window.kept)
            if any(border % page_size for border in borders):
                raise RuntimeError(f"kv-compress: {window} does not end at borders of {page_size}")
            if not 0 < window.kept < window.width:
                raise RuntimeError(f"kv-compress: {window} is no compressed window")
            if window.kv_start < end or window.logical_start - window.kv_start != removed:
                raise RuntimeError(f"kv-compress: {window} does not continue {self.windows}")
            end = window.kv_start + window.kept
            removed += window.freed
