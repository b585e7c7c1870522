"""One pass over one batch of windows: score, select, compact, for every layer.

:class:`Kernels` is the seam between the plugin and the arithmetic. :class:`TorchKernels` is the
specification and the CPU path; whatever replaces it on a GPU must leave the same bytes in the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kara_sglang.kernels import record
from kara_sglang.kernels.compact import compact
from kara_sglang.kernels.movable import rows_of
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.select import select
from kara_sglang.kernels.selectors.base import Selector


@dataclass(frozen=True, slots=True)
class LayerPool:
    """The KV pool and the ring, layer by layer.

    Kernels know a pool again by its object, so buffers that are made anew need another one.

    Attributes
    ----------
    keys, values
        One tensor per layer, shape ``(num_slots, num_kv_heads, head_dim)``, of the numbers' own dtype:
        views, where a pool keeps 8-bit floats as bytes.
    rings
        One per layer; empty without recorder.
    scales
        Softmax scale of each layer; with fp8 keys times their ``k_scale``, because logits are linear in
        it. A ``v_scale`` multiplies all scores of a layer alike and may be left out.
    rope_shift
        How queries are moved ahead; None where no selector asks for it.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    rings: list[record.Ring]
    scales: list[float]
    rope_shift: RopeShift | None = None


@dataclass(frozen=True, slots=True)
class WindowJob:
    """One window of one request, ready to be compressed.

    Attributes
    ----------
    slots
        The window's slots in token order, shape ``(W,)``, integer, on the pool's device.
    kept
        R, tokens to keep per head.
    selector
        Scores the window.
    seed
        Of the request and window; each layer adds its number.
    query_start, query_count
        Logical position of the window's first token, and recorded tokens from there on (W + delay).
    pages
        Of the ring: for each head of the GQA group, or for their mean, those of the blocks in which the
        recorded tokens lie; None where the selector needs no queries.
    """

    slots: torch.Tensor
    kept: int
    selector: Selector
    seed: int
    query_start: int
    query_count: int
    pages: tuple[tuple[int, ...], ...] | None


@dataclass(frozen=True, slots=True)
class WindowShape:
    """What decides how much memory one window takes.

    Attributes
    ----------
    num_layers, num_kv_heads, head_dim
        Of the rank.
    dtype
        Of K, or of the queries where they are wider.
    width
        W, tokens of the window.
    kept
        R.
    voices
        Recorded queries of a token and KV head: the GQA group's size, 1 for the mean, 0 without.
    query_count
        Recorded tokens, W + delay.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    width: int
    kept: int
    voices: int
    query_count: int


Mover = Callable[[torch.Tensor, torch.Tensor], None]
"""Moves what is kept of one window to its first R slots, in all layers of a pool, in place.

It takes the window's slots in token order, shape ``(W,)``, int32, no slot twice; and the positions to
keep, shape ``(num_layers, num_kv_heads, R)``, int64, strictly ascending along R."""


class Kernels(Protocol):
    """What the plugin asks of a set of kernels. All calls run on the current stream, unsynchronised."""

    name: str
    compiles: bool
    """Whether a first call waits for a compiler, so that a warm-up should make all kinds of calls."""

    @property
    def layers_at_once(self) -> int | None:
        """How many layers one call of ``record`` takes, as calls cost more than their work; None: all.
        Until then their queries are held, in a CUDA graph's memory where one is captured."""

    def reserve(self, device: torch.device, largest: WindowShape) -> int:
        """Allocate all memory that passes need, for windows up to ``largest``. Returns the bytes.

        To be called before the KV pool is sized, so that the sizing accounts for it.
        """

    def record(self, ring: record.Ring, step: record.Step, queries: Sequence[torch.Tensor]) -> None:
        """As :func:`kara_sglang.kernels.record.record`; may run inside a CUDA graph."""

    def compress(
        self, pool: LayerPool, jobs: list[WindowJob], *, positions: bool = False
    ) -> list[torch.Tensor] | None:
        """Leave each job's kept tokens in the first R of its slots, in every layer and head.

        Parameters
        ----------
        pool : LayerPool
        jobs : list of WindowJob
        positions : bool
            Whether the caller wants to know what was kept, which costs memory.

        Returns
        -------
        list of torch.Tensor or None
            Where asked for: per job the kept positions, shape ``(num_layers, num_kv_heads, R)``, int64.
        """

    def mover(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Mover:
        """What moves tokens in any pool, to be made once: it may upload where the buffers lie.

        Parameters
        ----------
        keys, values : sequence of torch.Tensor
            One per layer, shape ``(num_slots, num_kv_heads, head_dim)``, any dtype.
        """


class TorchKernels:
    """The reference: plain torch, one window and one layer at a time."""

    name = "torch"
    compiles = False

    def __init__(self, layers_at_once: int | None = None) -> None:
        self.layers_at_once = layers_at_once

    def reserve(self, device: torch.device, largest: WindowShape) -> int:
        return 0

    def record(self, ring: record.Ring, step: record.Step, queries: Sequence[torch.Tensor]) -> None:
        record.record(ring, step, queries)

    def compress(
        self, pool: LayerPool, jobs: list[WindowJob], *, positions: bool = False
    ) -> list[torch.Tensor] | None:
        found = []
        for job in jobs:
            kept = [self._compress_layer(pool, job, layer) for layer in range(len(pool.keys))]
            if positions:
                found.append(torch.stack(kept))
        return found if positions else None

    def mover(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Mover:
        def move(slots: torch.Tensor, kept: torch.Tensor) -> None:
            for key, value, of_layer in zip(keys, values, kept, strict=True):
                compact(key, slots, of_layer)
                compact(value, slots, of_layer)

        return move

    def _compress_layer(self, pool: LayerPool, job: WindowJob, layer: int) -> torch.Tensor:
        slots = job.slots.long()
        scores = reference_scores(pool, job, layer)
        kept = select(scores, job.kept, job.selector.chunks)
        compact(pool.keys[layer], slots, kept)
        compact(pool.values[layer], slots, kept)
        return kept


def reference_scores(pool: LayerPool, job: WindowJob, layer: int) -> torch.Tensor:
    """The selector's own arithmetic on one window of one layer: ``(num_kv_heads, W)``, float32."""
    slots = job.slots.long()
    queries = None
    if job.pages is not None:
        queries = record.recorded(pool.rings[layer], job.query_start, job.query_count, job.pages)
        if job.selector.ahead:
            if pool.rope_shift is None:
                raise ValueError("queries cannot be moved ahead: the pool has no RoPE shift")
            queries = pool.rope_shift.moved(queries, layer)
    return job.selector.score(
        queries,
        _read(pool.keys[layer], slots),
        _read(pool.values[layer], slots),
        scale=pool.scales[layer],
        seed=job.seed + layer,
    )


def _read(buffer: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """A window's K or V of one layer; 8-bit floats, with which torch does not compute, as float32."""
    rows = rows_of(buffer, slots)
    return rows.float() if rows.itemsize == 1 else rows
