"""Queries as if they came later: RoPE's rotation by a fixed number of positions.

A window is read by queries behind it, at distances that its own queries do not have: half of those
look at keys *after* themselves, which no model has ever seen. Moved ahead by W positions, every query
looks back at every key, from W tokens away on average, as those of the next window will. RoPE is a
rotation of pairs of numbers, and the rotation by a difference of positions is the same everywhere, so
recorded queries are moved by one rotation per layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, slots=True, eq=False)
class RopeShift:
    """The rotation in all layers: number d becomes ``cos[d] * x[d] + sin[d] * x[partner[d]]``.

    Attributes
    ----------
    cos, sin
        Shape ``(num_layers, head_dim)``, float32; 1 and 0 where RoPE leaves a number alone.
    partner
        Which number each is paired with, shape ``(num_layers, head_dim)``, int32.
    run
        A power of two, at most 16: aligned runs of so many numbers have runs as partners.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    partner: torch.Tensor
    run: int

    @classmethod
    def of(cls, layers: Sequence[RopeShift]) -> Self:
        """One of all layers, from one per layer."""
        return cls(
            torch.cat([one.cos for one in layers]),
            torch.cat([one.sin for one in layers]),
            torch.cat([one.partner for one in layers]),
            math.gcd(*(one.run for one in layers)),
        )

    @classmethod
    def of_layer(cls, cos: torch.Tensor, sin: torch.Tensor, head_dim: int, *, halves: bool) -> Self:
        """A layer whose pairs turn by the angles with these cosines and sines.

        Parameters
        ----------
        cos, sin : torch.Tensor
            Shape ``(rotary_dim / 2,)``; empty for a layer without RoPE.
        head_dim : int
            At least ``rotary_dim``; what lies behind it stays.
        halves : bool
            Whether the numbers i and ``i + rotary_dim / 2`` are a pair (NeoX's style), or neighbours.
        """
        pairs = torch.arange(2 * len(cos), device=cos.device)
        pairs = pairs.view(2, -1).T if halves else pairs.view(-1, 2)
        all_cos = torch.ones(head_dim, dtype=torch.float32, device=cos.device)
        all_sin = torch.zeros_like(all_cos)
        partner = torch.arange(head_dim, device=cos.device)
        first, second = pairs.unbind(1)
        all_cos[first], all_cos[second] = cos.float(), cos.float()
        all_sin[first], all_sin[second] = -sin.float(), sin.float()
        partner[first], partner[second] = second, first
        run = math.gcd(16, head_dim, len(cos)) if halves else 1
        return cls(all_cos[None], all_sin[None], partner.to(torch.int32)[None], run)

    def moved(self, queries: torch.Tensor, layer: int) -> torch.Tensor:
        """One layer's ``queries``, shape ``(..., head_dim)``, moved ahead; float32."""
        queries = queries.float()
        runs = self.partner[layer, :: self.run] // self.run
        partners = queries.unflatten(-1, (-1, self.run)).index_select(-2, runs).flatten(-2)
        return queries * self.cos[layer] + partners.mul_(self.sin[layer])
