"""The text of single tokens, such that all of them together are the text that a user saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 8  # tokens; behind that, bytes that make no character are shown as they are


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a folder or hub name, by transformers; no code of the model is run.

    Raises
    ------
    ValueError
        One line that says why it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # what transformers, tokenizers or the hub raise is of many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"the tokenizer of {path} cannot be loaded ({reason})") from None


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text.

    A character may take several tokens; it stands with the last of them, and the others are empty.
    Tokens are decoded together with those before them, because many tokenizers drop a leading space.
    """

    def decode(first: int, end: int) -> str:
        return tokenizer.decode(
            ids[first:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    parts: list[str] = []
    before = shown = 0  # the text of [before, shown) is known, that of [shown, i) is unfinished
    for i in range(len(ids)):
        known, text = decode(before, shown), decode(before, i + 1)
        last_chance = i + 1 == len(ids) or i + 1 - shown >= _LONGEST_CHARACTER
        if text.endswith(_UNFINISHED) and not last_chance:
            parts.append("")
            continue
        parts.append(text[len(known) :])
        before, shown = shown, i + 1
    return parts


def numbers(ids: Sequence[int]) -> list[str]:
    """Token ids in place of text, for want of a tokenizer."""
    return [f"{number} " for number in ids]
