"""Where queries lie in a ring of random pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kara_sglang.kernels.record import blocks_of, most_blocks


def pages_of(
    num_pages: int, voices: Sequence[int], start: int, count: int
) -> tuple[tuple[int, ...], ...]:
    """``WindowJob.pages`` of so many tokens from logical position ``start`` on: for each of ``voices``,
    which are numbers, others of a ring's pages, in random order."""
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))
    blocks, most = len(blocks_of(start, count)), most_blocks(count)
    return tuple(tuple(order[most * voice :][:blocks].tolist()) for voice in voices)
