"""What a selector is: a score per token of a window, and how scores become positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from kara_sglang.kernels.score import AttentionRule, attention_scores
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.selectors.settings import SelectorSettings
from kara_sglang.kernels.transfer import to_device


@dataclass(frozen=True, slots=True)
class Selector:
    """Base of all selectors.

    Attributes
    ----------
    name
        As ``--kv-compress`` and requests name it.
    needs_queries
        Whether a window can be scored only when its queries were recorded.
    keeps_all
        Whether R = W whatever ``retain`` says.
    seeded
        Whether the seed matters.
    chunks
        Token2Chunk's settings; off by default.
    """

    name: ClassVar[str]
    needs_queries: ClassVar[bool] = False
    keeps_all: ClassVar[bool] = False
    seeded: ClassVar[bool] = False
    chunks: ChunkRule = ChunkRule()

    @property
    def ahead(self) -> bool:
        """Whether :meth:`score` gets queries that were moved ahead (``kernels/rope_shift.py``)."""
        return False

    @property
    def looks_behind(self) -> bool:
        """Whether tokens behind the window have a say in which of its tokens are kept. Such a window is
        not told by the text up to its end, so it is not shared (``radix_integration/keys.py``)."""
        return False

    @classmethod
    def from_config(cls, config: SelectorSettings) -> Self:
        return cls()

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        seed: int,
    ) -> torch.Tensor:
        """Score the tokens of one window of one layer; higher is kept.

        Parameters
        ----------
        queries : torch.Tensor or None
            ``(num_queries, num_kv_heads, heads_per_group, head_dim)``; None where
            ``needs_queries`` is False.
        keys, values : torch.Tensor
            ``(W, num_kv_heads, head_dim)``, as stored; 8-bit floats as float32.
        scale : float
            Softmax scale of these keys, a pool's ``k_scale`` included.
        seed : int
            Differs from request to request, window to window and layer to layer, and is the same in
            every run and on every tensor-parallel rank.

        Returns
        -------
        torch.Tensor
            ``(num_kv_heads, W)``, float32.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class BlindSelector(Selector):
    """A selector that looks at positions and the seed only, never at a tensor of the model."""

    def draw(self, num_kv_heads: int, width: int, seed: int) -> torch.Tensor:
        """Scores of one window of one layer, ``(num_kv_heads, width)``, float32, on the host."""
        raise NotImplementedError

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
        return to_device(self.draw(num_kv_heads, width, seed), keys.device)


@dataclass(frozen=True, slots=True)
class AttentionSelector(Selector):
    """A selector whose score is attention, by ``rule``."""

    needs_queries: ClassVar[bool] = True
    rule: AttentionRule = AttentionRule()

    @property
    def ahead(self) -> bool:
        return self.rule.ahead

    @property
    def looks_behind(self) -> bool:
        return self.rule.delay_votes

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        seed: int,
    ) -> torch.Tensor:
        assert queries is not None
        return attention_scores(queries, keys, values, scale=scale, rule=self.rule)
