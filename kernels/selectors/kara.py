"""Kara (arXiv 2607.01237, section 4): bidirectional attention in the window, then Token2Chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kara_sglang.kernels.score import AttentionRule
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.selectors.base import AttentionSelector

if TYPE_CHECKING:
    from kara_sglang.config import KaraConfig


@dataclass(frozen=True, slots=True)
class KaraSelector(AttentionSelector):
    """Every query of the window votes for every key of the window; with ``delay_votes`` those of the
    delay behind it do, too."""

    @classmethod
    def from_config(cls, config: KaraConfig) -> Self:
        return cls(
            chunks=ChunkRule(config.chunk_budget, config.chunk_width, config.chunk_quantile),
            rule=_rule(config),
        )


def _rule(config: KaraConfig) -> AttentionRule:
    """``sum`` or ``l2``, then ``_v`` and the power of V's norm, 1 where none is written."""
    votes, times, power = config.score.partition("_v")
    return AttentionRule(
        squared=votes == "l2",
        value_norm=int(power or 1) if times else 0,
        delay_votes=config.delay_votes,
        per_layer=config.granularity == "layer",
    )
