"""Kara's score with the causal mask: the ablation of the paper's section 4.1."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kara_sglang.kernels.selectors.base import AttentionSelector
from kara_sglang.kernels.selectors.kara import KaraSelector

if TYPE_CHECKING:
    from kara_sglang.config import KaraConfig


@dataclass(frozen=True, slots=True)
class CausalSelector(AttentionSelector):
    """As ``kara``, but a query votes for keys at or before its own position only."""

    @classmethod
    def from_config(cls, config: KaraConfig) -> Self:
        kara = KaraSelector.from_config(config)
        return cls(chunks=kara.chunks, rule=dataclasses.replace(kara.rule, causal=True))
