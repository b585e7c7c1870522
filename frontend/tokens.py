"""Text that remembers its token ids.

A program of SGLang's frontend language is one growing text. Tokenising that text anew at each step
need not give back the ids that the model wrote, and one id that differs makes the prefix cache miss
from there on. :class:`TokenText` is a ``str`` that knows the ids of the parts that have already been
sent or generated; SGLang's interpreter adds, copies (``fork``) and cuts it like any text, so the ids
go wherever the text goes, also through variables (``s += other["plan"]``). So does what the requests
that wrote its parts asked for (``custom_params``), which is what the KV of these parts depends on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, SupportsIndex

from sglang.lang.global_config import global_config


class Piece(NamedTuple):
    """A part of a text."""

    text: str
    ids: tuple[int, ...] | None  # None: not tokenised yet
    custom_params: dict[str, Any] | None = None  # of the request that generated it; None: nobody did


class TokenText(str):
    """A ``str`` made of pieces, each with its token ids or without.

    ``+`` keeps the ids on both sides, a slice keeps those of the pieces that lie in it as a whole, and
    ``str(text)`` is the text itself. Everything else (``strip``, f-strings, ...) gives a plain ``str``.
    """

    pieces: tuple[Piece, ...]

    def __new__(cls, text: str = "", pieces: Iterable[Piece] | None = None) -> TokenText:
        if pieces is None:
            pieces = text.pieces if isinstance(text, TokenText) else (Piece(text, None),)
        merged: list[Piece] = []
        for piece in pieces:
            if merged and merged[-1].ids is None and piece.ids is None:
                merged[-1] = Piece(merged[-1].text + piece.text, None)
            elif piece.text or piece.ids:
                merged.append(piece)
        self = super().__new__(cls, "".join(piece.text for piece in merged))
        self.pieces = tuple(merged)
        return self

    @property
    def ids(self) -> list[int]:
        """Ids of the whole text; a ``ValueError`` while a part of it has none."""
        if any(piece.ids is None for piece in self.pieces):
            raise ValueError("a part of this text is not tokenised yet")
        return [token for piece in self.pieces for token in piece.ids or ()]

    @property
    def custom_params(self) -> dict[str, Any] | None:
        """Of the request that generated the newest generated part; None where there is no such part."""
        given = (piece.custom_params for piece in reversed(self.pieces))
        return next((params for params in given if params is not None), None)

    def __str__(self) -> TokenText:  # SGLang copies texts with str(); the ids must survive it
        return self

    def __add__(self, other: str) -> TokenText:
        if not isinstance(other, str):
            return NotImplemented
        return TokenText(pieces=(*self.pieces, *TokenText(other).pieces))

    def __radd__(self, other: str) -> TokenText:
        if not isinstance(other, str):
            return NotImplemented
        return TokenText(other) + self

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        text = super().__getitem__(index)
        if not isinstance(index, slice) or index.step not in (None, 1):
            return text
        start, stop, _ = index.indices(len(self))
        pieces, at = [], 0
        for piece in self.pieces:
            end = at + len(piece.text)
            if start <= at and end <= stop:
                pieces.append(piece)
            else:
                pieces.append(Piece(piece.text[max(start - at, 0) : max(stop - at, 0)], None))
            at = end
        return TokenText(pieces=pieces)


def decoding() -> dict[str, bool]:
    """How SGLang's frontend language has ids decoded, here and by the server."""
    return {
        "skip_special_tokens": global_config.skip_special_tokens_in_output,
        "spaces_between_special_tokens": global_config.spaces_between_special_tokens_in_out,
    }


class Tokens:
    """A model's tokenizer, used the way a growing text needs it.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's own.
    """

    # Ids before a generated text that settle how it is decoded (a leading space, half a character).
    CONTEXT = 5

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # a fast tokenizer must not be used by two threads at once
        # SentencePiece tokenizers put a space before each text; "\n" keeps it off a continuation.
        self._anchor = self._encode("\n") if self._decode(self._encode("a") * 2) != "aa" else []

    def _encode(self, text: str, special: bool = False) -> list[int]:
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=special))

    def _decode(self, ids: Sequence[int]) -> str:
        with self._lock:
            return self.tokenizer.decode(list(ids), **decoding())

    def is_special(self, token: int) -> bool:
        return token in self.tokenizer.all_special_ids or token in self.tokenizer.added_tokens_decoder

    def continuation(self, text: str) -> list[int]:
        """Ids of ``text`` where it follows another text."""
        if not self._anchor:
            return self._encode(text)
        return self._encode("\n" + text)[len(self._anchor) :]

    def start(self, text: str, *, chat: bool) -> list[int]:
        """Ids of ``text`` where a prompt begins with it.

        A chat template writes its special tokens itself; plain text gets those that the tokenizer adds
        (the server does the same), unless it already begins with them.
        """
        bos = self.tokenizer.bos_token
        return self._encode(text, special=not chat and not (bos and text.startswith(bos)))

    def fixed(self, text: str, *, start: bool, chat: bool = False) -> TokenText:
        """The same text with ids for all of it; ids that are there already stay.

        ``start``: a prompt begins with it (``chat`` as for :meth:`start`); else it follows a text.
        """
        pieces: list[Piece] = []
        for piece in TokenText(text).pieces:
            ids: Iterable[int] | None = piece.ids
            if ids is None and start and not pieces:
                ids = self.start(piece.text, chat=chat)
            elif ids is None:
                ids = self.continuation(piece.text)
            pieces.append(piece._replace(ids=tuple(ids)))
        return TokenText(pieces=pieces)

    def generated(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        text: str | None,
        matched: int | str | None,
        custom_params: dict[str, Any],
    ) -> TokenText:
        """What a model wrote, with the ids to go on from.

        Parameters
        ----------
        prompt, output : sequence of int
            Ids sent and ids that came back.
        text : str or None
            The server's decoding, without the matched stop; None from a server without a tokenizer.
        matched : int, str or None
            ``finish_reason.matched``: a stop token, which is cut off here as it is in the text; or a
            stop string, which may end inside a token: then the longest run of tokens that lies within
            the text is kept, and the characters behind it are tokenised with what follows.
        custom_params : dict
            Of the request; empty where it had none.
        """
        output = list(output)
        if isinstance(matched, int) and output and output[-1] == matched:
            output.pop()
        tail = list(prompt[-self.CONTEXT :])
        skip = len(self._decode(tail))
        if text is None:
            text = self._decode(tail + output)[skip:]
        if not isinstance(matched, str):
            return TokenText(pieces=[Piece(text, tuple(output), custom_params)])
        while not text.startswith(kept := self._decode(tail + output)[skip:]):
            output.pop()
        rest = Piece(text[len(kept) :], None)
        return TokenText(pieces=[Piece(kept, tuple(output), custom_params), rest])
