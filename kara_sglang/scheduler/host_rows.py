"""Rows of KV in host memory, in blocks of one size.

A block holds some slots of every layer. torch keeps pinned memory that was given back for the next one
who wants as much, so with one size there is never more of it than rows have taken at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import torch

logger = logging.getLogger(__name__)

SLOTS = 256
"""A block has half as many at least: torch pins powers of two bytes."""

Blocks = list[torch.Tensor]
"""uint8 on the host, shape ``(HostRows.block_bytes,)`` each, of a row's slots in order."""


class HostRows:
    """Copies rows of one KV pool.

    Parameters
    ----------
    buffers
        SGLang's, of each layer, K and V: ``(slots, ...)``.

    Attributes
    ----------
    block_bytes
    block_slots
        That a block holds.
    """

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        self.buffers = buffers
        self._bytes = [buffer[0].numel() * buffer.itemsize for buffer in buffers]
        slot = max(1, sum(self._bytes))
        self.block_bytes = 1 << ((SLOTS * slot).bit_length() - 1)
        self.block_slots = self.block_bytes // slot

    def num_blocks(self, slots: int) -> int:
        """That a row of so many slots takes."""
        return math.ceil(slots / self.block_slots)

    def take(self, slots: int) -> Blocks | None:
        """Memory for a row; None where the host has too little."""
        pinned = self.buffers[0].is_cuda
        try:
            return [
                torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=pinned)
                for _ in range(self.num_blocks(slots))
            ]
        except RuntimeError as error:
            logger.warning("kv-compress: no host memory for a retracted request's row: %s", error)
            return None

    def save(self, row: torch.Tensor, blocks: Blocks) -> None:
        """Copy slots ``row``, int64, to the host, behind the current stream's work; nobody waits."""
        for some, block in zip(row.split(self.block_slots), blocks, strict=True):
            for buffer, part in self._parts(block, len(some)):
                part.copy_(buffer[some], non_blocking=True)

    def load(self, blocks: Blocks, row: torch.Tensor, first: int) -> None:
        """Copy what was saved into slots ``row``, int64, from its place ``first`` on."""
        for number, (some, block) in enumerate(zip(row.split(self.block_slots), blocks, strict=True)):
            skip = max(0, first - number * self.block_slots)
            if skip < len(some):
                for buffer, part in self._parts(block, len(some)):
                    buffer[some[skip:]] = part[skip:].to(buffer.device, non_blocking=True)

    def _parts(self, block: torch.Tensor, slots: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each buffer with its part of a block, ``(slots, ...)``."""
        begin = 0
        for buffer, num_bytes in zip(self.buffers, self._bytes, strict=True):
            part = block[begin : begin + slots * num_bytes].view(buffer.dtype)
            yield buffer, part.view(slots, *buffer.shape[1:])
            begin += self.block_slots * num_bytes
