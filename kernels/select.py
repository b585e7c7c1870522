"""Choosing exactly R of W positions, with Token2Chunk: the torch reference and the CPU path.

Paper section 4.2. Its description leaves the final count open; here exactly R positions are kept, so
that every length and every freed page is known before a score exists:

1. the best ``R - floor(alpha * R)`` tokens are *anchors*;
2. each pair of neighbouring anchors with a gap between them is a possible chunk. It qualifies when it
   is at most gamma wide, both ends included, and both ends rank in the window's best share;
3. chunks are taken in the order of the sum of their ends' scores while the gaps' total stays within
   ``floor(alpha * R)``; the first that does not fit ends it;
4. what is left of R goes to the best single tokens.

Ties go to the earlier token, everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ChunkRule:
    """Token2Chunk's settings.

    Attributes
    ----------
    budget
        alpha, the share of R that gaps may take; 0 switches chunks off.
    width
        gamma, the widest chunk in tokens, both ends included.
    quantile
        Both ends must rank among the best ``ceil((1 - quantile) * W)`` tokens.
    """

    budget: float = 0.0
    width: int = 8
    quantile: float = 0.8

    def extra(self, kept: int) -> int:
        """Tokens that gaps may take when ``kept`` are kept in all."""
        return math.floor(self.budget * kept + 1e-9)

    def best(self, width: int) -> int:
        """How many of the best-ranked tokens of a window may be a chunk's end."""
        return math.ceil((1.0 - self.quantile) * width - 1e-9)


def select(scores: torch.Tensor, kept: int, chunks: ChunkRule) -> torch.Tensor:
    """Positions to keep, in ascending order.

    Parameters
    ----------
    scores : torch.Tensor
        Shape ``(..., W)``, float32; higher is better.
    kept : int
        R, with 1 <= R <= W.
    chunks : ChunkRule

    Returns
    -------
    torch.Tensor
        int64, shape ``(..., R)``, strictly ascending along the last dimension.
    """
    width = scores.shape[-1]
    if not 1 <= kept <= width:
        raise ValueError(f"cannot keep {kept} of {width} tokens")
    order = scores.argsort(dim=-1, descending=True, stable=True)
    positions = torch.arange(width, device=scores.device).expand(scores.shape)
    rank = torch.empty_like(order).scatter_(-1, order, positions)

    extra = chunks.extra(kept)
    if extra:
        filled = _gaps_to_fill(scores, rank, positions, kept - extra, extra, chunks)
        # Anchors and filled gaps outrank every other token; among each other order does not matter.
        rank = torch.where(filled | (rank < kept - extra), rank - width, rank)
    chosen = rank.topk(kept, dim=-1, largest=False, sorted=False).indices
    return chosen.sort(dim=-1).values


def _gaps_to_fill(
    scores: torch.Tensor,
    rank: torch.Tensor,
    positions: torch.Tensor,
    num_anchors: int,
    extra: int,
    chunks: ChunkRule,
) -> torch.Tensor:
    """Mask of the tokens that lie inside an accepted chunk, between its two ends."""
    width = scores.shape[-1]
    anchor = rank < num_anchors
    # A chunk is named by its right end. ``left``: the anchor before each position, -1 for none.
    before = torch.where(anchor, positions, -1).cummax(dim=-1).values
    left = torch.cat([torch.full_like(before[..., :1], -1), before[..., :-1]], dim=-1)
    added = positions - left - 1
    strong = rank < chunks.best(width)
    ends = left.clamp(min=0)
    possible = (
        anchor
        & (left >= 0)
        & (added >= 1)
        & (added + 2 <= chunks.width)
        & strong
        & strong.gather(-1, ends)
    )
    priority = torch.where(possible, scores + scores.gather(-1, ends), float("-inf"))
    by_priority = priority.argsort(dim=-1, descending=True, stable=True)
    added = torch.where(possible, added, 0)
    spent = added.gather(-1, by_priority).cumsum(dim=-1)
    fits = torch.empty_like(possible).scatter_(-1, by_priority, spent <= extra)
    accepted = possible & fits
    # A token is inside an accepted chunk when the next anchor to its right is the chunk's right end.
    right = torch.where(anchor, positions, width - 1).flip(-1).cummin(dim=-1).values.flip(-1)
    return accepted.gather(-1, right) & ~anchor
