"""Kara's score without the votes: what K and V say of a token by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from kara_sglang.kernels.score import WeightRule, weight_scores
from kara_sglang.kernels.selectors.base import Selector
from kara_sglang.kernels.selectors.settings import SelectorSettings


@dataclass(frozen=True, slots=True)
class KeysSelector(Selector):
    """The fourth power of V's norm times the distance of the key from the window's mean key, blended
    with the scores of the tokens around. No query is recorded."""

    name: ClassVar[str] = "keys"
    rule: WeightRule = WeightRule()

    @classmethod
    def from_config(cls, config: SelectorSettings) -> Self:
        rule = WeightRule(
            value_norm=4,
            key_distance=True,
            neighbours=config.neighbours,
            per_layer=config.granularity == "layer",
        )
        return cls(rule=rule)

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        seed: int,
    ) -> torch.Tensor:
        return weight_scores(keys, values, self.rule)
