"""Keeps R random tokens per head: the field's null baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kara_sglang.kernels.selectors.base import Selector


@dataclass(frozen=True, slots=True)
class RandomSelector(Selector):
    """Uniform scores from a generator on the CPU, so that every device draws the same ones."""

    seeded: ClassVar[bool] = True

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        seed: int,
    ) -> torch.Tensor:
        width, num_kv_heads, _ = keys.shape
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(num_kv_heads, width, generator=generator)
        if keys.is_cuda:  # from pageable memory the copy would wait for the stream
            scores = scores.pin_memory()
        return scores.to(keys.device, non_blocking=True)
