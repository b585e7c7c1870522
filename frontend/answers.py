"""Final answers: found in a text, compared, and voted on."""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Sequence
from fractions import Fraction

HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None
MISSING_MATH_VERIFY = (
    "math-verify is not installed: answers are compared as numbers and as text only, so 1/2 and "
    "\\frac{1}{2} count as different (pip install math-verify)"
)

_STATED = re.compile(r".*\banswer\s*(?:is|:|=)\s*:?\s*(.+?)(?:\.\s|$)", re.IGNORECASE | re.MULTILINE)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+|/\d+)?")
_NUMBER_AND_UNIT = re.compile(rf"\$?({_NUMBER.pattern})\s*%?(?:\s+[a-z]{{2,}}.*)?", re.IGNORECASE)
_DECORATION = " .*_`$\"'"


def extract(text: str) -> str | None:
    r"""The final answer of a solution, or None.

    The last ``\boxed{...}``; else what follows the last "Answer:" or "answer is" on its line; else the
    last number.
    """
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    if stated := [line.strip(_DECORATION) for line in _STATED.findall(text)]:
        return stated[-1] or None
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def same(one: str, other: str) -> bool:
    """Whether two answers are the same: as text, as numbers, or (with math-verify) as mathematics."""
    if _plain(one) == _plain(other):
        return True
    first, second = _number(one), _number(other)
    if first is not None and second is not None:
        return first == second
    return HAS_MATH_VERIFY and _same_mathematics(one, other)


def vote(answers: Sequence[str | None]) -> list[tuple[str, int]]:
    """Answers with their votes, most first; the earlier one first where they tie. None has no vote."""
    groups: list[list[str]] = []
    for answer in answers:
        if answer is None:
            continue
        group = next((group for group in groups if same(group[0], answer)), None)
        if group is None:
            groups.append([answer])
        else:
            group.append(answer)
    return sorted(((group[0], len(group)) for group in groups), key=lambda pair: -pair[1])


def _last_boxed(text: str) -> str | None:
    begin = text.rfind("\\boxed{")
    depth = 0
    for at in range(begin + len("\\boxed"), len(text) if begin >= 0 else 0):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin + len("\\boxed{") : at].strip()
    return None


def _plain(answer: str) -> str:
    return " ".join(answer.lower().removesuffix(".").split())


def _number(answer: str) -> Fraction | None:
    """The number that an answer is, whatever unit stands behind it; None if it is more than that."""
    found = _NUMBER_AND_UNIT.fullmatch(answer.strip(_DECORATION))
    try:
        return Fraction(found[1].replace(",", "")) if found else None
    except ZeroDivisionError:
        return None


def _same_mathematics(one: str, other: str) -> bool:
    from math_verify import parse, verify

    # Its timeouts are signals, which only the main thread may use.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    parsed = [parse(f"${answer}$", parsing_timeout=seconds) for answer in (one, other)]
    return all(parsed) and verify(*parsed, timeout_seconds=seconds)
