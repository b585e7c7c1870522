"""Keeps the newest R tokens of the window, as StreamingLLM (arXiv 2309.17453) would."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kara_sglang.kernels.selectors.base import Selector


@dataclass(frozen=True, slots=True)
class RecentSelector(Selector):
    """A token's score is its position."""

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
        by_age = torch.arange(width, dtype=torch.float32, device=keys.device)
        return by_age.expand(num_kv_heads, width)
