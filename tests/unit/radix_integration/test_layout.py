"""The interval map of a row, and the keys of its windows."""

from __future__ import annotations

from array import array
from random import Random

import pytest

from kara_sglang.radix_integration.keys import FIRST_ID, Text, physical_key, seed_of
from kara_sglang.radix_integration.layout import Layout
from kara_sglang.radix_integration.row import VOTERS, Window


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


def test_keys_are_tokens_and_ids_that_no_token_has() -> None:
    """One id per slot; the ids of a window say everything up to its end and nothing behind it."""
    tokens = list(range(100, 140))
    windows = (Window(8, 8, 8, 4), Window(20, 16, 8, 4))
    seed = seed_of(b"settings", "lora", "salt")

    def key(ids: list[int] = tokens, start: bytes = seed, cut: tuple = windows) -> list[int]:
        return physical_key(Text(start, memoryview(array("q", ids))), cut).tolist()

    one = key()
    assert len(one) == 40 - 8
    assert one[:8] == tokens[:8] and one[12:16] == tokens[16:20] and one[20:] == tokens[28:]
    drawn = one[8:12] + one[16:20]
    assert all(FIRST_ID <= ident < 2 * FIRST_ID for ident in drawn) and len(set(drawn)) == 8
    # The same in every process and on every rank.
    assert one[8] == 1305857510282797703
    for position, first_changed in ((3, 8), (15, 8), (17, 13), (27, 16), (30, 22)):
        other = key([*tokens[:position], 7, *tokens[position + 1 :]])
        differs = [index for index in range(32) if other[index] != one[index]]
        assert {8, 9, 10, 11} <= set(differs) or position > 15
        assert {16, 17, 18, 19} <= set(differs) or position > 27
        assert min(index for index in differs if index >= 8) == first_changed
    for start in (
        seed_of(b"other", "lora", "salt"),
        seed_of(b"settings", None, "salt"),
        seed_of(b"settings", "lora", None),
        seed_of(b"settings", "salt", "lora"),
    ):
        assert not set(key(start=start)[8:12]) & set(drawn)
    assert key(cut=(Window(8, 8, 8, 5), Window(20, 17, 8, 4)))[8:12] != one[8:12]
    chosen_by = [key(cut=(Window(8, 8, 8, 4, mark), windows[1])) for mark in (*VOTERS, "seed 1")]
    assert all(other[:8] == one[:8] and other[20:] == one[20:] for other in chosen_by)
    assert len({ident for other in (one, *chosen_by) for ident in other[8:12] + other[16:20]}) == 5 * 8
    assert seed_of(b"x", None, "") == seed_of(b"x", None, None)
