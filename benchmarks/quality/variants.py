"""Selectors that exist for comparison only: ablations of ``kara`` and points of the search.

They are named like settings, ``kara:score=sum:chunks=0``, and are put into the selectors' registry of
the instrument's own processes, so that one server runs them all side by side by request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from kara_sglang.kernels.score import NEIGHBOURS_SHARE, blend_neighbours, key_distances
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.kernels.selectors.base import Selector

if TYPE_CHECKING:
    from kara_sglang.config import KaraConfig

PREFIX = "kara:"


@dataclass(frozen=True, slots=True)
class Variant:
    """One point of the space. What a name leaves out is ``score`` l2_v and a ``chunk_budget`` of 0.1.

    Attributes
    ----------
    power
        A key's score is the sum of its probabilities to this power; 1 is the paper's.
    value
        The score is multiplied by the norm of V to this power.
    chunks
        alpha of Token2Chunk.
    later
        Weight of the delay's queries against the window's own.
    newest
        Newest tokens of the window that are kept whatever their score.
    near, share
        The score is blended with those of so many neighbours, an odd number, as
        :func:`kara_sglang.kernels.score.blend_neighbours` does.
    novel
        The score is multiplied by the distance of the key's direction from that of the window's mean
        key, ``1 - cos``, to this power.
    ahead
        Queries vote as if they stood one window later.
    votes
        What the queries say is taken to this power, before the other factors; with 0 they say nothing,
        as in ``keys``.
    """

    power: float = 2.0
    value: float = 1.0
    chunks: float = 0.1
    later: float = 1.0
    newest: int = 0
    novel: float = 0.0
    ahead: int = 0
    near: int = 1
    share: float = NEIGHBOURS_SHARE
    votes: float = 1.0

    @property
    def name(self) -> str:
        """How the variant is called, ``kara:`` and what differs from the defaults."""
        default = Variant()
        parts = [
            f"{field.name}={getattr(self, field.name):g}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        ]
        return PREFIX + ":".join(parts)

    @classmethod
    def parse(cls, name: str) -> Self:
        """The variant that ``name`` stands for; ``ValueError`` for anything else."""
        types: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        if not name.startswith(PREFIX):
            raise ValueError(f"{name!r} is no variant; variants begin with {PREFIX}")
        settings = {}
        for part in filter(None, name.removeprefix(PREFIX).split(":")):
            key, _, value = part.partition("=")
            if key not in types:
                raise ValueError(f"{name!r}: unknown {key!r}; known: {', '.join(types)}")
            settings[key] = types[key](value)
        return cls(**settings)


@dataclass(frozen=True, slots=True)
class VariantSelector(Selector):
    """Scores by a :class:`Variant`; plain torch on every device."""

    needs_queries: ClassVar[bool] = True
    variant: Variant = Variant()

    @property
    def ahead(self) -> bool:
        return bool(self.variant.ahead)

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
        rule = self.variant
        width, num_kv_heads, _ = keys.shape
        scores = torch.ones((num_kv_heads, width), device=keys.device)
        for head in range(num_kv_heads if rule.votes else 0):  # one at a time bounds their memory
            said = _votes(queries[:, head].float(), keys[:, head].float(), scale, rule)
            scores[head] = said**rule.votes
        if rule.value:
            scores *= values.float().norm(dim=-1).T ** rule.value
        if rule.novel:
            scores *= key_distances(keys) ** rule.novel
        if rule.near > 1:
            scores = blend_neighbours(scores, rule.near, rule.share)
        if rule.newest:
            scores[:, width - rule.newest :] = float("inf")
        return scores


def _votes(queries: torch.Tensor, keys: torch.Tensor, scale: float, rule: Variant) -> torch.Tensor:
    """What each key of one head collects, ``(W,)``.

    ``queries`` has shape ``(num_queries, group, head_dim)``, ``keys`` ``(W, head_dim)``.
    """
    logits = torch.einsum("qgd,kd->gqk", queries, keys)
    logits *= scale
    votes = torch.softmax(logits, dim=-1) ** rule.power
    votes[:, keys.shape[0] :] *= rule.later
    return votes.sum(dim=(0, 1))


def register(names: Sequence[str]) -> list[str]:
    """Put variants into this process's registry of selectors; returns the names that are in it neither
    before nor now."""
    for name in names:
        if name.startswith(PREFIX) and name not in REGISTRY:
            REGISTRY[name] = _factory(Variant.parse(name))
    return [name for name in names if name not in REGISTRY]


def _factory(variant: Variant) -> type[VariantSelector]:
    def from_config(cls: type[VariantSelector], config: KaraConfig) -> VariantSelector:
        chunks = ChunkRule(variant.chunks, config.chunk_width, config.chunk_quantile)
        return cls(chunks=chunks, variant=variant)

    more = {"name": variant.name, "from_config": classmethod(from_config)}
    return type("NamedVariant", (VariantSelector,), more)
