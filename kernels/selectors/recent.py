"""Keeps the newest R tokens of the window, as StreamingLLM (arXiv 2309.17453) would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kara_sglang.kernels.selectors.base import BlindSelector


@dataclass(frozen=True, slots=True)
class RecentSelector(BlindSelector):
    """A token's score is its position."""

    name: ClassVar[str] = "recent"

    def draw(self, num_kv_heads: int, width: int, seed: int) -> torch.Tensor:
        return torch.arange(width, dtype=torch.float32).repeat(num_kv_heads, 1)
