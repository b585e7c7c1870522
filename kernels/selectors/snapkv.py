"""SnapKV's choice (arXiv 2404.14469) in Kara's window: only the newest queries vote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from kara_sglang.kernels.score import AttentionRule
from kara_sglang.kernels.selectors.base import AttentionSelector
from kara_sglang.kernels.selectors.settings import SelectorSettings


@dataclass(frozen=True, slots=True)
class SnapKVSelector(AttentionSelector):
    """Plain causal attention of the last ``last_queries`` queries, without SnapKV's pooling.

    With ``last_queries=1`` and ``granularity="layer"`` this is the score of nano-kvllm, the paper
    authors' public engine.
    """

    name: ClassVar[str] = "snapkv"

    @classmethod
    def from_config(cls, config: SelectorSettings) -> Self:
        rule = AttentionRule(
            causal=True, last_queries=config.last_queries, per_layer=config.granularity == "layer"
        )
        return cls(rule=rule)
