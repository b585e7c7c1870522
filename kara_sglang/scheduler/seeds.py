"""Seeds of requests whose selector draws: the same in every run and on every tensor-parallel rank."""

from __future__ import annotations

import zlib
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

COPY = "kv_compress_copy"
"""Attribute of SGLang's ``Req``: which of the answers to one prompt it is. It survives a retraction."""

_MOST_PROMPTS = 4096


class Seeds:
    """Of one scheduler.

    Parameters
    ----------
    seed : int
        The server's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._copies: dict[int, int] = {}  # started so far, by prompt

    def of(self, req: Req, asked: int | None) -> int:
        """The seed of a request that is about to take its first decode step.

        Parameters
        ----------
        req : Req
        asked : int or None
            What it asked for; None: one of its prompt's.
        """
        # By crc32: request ids and hash() differ from run to run.
        prompt = zlib.crc32(array("q", req.origin_input_ids).tobytes())
        seed = self.seed ^ prompt if asked is None else asked
        number = self._copy_number(req, prompt)
        return zlib.crc32(f"{seed} {number}".encode()) if number else seed

    def _copy_number(self, req: Req, prompt: int) -> int:
        """Which of the ``n`` answers to its prompt a request is, from 0, in the order of admission."""
        copies = req.sampling_params.n
        if copies > 1 and not hasattr(req, COPY):
            number = self._copies.pop(prompt, 0) % copies
            setattr(req, COPY, number)
            if number + 1 < copies:
                self._copies[prompt] = number + 1
            if len(self._copies) > _MOST_PROMPTS:  # of copies that were aborted before
                del self._copies[next(iter(self._copies))]
        return getattr(req, COPY, 0)
