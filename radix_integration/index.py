"""The index of known layouts: under which physical keys a text is worth a look in the tree."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from kara_sglang.radix_integration.keys import Text, key_of
from kara_sglang.radix_integration.layout import Layout
from kara_sglang.radix_integration.row import Window

MOST_STARTS = 256
"""Beginnings of a text that one search looks at, the longest ones: it runs in the scheduler."""

MOST_FOLLOWERS = 64
"""Places of the next window that a search tries behind one window, the newest ones."""

MOST_TRIES = 256
"""Windows that a search may try in vain, beyond those that one row of the text can have."""

_ASKED_AT = frozenset(4**k for k in range(16))


def tries_of_a_look(length: int) -> int:
    """What asking the tree about a key of ``length`` ids counts for in :data:`MOST_TRIES`."""
    return 8 + length // 2048


@dataclass(slots=True)
class _Known:
    """A beginning of some text that is in the tree: up to the end of ``window``, or, where that is
    None, the exact part in front of a first window."""

    window: Window | None
    front: bytes  # digest of the beginning before; the seed where window is None
    end: int  # tokens
    clean: int = 0  # where the longest text behind it, up to the next window, ends
    reach: int = 0  # where the longest text behind it ends
    # How many texts go on with this window, and where the longest of them ends; the newest last.
    followers: dict[Window, tuple[int, int]] = field(default_factory=dict)

    def gone(self) -> None:
        """The tree holds it no longer, nor what continues it, until it is put there again."""
        self.clean = self.reach = 0

    def lower(self, window: Window, reach: int) -> None:
        """The follower with this window does not lead as far as it did; where it is the only one, nor
        does this."""
        count, _ = self.followers[window]
        if count == 1:
            self.followers[window] = 1, reach
            if len(self.followers) <= MOST_FOLLOWERS:
                self.reach = max(self.clean, *(reach for _, reach in self.followers.values()))


@dataclass(slots=True)
class _Step:
    """A beginning of the text that is looked for, on the way of a search."""

    known: _Known
    digest: bytes
    front: _Step | None
    depth: int  # windows
    opened: bool = False

    @property
    def window(self) -> Window:
        """Of a step that is no first one."""
        assert self.known.window is not None
        return self.known.window

    @property
    def before(self) -> _Step:
        """The step in front of one that is no first one."""
        assert self.front is not None
        return self.front

    def path(self) -> list[_Step]:
        """The steps with a window up to this one."""
        path, step = [], self
        while step.front is not None:
            path.append(step)
            step = step.front
        return path[::-1]


class LayoutIndex:
    """Where compressed windows were put, by a digest of all that lies before their end.

    It only says which physical keys are worth a look in the tree. What it has forgotten is a miss, and
    what it remembers too long is not found there and ages, so it needs no word from the tree about
    evictions.

    The work of a search is bounded by the text's length and :data:`MOST_TRIES`, whatever other clients'
    texts have left behind: each token is hashed once, a window is tried only behind windows that are
    this text's, and the tree is asked about the first window, and then whenever there are four times
    as many, before the search goes on behind them.

    Parameters
    ----------
    capacity : int
        Beginnings that are remembered in all; what was least recently used goes first, and never before
        those that continue it.
    """

    def __init__(self, capacity: int = 65536) -> None:
        self.capacity = capacity
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._starts: dict[bytes, list[int]] = {}  # of first windows, ascending, by seed

    @property
    def num_windows(self) -> int:
        """Beginnings that are remembered."""
        return len(self._known)

    def add(self, seed: bytes, tokens: memoryview, layout: Layout) -> None:
        """Remember that ``tokens`` are in the tree under ``layout``."""
        text, windows = Text(seed, tokens), layout.windows
        path = [text.digest(windows[0].logical_start), *text.window_digests(windows)]
        first = self._remember(path[0], None, seed, windows[0].logical_start)
        ends = [first]
        for front, digest, window in zip(path[:-1], path[1:], windows, strict=True):
            before = ends[-1]
            count, reach = before.followers.pop(window, (0, 0))
            count += digest not in self._known
            before.followers[window] = count, max(reach, len(tokens))
            before.clean = max(before.clean, window.logical_start)
            ends.append(self._remember(digest, window, front, window.logical_start + window.width))
        for known in ends:
            known.reach = max(known.reach, len(tokens))
        ends[-1].clean = max(ends[-1].clean, len(tokens))
        self._touch(path)
        while len(self._known) > self.capacity:
            self._forget_oldest()

    def longest(
        self, seed: bytes, tokens: memoryview, exact: int, cached: Callable[[array[int]], int]
    ) -> tuple[Layout, array[int]] | None:
        """The layout under which more of a text is in the tree than under its tokens.

        Parameters
        ----------
        seed : bytes
        tokens : memoryview of int64
            The text.
        exact : int
            Tokens of it that the tree holds as they are. No first window can start behind them.
        cached : callable
            Physical key -> how many of its slots the tree holds.

        Returns
        -------
        tuple of Layout and array, or None
            The windows, and the physical key of what is there.
        """
        text, best, reached = Text(seed, tokens), None, exact
        stack = self._beginnings(text, exact)
        tries = MOST_TRIES
        if stack:
            tries += text.length // next(iter(stack[-1].known.followers)).width

        def look(path: list[_Step], end: int) -> tuple[array[int], Layout, int]:
            """The key of the text up to ``end``; which windows of it, and how much, the tree holds."""
            nonlocal tries
            layout = Layout(tuple(step.window for step in path))
            ids = key_of(tokens[:end], layout.windows, [step.digest for step in path])
            tries -= tries_of_a_look(len(ids))
            there = layout.tokens(cached(ids))
            held = layout.within(there)
            for step in path[len(held.windows) :]:
                step.known.gone()
            if len(held.windows) < len(path):
                for step in reversed(path[: len(held.windows) + 1]):
                    step.before.known.lower(step.window, step.known.reach)
            return ids, held, there

        while stack and tries > 0 and reached < text.length:
            step = stack.pop()
            known = step.known
            if step.opened:
                if step.depth and min(known.clean, text.length) > reached:
                    path = step.path()
                    ids, held, there = look(path, text.length)
                    if there > reached:
                        reached, best = there, (path, held, ids[: held.slots(there)])
                continue
            gone = step.depth > 0 and not step.before.known.reach
            if gone or min(known.reach, text.length) <= reached:
                continue
            if known.followers:
                asks = step.depth in _ASKED_AT
                if asks and look(step.path(), known.end)[2] < known.end:
                    continue
            step.opened = True
            stack.append(step)
            followers, tried = self._followers(step, text, reached)
            stack += followers
            tries -= tried
        if best is None:
            return None
        path, held, ids = best
        self._touch([path[0].before.digest, *(one.digest for one in path[: len(held.windows)])])
        return held, ids

    def clear(self) -> None:
        self._known.clear()
        self._starts.clear()

    def _beginnings(self, text: Text, exact: int) -> list[_Step]:
        """Known exact parts that the text begins with; the one that may lead furthest last."""
        starts = self._starts.get(text.seed, [])
        end = bisect_right(starts, exact)
        steps = []
        for start in dict.fromkeys(starts[max(0, end - MOST_STARTS) : end]):
            digest = text.digest(start)
            known = self._known.get(digest)
            if known is not None and known.followers:
                steps.append(_Step(known, digest, None, 0))
        return sorted(steps, key=_promise(text))

    def _followers(self, step: _Step, text: Text, reached: int) -> tuple[list[_Step], int]:
        """Known windows behind a step that are the text's and may lead further than ``reached``, the
        one that may lead furthest last; and how many were tried."""
        steps, tried = [], 0
        for window, (_, reach) in islice(reversed(step.known.followers.items()), MOST_FOLLOWERS):
            end = window.logical_start + window.width
            if end <= text.length and min(reach, text.length) > reached:
                tried += 1
                digest = text.window_digest(step.digest, window)
                known = self._known.get(digest)
                if known is not None:
                    steps.append(_Step(known, digest, step, step.depth + 1))
        return sorted(steps, key=_promise(text)) if len(steps) > 1 else steps, tried

    def _remember(self, digest: bytes, window: Window | None, front: bytes, end: int) -> _Known:
        known = self._known.get(digest)
        if known is None:
            known = self._known[digest] = _Known(window, front, end)
            if window is None:
                insort(self._starts.setdefault(front, []), end)
        return known

    def _touch(self, path: list[bytes]) -> None:
        """A beginning stays younger than all that continue it."""
        for digest in reversed(path):
            self._known.move_to_end(digest)

    def _forget_oldest(self) -> None:
        """Forget the beginning that was used last before all others; nothing continues it."""
        _, known = self._known.popitem(last=False)
        if known.window is None:
            starts = self._starts[known.front]
            del starts[bisect_left(starts, known.end)]
            if not starts:
                del self._starts[known.front]
            return
        followers = self._known[known.front].followers
        count, reach = followers[known.window]
        if count > 1:
            followers[known.window] = count - 1, reach
        else:
            del followers[known.window]


def _promise(text: Text) -> Callable[[_Step], tuple[int, int]]:
    """Orders steps by how far they may lead; on ties the longer exact part comes later."""
    return lambda step: (min(step.known.reach, text.length), step.known.end)
