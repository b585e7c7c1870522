"""The text of a trace's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from kara_sglang.trace import tokens

TEXT = "def f(x):\n    return x < 1 && '&amp;' </script> {{title}} 日本語 🙂!"


def test_pieces_are_the_text(byte_tokenizer: Path) -> None:
    """Together they are the text; a character of several tokens stands with its last one."""
    tokenizer = tokens.load_tokenizer(str(byte_tokenizer))
    ids = [*TEXT.encode(), 256]
    parts = tokens.pieces(tokenizer, ids)
    assert len(parts) == len(ids) and "".join(parts) == TEXT + "<|end|>"
    sun = TEXT.encode().index("日".encode())
    assert parts[sun : sun + 3] == ["", "", "日"]


def test_bytes_that_are_no_text_end(byte_tokenizer: Path) -> None:
    """Neither a run of broken bytes nor a character that is cut off swallows what is around it."""
    tokenizer = tokens.load_tokenizer(str(byte_tokenizer))
    ids = [*b"ab", *[0x80] * 50, *b"cd", *"日".encode()[:2]]
    text = "".join(tokens.pieces(tokenizer, ids))
    assert text.startswith("ab") and "cd" in text and text.endswith("\N{REPLACEMENT CHARACTER}")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be loaded") as caught:
        tokens.load_tokenizer(str(tmp_path / "absent"))
    assert "\n" not in str(caught.value)
