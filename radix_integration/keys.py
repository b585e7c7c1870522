"""Physical keys: what a compressed row is called in SGLang's prefix tree, one id per slot.

The id of an exact or clean slot is its token. A window's R slots get R ids of their own, drawn from a
hash of everything before the window, the settings that chose its tokens, and its W tokens: no token id
is as large, and a text that differs anywhere up to the window's end gets other ids. So key and value
have the same length, as the tree demands, exact and compressed rows share the nodes of their exact
part, and a match never ends inside a window.

Python's ``hash()`` is not used: all tensor-parallel ranks must get the same ids.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from kara_sglang.state import Window

FIRST_ID = 1 << 32
"""Ids of windows start here, above every token id."""

_NUM_IDS = (1 << 61) - FIRST_ID  # the tree was tried with ids up to 2^61


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


def prefix_digests(seed: bytes, tokens: memoryview, ends: Sequence[int]) -> list[bytes]:
    """A digest of ``tokens[:end]`` for each of the ascending ``ends``."""
    running = hashlib.blake2b(seed, digest_size=16)
    digests, done = [], 0
    for end in ends:
        running.update(tokens[done:end])
        digests.append(running.copy().digest())
        done = end
    return digests


def physical_key(seed: bytes, tokens: memoryview, windows: Iterable[Window]) -> array:
    """Ids of the slots that hold ``tokens``.

    Parameters
    ----------
    seed : bytes
        Of :func:`seed_of`.
    tokens : memoryview of int64
    windows : iterable of Window
        Ascending; all of them lie wholly in ``tokens``.

    Returns
    -------
    array of int64
        As long as ``tokens`` less what the windows gave back.
    """
    running = hashlib.blake2b(seed, digest_size=16)
    key, done = array("q"), 0
    for window in windows:
        start, end = window.logical_start, window.logical_start + window.width
        key.frombytes(tokens[done:start].cast("B"))
        running.update(tokens[done:start])
        # No token is negative, so no text can look like this.
        mark = window.mark.encode()
        running.update(array("q", (-1, window.width, window.kept, len(mark))))
        running.update(mark)
        running.update(tokens[start:end])
        key.frombytes(_ids(running.digest(), window.kept))
        done = end
    key.frombytes(tokens[done:].cast("B"))
    return key


def _ids(digest: bytes, count: int) -> bytes:
    """``count`` ids; the first two carry 60 bits each of the digest, so two windows of more than one
    slot are the same where 120 bits of their digests are. Windows of one slot get no key
    (``KaraConfig.may_share``)."""
    first, step = (int.from_bytes(part, "little") for part in (digest[:8], digest[8:16]))
    ids = np.uint64(first) + np.arange(count, dtype=np.uint64) * np.uint64(step)
    return (ids % np.uint64(_NUM_IDS) + np.uint64(FIRST_ID)).astype(np.int64).tobytes()
