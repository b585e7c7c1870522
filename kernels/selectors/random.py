"""Keeps R random tokens per head: the field's null baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kara_sglang.kernels.selectors.base import BlindSelector


@dataclass(frozen=True, slots=True)
class RandomSelector(BlindSelector):
    """Uniform scores from a generator on the CPU, so that every device draws the same ones."""

    name: ClassVar[str] = "random"
    seeded: ClassVar[bool] = True

    def draw(self, num_kv_heads: int, width: int, seed: int) -> torch.Tensor:
        return torch.rand(num_kv_heads, width, generator=torch.Generator().manual_seed(seed))
