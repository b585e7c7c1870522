"""What JSON may say: objects, types and choices, each refusal one short line."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from kara_sglang.checks import checked, parse_object, shown

Choice = Literal["all", "mean"]


@pytest.mark.parametrize("text", ["{", "[1]", "3", '{"a": }', '"{}"', "null"])
def test_what_is_no_object_is_one_line_that_names_its_source(text: str) -> None:
    with pytest.raises(ValueError, match=r"^the flag: ") as refused:
        parse_object(text, "the flag")
    assert "\n" not in str(refused.value)
    assert parse_object('{"a": [1]}', "the flag") == {"a": [1]}


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, 1.0),
        (True, bool, True),
        (None, int | None, None),
        ("mean", Choice, "mean"),
        (7, Choice | int, 7),
    ],
)
def test_what_fits(value: Any, annotation: Any, expected: Any) -> None:
    found = checked("x", value, annotation)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (True, int, "x must be a whole number, got True"),
        (1.0, int, "x must be a whole number, got 1.0"),
        ("1", float | None, "x must be a number or null, got '1'"),
        ("none", Choice | bool, "x must be one of all, mean or true or false, got 'none'"),
        (2**70, str, "x must be a string, got a huge number"),
    ],
)
def test_what_does_not_fit(value: Any, annotation: Any, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        checked("x", value, annotation)
    assert str(refused.value) == message


def test_quotes_are_cut_short() -> None:
    assert shown("x" * 98) == repr("x" * 98)
    assert len(shown("x" * 10_000)) == 103
