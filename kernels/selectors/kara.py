"""Kara (arXiv 2607.01237, section 4): bidirectional attention in the window, then Token2Chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from kara_sglang.kernels.score import AttentionRule
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.selectors.base import AttentionSelector
from kara_sglang.kernels.selectors.settings import SelectorSettings


@dataclass(frozen=True, slots=True)
class KaraSelector(AttentionSelector):
    """Every query of the window votes for every key of the window; with ``delay_votes`` those of the
    delay behind it do, too."""

    name: ClassVar[str] = "kara"

    @classmethod
    def from_config(cls, config: SelectorSettings) -> Self:
        return cls(
            chunks=ChunkRule(config.chunk_budget, config.chunk_width, config.chunk_quantile),
            rule=_rule(config),
        )


def _rule(config: SelectorSettings) -> AttentionRule:
    """``sum`` or ``l2``; ``_v`` and the power of V's norm, 1 where none is written; ``_k``."""
    votes, *factors = config.score.split("_")
    powers = [int(factor[1:] or 1) for factor in factors if factor.startswith("v")]
    return AttentionRule(
        squared=votes == "l2",
        value_norm=sum(powers),
        key_distance="k" in factors,
        neighbours=config.neighbours,
        delay_votes=config.delay_votes,
        ahead=config.ahead,
        per_layer=config.granularity == "layer",
    )
