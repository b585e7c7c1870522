"""Physical keys: one id per slot, and no token's where a window stands."""

from __future__ import annotations

from array import array

import pytest
from prefixes import VOCAB

from kara_sglang.radix_integration.keys import FIRST_ID, Text, first_stranger, physical_key, seed_of
from kara_sglang.radix_integration.row import VOTERS, Window


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


@pytest.mark.parametrize(
    "ids,index",
    [([], None), ([0, VOCAB - 1], None), ([0, VOCAB], 1), ([-1, -1], 0), ([3, 2**62, -4], 1)],
)
def test_the_first_stranger(ids: list[int], index: int | None) -> None:
    assert first_stranger(array("q", ids), VOCAB) == index
