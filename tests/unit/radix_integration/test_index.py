"""The index of layouts by itself."""

from __future__ import annotations

from array import array
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from kara_sglang.radix_integration import keys
from kara_sglang.radix_integration.index import (
    MOST_FOLLOWERS,
    MOST_STARTS,
    MOST_TRIES,
    LayoutIndex,
    tries_of_a_look,
)
from kara_sglang.radix_integration.keys import Text, physical_key
from kara_sglang.radix_integration.layout import Layout
from kara_sglang.radix_integration.row import Window


class Rows:
    """The tree, as far as the index asks it: physical keys, and which part of one it holds."""

    def __init__(self) -> None:
        self.keys: list[array] = []
        self.asked: list[int] = []  # lengths

    def put(self, text: list[int], layout: Layout) -> None:
        self.keys.append(physical_key(text_of(text), layout.windows))

    def __call__(self, ids: array) -> int:
        self.asked.append(len(ids))
        common = (
            next((i for i, (a, b) in enumerate(zip(ids, key, strict=False)) if a != b), None)
            for key in self.keys
        )
        lengths = [
            min(len(ids), len(key)) if differs is None else differs
            for differs, key in zip(common, self.keys, strict=True)
        ]
        return max(lengths, default=0)


def text_of(tokens: list[int]) -> Text:
    return Text(b"seed", memoryview(array("q", tokens)))


def windows_from(start: int, *gaps: int, width: int = 8, kept: int = 4) -> Layout:
    """A window at ``start``, and one behind each gap."""
    windows, removed = [], 0
    for gap in (0, *gaps):
        start += gap
        windows.append(Window(start, start - removed, width, kept, "all"))
        start, removed = start + width, removed + width - kept
    return Layout(tuple(windows))


def search(index: LayoutIndex, rows: Rows, text: list[int], exact: int) -> int:
    """How far the index leads, in tokens; 0 where no further than exact KV does."""
    found = index.longest(b"seed", memoryview(array("q", text)), exact, rows)
    if found is None:
        return 0
    layout, ids = found
    assert rows(ids) == len(ids)
    return layout.tokens(len(ids))


def test_forks_of_different_length_are_all_found() -> None:
    """Each goes on behind one chain with windows of its own; the next step of each must find them."""
    stem, index, rows = list(range(3, 103)), LayoutIndex(), Rows()
    forks = []
    for n in range(16):
        text = [*stem[: 30 + 4 * n], *([1000 + n] * 40)]
        layout = windows_from(16, 10 + 4 * n, 0, 3)
        index.add(b"seed", memoryview(array("q", text)), layout)
        rows.put(text, layout)
        forks.append(text)
    for text in forks:
        assert search(index, rows, [*text, 5, 5], 16) == len(text)
    assert search(index, rows, [*stem[:50], 5], 16) == 50


def test_the_clean_part_behind_a_window_counts() -> None:
    """Two rows share their first window; one is compressed behind it, the other goes on without."""
    text, index, rows = list(range(3, 103)), LayoutIndex(), Rows()
    for length, layout in ((50, windows_from(16, 2, 2)), (90, windows_from(16))):
        index.add(b"seed", memoryview(array("q", text[:length])), layout)
        rows.put(text[:length], layout)
    assert search(index, rows, [*text, 5], 16) == 90
    assert search(index, rows, [*text[:48], 5], 16) == 48


def test_what_is_gone_is_not_looked_for_again_until_it_is_back() -> None:
    """A search notes what the tree has lost, and the same row is found when it is there again."""
    text, index, rows = list(range(3, 203)), LayoutIndex(), Rows()
    layout = windows_from(16, 2, 2, 2)
    index.add(b"seed", memoryview(array("q", text)), layout)
    assert search(index, rows, text, 100) == 0
    asked = len(rows.asked)
    assert asked and search(index, rows, text, 100) == 0 and len(rows.asked) == asked
    rows.put(text, layout)
    index.add(b"seed", memoryview(array("q", text)), layout)
    assert search(index, rows, text, 100) == len(text)


def test_the_tree_is_asked_before_a_search_walks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of 60 windows that are gone, the first window tells it: no further one is tried."""
    index, rows, tokens = LayoutIndex(), Rows(), memoryview(array("q", LONG))
    index.add(b"seed", tokens, windows_from(64, *[8] * 60))
    counts = hashed(monkeypatch)
    assert search(index, rows, [*LONG, 1], 16_000) == 0
    assert counts["tries"] <= 2 and len(rows.asked) == 1


def test_the_oldest_goes_first_and_never_before_what_continues_it() -> None:
    """Eight beginnings: of three rows of three windows the last two stay, all of the first is gone."""
    index, rows, texts = LayoutIndex(capacity=8), Rows(), []
    for n in range(3):
        text = [n] * 60
        layout = windows_from(16 + n, 2, 2)
        index.add(b"seed", memoryview(array("q", text)), layout)
        rows.put(text, layout)
        texts.append(text)
        assert index.num_windows == min(4 * (n + 1), 8)
    assert [search(index, rows, text, 20) for text in texts] == [0, 60, 60]
    assert search(index, rows, texts[1], 20) == 60  # used: now the other one is older
    index.add(b"seed", memoryview(array("q", texts[0])), windows_from(16))
    assert [search(index, rows, text, 20) for text in texts] == [26, 60, 28]
    for n in range(50):
        index.add(b"other", memoryview(array("q", [9, n] * 30)), windows_from(n))
    assert set(index._starts) == {b"other"} and len(index._starts[b"other"]) == 4


def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts, from here on, tokens that are hashed and windows that are tried."""
    counts: Counter[str] = Counter()
    real, window_digest = keys.hashlib.blake2b, Text.window_digest

    class Hash:
        def __init__(self, data: bytes = b"", digest_size: int = 16, state: Any = None) -> None:
            self.state = state or real(data, digest_size=digest_size)

        def update(self, data: memoryview) -> None:
            counts["tokens"] += len(data)
            self.state.update(data)

        def copy(self) -> Hash:
            return Hash(state=self.state.copy())

        def digest(self) -> bytes:
            return self.state.digest()

    def tried(text: Text, front: bytes, window: Window) -> bytes:
        counts["tries"] += 1
        return window_digest(text, front, window)

    monkeypatch.setattr(keys, "hashlib", SimpleNamespace(blake2b=Hash))
    monkeypatch.setattr(Text, "window_digest", tried)
    return counts


LONG = [index * 7919 % 9973 for index in range(20_000)]

# Layouts of one text, and how far each is in the tree; 16,000 tokens of it are there exactly.
CROWDS: dict[str, list[tuple[Layout, int]]] = {
    "no row is left": [
        (windows_from(64 + 16 * n, *[8 * m] * 60), 0) for n in range(40) for m in range(9)
    ],
    "first windows are left": [
        (windows_from(64 + 16 * n, *[8 * m] * 60), 72 + 16 * n) for n in range(40) for m in range(9)
    ],
    "halves are left": [(windows_from(64 + n, *[n % 7] * 200), 1500) for n in range(60)],
    "many beginnings": [(windows_from(1 + n), 0) for n in range(15_000)],
    "many followers": [(windows_from(64, n), 72) for n in range(5_000)],
    "beginnings far behind": [(windows_from(15_000 + n), 0) for n in range(500)],
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_the_work_of_a_search_is_bounded(crowd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other clients have left behind, it runs in the scheduler: the text is hashed once, and a
    bounded number of windows are tried and rows looked at."""
    index = LayoutIndex()
    tokens = memoryview(array("q", LONG))
    rows = Rows()
    for layout, end in CROWDS[crowd]:
        index.add(b"seed", tokens, layout)
        if end:
            rows.put(LONG[:end], layout.within(end))
    mine = windows_from(40, *[0] * 2400)
    index.add(b"seed", tokens, mine)
    rows.put(LONG, mine)
    counts = hashed(monkeypatch)
    reached = 0
    for _ in range(12):
        rows.asked.clear()
        counts.clear()
        reached = max(reached, search(index, rows, [*LONG, 1], 16_000))
        digests = MOST_STARTS + counts["tries"]
        assert counts["tokens"] <= len(LONG) + 2 + keys._STRIDE * digests
        # One opening may pass the bound by as many as it has followers.
        assert counts["tries"] <= MOST_TRIES + len(LONG) // 8 + 2 * MOST_FOLLOWERS
        assert sum(map(tries_of_a_look, rows.asked)) <= MOST_TRIES + len(LONG) // 8 + 50
    # What a search finds gone is out of the way of the next ones. Only the longest beginnings are
    # looked at; one's own is, as a rule, as long as what is there exactly.
    far = crowd in ("many beginnings", "beginnings far behind")
    assert reached == (0 if far else len(LONG))
