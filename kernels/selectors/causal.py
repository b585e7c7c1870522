"""Kara's score with the causal mask: the ablation of the paper's section 4.1."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

from kara_sglang.kernels.selectors.base import AttentionSelector
from kara_sglang.kernels.selectors.kara import KaraSelector
from kara_sglang.kernels.selectors.settings import SelectorSettings


@dataclass(frozen=True, slots=True)
class CausalSelector(AttentionSelector):
    """As ``kara``, but a query votes for keys at or before its own position only."""

    name: ClassVar[str] = "causal"

    @classmethod
    def from_config(cls, config: SelectorSettings) -> Self:
        kara = KaraSelector.from_config(config)
        return cls(chunks=kara.chunks, rule=dataclasses.replace(kara.rule, causal=True))
