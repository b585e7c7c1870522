"""``frontend.answers``: finding, comparing and counting answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from kara_sglang.frontend import answers
from kara_sglang.frontend.answers import extract, same, vote


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 3 + 4 = 7.\nAnswer: 7", "7"),
        ("First the answer is 3. Wait. The answer is 4.", "4"),
        ("**Answer:** $12.50", "12.50"),
        ("Answer: The answer is 180", "180"),
        ("Answer: 36. This is what was asked for.", "36"),
        ("Answer: x + 1\nbecause it is so", "x + 1"),
        (r"We get \boxed{\frac{1}{2}}, so the answer is near.", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"cut off: \boxed{12", "12"),
        ("there are 1,200 of 3", "3"),
        ("about -1,200.5", "-1,200.5"),
        ("no idea", None),
        ("", None),
    ],
)
def test_extract(text: str, answer: str | None) -> None:
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("42", "42.0", True),
        ("1,200", "1200", True),
        ("$5", "5 dollars", True),
        ("0.5", "1/2", True),
        ("Paris", "paris.", True),
        ("5x", "5", False),
        ("7", "8", False),
        ("1/0", "0", False),
        ("yes", "no", False),
    ],
)
def test_same_without_mathematics(one: str, other: str, equal: bool, monkeypatch) -> None:
    monkeypatch.setattr(answers, "HAS_MATH_VERIFY", False)
    assert same(one, other) is equal
    assert same(other, one) is equal


def test_same_with_mathematics() -> None:
    pytest.importorskip("math_verify")

    def compare() -> tuple[bool, bool]:
        return same(r"\frac{1}{2}", "0.5"), same("x + 1", "x + 2")

    assert compare() == (True, False)
    with ThreadPoolExecutor(1) as pool:  # math-verify's timeouts work in the main thread only
        assert pool.submit(compare).result() == (True, False)


def test_vote() -> None:
    assert vote(["7", None, "8", "7.0", "eight"]) == [("7", 2), ("8", 1), ("eight", 1)]
    assert vote(["2", "1", "1", "2"]) == [("2", 2), ("1", 2)]
    assert vote([None, None]) == []
