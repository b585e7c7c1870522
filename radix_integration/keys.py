"""Physical keys: what a compressed row is called in SGLang's prefix tree, one id per slot.

The id of an exact or clean slot is its token. A window's R slots get R ids of their own, drawn from a
hash of everything before the window, the settings that chose its tokens, and its W tokens: no token id
is as large, and a text that differs anywhere up to the window's end gets other ids. So key and value
have the same length, as the tree demands, exact and compressed rows share the nodes of their exact
part, and a match never ends inside a window.

All of it rests on texts that hold tokens only: a "text" of ids could claim to be any window. SGLang
lets a client send any number as a token id, so :func:`first_stranger` looks at every text, once where
requests come in and once more where keys meet the tree.

Python's ``hash()`` is not used: all tensor-parallel ranks must get the same ids.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from kara_sglang.radix_integration.row import Window

FIRST_ID = 1 << 60
"""Ids of windows are this large and smaller than twice as much; no token is."""

_STRIDE = 256  # tokens; hashing so many takes as long as all else that a digest takes


def first_stranger(ids: array[int] | memoryview, vocab_size: int) -> int | None:
    """Index of the first of ``ids`` (int64) that is no token: outside [0, ``vocab_size``); or None."""
    unsigned = np.frombuffer(ids, dtype=np.uint64)  # a negative one is larger than any token
    if not len(unsigned) or unsigned.max() < vocab_size:
        return None
    return int((unsigned >= vocab_size).argmax())


def seed_of(settings: bytes, extra_key: str | None, cache_salt: str | None) -> bytes:
    """What all hashes of a request begin with: whom it shares with (LoRA, salt) and its settings.

    Parameters
    ----------
    settings : bytes
        Everything that has a say in which tokens of a window are kept.
    extra_key, cache_salt : str or None
        As in SGLang's ``RadixKey``.
    """
    return repr((settings, extra_key, cache_salt or None)).encode()


class Text:
    """A text, and digests of its beginnings: each token is hashed once, whatever is asked for.

    Parameters
    ----------
    seed : bytes
        Of :func:`seed_of`.
    tokens : memoryview of int64
    """

    def __init__(self, seed: bytes, tokens: memoryview) -> None:
        self.seed = seed
        self.tokens = tokens
        self.length = len(tokens)
        self._states = [hashlib.blake2b(seed, digest_size=16)]  # of the hash, every _STRIDE tokens
        self._digests: dict[int, bytes] = {}

    def digest(self, end: int) -> bytes:
        """A digest of all before token ``end``, 16 bytes."""
        digest = self._digests.get(end)
        if digest is None:
            stride = end // _STRIDE
            for last in range(len(self._states) - 1, stride):
                state = self._states[last].copy()
                state.update(self.tokens[last * _STRIDE : (last + 1) * _STRIDE])
                self._states.append(state)
            state = self._states[stride].copy()
            state.update(self.tokens[stride * _STRIDE : end])
            digest = self._digests[end] = state.digest()
        return digest

    def window_digest(self, front: bytes, window: Window) -> bytes:
        """A digest of all before the end of ``window``, and of how it and those before it were made.

        ``front`` is that of the window before; of the first one, :meth:`digest` of what lies before it.
        """
        end = window.logical_start + window.width
        made = f"{window.logical_start} {window.width} {window.kept} {window.mark}".encode()
        return hashlib.blake2b(front + self.digest(end) + made, digest_size=16).digest()

    def window_digests(self, windows: Sequence[Window]) -> list[bytes]:
        """:meth:`window_digest` of each of a row's windows; all of them lie wholly in the text."""
        digests: list[bytes] = []
        front = self.digest(windows[0].logical_start) if windows else b""
        for window in windows:
            front = self.window_digest(front, window)
            digests.append(front)
        return digests


def physical_key(text: Text, windows: Sequence[Window]) -> array[int]:
    """Ids of the slots that hold ``text``, int64.

    As long as the text less what the windows, which are ascending and lie wholly in it, gave back.
    """
    return key_of(text.tokens, windows, text.window_digests(windows))


def key_of(tokens: memoryview, windows: Sequence[Window], digests: Sequence[bytes]) -> array[int]:
    """:func:`physical_key`, where the windows' digests are known."""
    key, done, taken = array("q"), 0, 0
    ids = _ids(digests, [window.kept for window in windows]).data
    for window in windows:
        key.frombytes(tokens[done : window.logical_start].cast("B"))
        key.frombytes(ids[taken : taken + window.kept].cast("B"))
        done, taken = window.logical_start + window.width, taken + window.kept
    key.frombytes(tokens[done:].cast("B"))
    return key


def _ids(digests: Sequence[bytes], counts: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``counts[k]`` ids for window k, one after the other; a window's first two carry 60 bits each of
    the digest, so two windows of more than one slot are the same where 120 bits of their digests are.
    Windows of one slot get no key (``KaraConfig.may_share``)."""
    halves = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    first, step = np.repeat(halves, counts, axis=0).T
    ends = np.cumsum(counts, dtype=np.int64)
    place = np.arange(len(first)) - np.repeat(ends - counts, counts)  # in its window
    ids = first + place.astype(np.uint64) * step
    return (ids & np.uint64(FIRST_ID - 1) | np.uint64(FIRST_ID)).view(np.int64)
