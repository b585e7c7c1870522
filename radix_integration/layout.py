"""Which slot of a row stands for which token: the interval map, and the index of known layouts.

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

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from kara_sglang.radix_integration.keys import prefix_digests
from kara_sglang.state import Window


@dataclass(frozen=True, slots=True)
class Layout:
    """The compressed windows of a row, ascending; without any, slots and tokens are the same."""

    windows: tuple[Window, ...] = ()

    @property
    def removed(self) -> int:
        """Logical length minus KV length."""
        return sum(window.freed for window in self.windows)

    def within(self, tokens: int) -> Layout:
        """The windows that lie wholly in the first ``tokens`` tokens."""
        windows = self.windows
        while windows and windows[-1].logical_start + windows[-1].width > tokens:
            windows = windows[:-1]
        return Layout(windows)

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


MOST_STARTS = 64
"""Beginnings of a text that one search looks at, the longest ones: it runs in the scheduler."""


class LayoutIndex:
    """Where compressed windows were put behind an exact text: ``digest(tokens[:a_1]) -> layouts``.

    It only says which physical keys are worth a look in the tree. What it has forgotten is a miss, and
    what it remembers too long matches nothing, so it needs no word from the tree about evictions.

    Parameters
    ----------
    capacity : int
        Windows that are remembered in all; what was least recently used goes first.
    per_text : int
        Layouts that are remembered for one digest. Each request that goes on behind one chain puts its
        windows behind its own prompt, so forks of different length have layouts of their own.
    """

    def __init__(self, capacity: int = 65536, per_text: int = 32) -> None:
        self.capacity = capacity
        self.per_text = per_text
        self.num_windows = 0
        self._layouts: OrderedDict[bytes, list[Layout]] = OrderedDict()  # the newest layout first
        self._num_with_start: Counter[int] = Counter()  # digests by a_1

    def add(self, seed: bytes, tokens: memoryview, layout: Layout) -> None:
        """Remember that ``tokens`` are in the tree under ``layout``, or that they were found there."""
        [digest] = prefix_digests(seed, tokens, [layout.windows[0].logical_start])
        known = self._forget(digest)
        longer = (one for one in known if one.windows[: len(layout.windows)] == layout.windows)
        layout = next(longer, layout)
        # A layout that this one continues is part of it.
        others = [one for one in known if one.windows != layout.windows[: len(one.windows)]]
        self._remember(digest, [layout, *others][: self.per_text])
        while self.num_windows > self.capacity:
            self._forget(next(iter(self._layouts)))

    def find(self, seed: bytes, tokens: memoryview, limit: int) -> Iterator[Layout]:
        """Layouts whose first window starts in the first ``limit`` tokens of a text that begins with
        ``tokens``; the longest exact parts first."""
        within = (start for start in self._num_with_start if start <= limit)
        starts = sorted(heapq.nlargest(MOST_STARTS, within))
        for digest in reversed(prefix_digests(seed, tokens, starts)):
            yield from self._layouts.get(digest, ())

    def clear(self) -> None:
        self.num_windows = 0
        self._layouts.clear()
        self._num_with_start.clear()

    def _remember(self, digest: bytes, layouts: list[Layout]) -> None:
        self._layouts[digest] = layouts
        self._num_with_start[layouts[0].windows[0].logical_start] += 1
        self.num_windows += sum(len(layout.windows) for layout in layouts)

    def _forget(self, digest: bytes) -> list[Layout]:
        layouts = self._layouts.pop(digest, [])
        if layouts:
            start = layouts[0].windows[0].logical_start
            self._num_with_start[start] -= 1
            if not self._num_with_start[start]:
                del self._num_with_start[start]
            self.num_windows -= sum(len(layout.windows) for layout in layouts)
        return layouts
