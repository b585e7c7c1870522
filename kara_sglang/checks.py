"""JSON that people wrote: read, checked against types, and quoted in one line where it is wrong."""

from __future__ import annotations

import json
import typing
from typing import Any, Literal


def parse_object(text: str, source: str) -> dict[str, Any]:
    """A JSON object from ``text``; errors name ``source``."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not a JSON object ({error})") from None
    except (RecursionError, ValueError):  # nested too deep, or a number of thousands of digits
        raise ValueError(f"{source}: not a JSON object that can be read") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(value).__name__}")
    return value


def checked(name: str, value: Any, annotation: Any) -> Any:
    """``value`` if it has the annotated type (an int passes for a float), else ``ValueError``."""
    choices = [annotation]
    if typing.get_origin(annotation) not in (None, Literal):
        choices = list(typing.get_args(annotation))
    for choice in choices:
        if typing.get_origin(choice) is Literal:
            if value in typing.get_args(choice) and isinstance(value, str):
                return value
        elif choice is float and isinstance(value, int) and not isinstance(value, bool):
            if abs(value) < 2**53:
                return float(value)
        elif isinstance(value, choice) and not (choice is int and isinstance(value, bool)):
            return value
    raise ValueError(f"{name} must be {_describe(choices)}, got {shown(value)}")


def shown(value: Any) -> str:
    """``value`` as an error message quotes it, cut short."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _describe(choices: list[Any]) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
        str: "a string",
    }
    parts = []
    for choice in choices:
        if typing.get_origin(choice) is Literal:
            parts.append("one of " + ", ".join(typing.get_args(choice)))
        else:
            parts.append(words[choice])
    return " or ".join(parts)
