"""One pass over one batch of windows: score, select, compact, for every layer.

:class:`Kernels` is the seam between the plugin and the arithmetic. :class:`TorchKernels` is the
specification and the CPU path; whatever replaces it on a GPU must leave the same bytes in the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kara_sglang.kernels import record
from kara_sglang.kernels.compact import compact
from kara_sglang.kernels.select import select
from kara_sglang.kernels.selectors.base import Selector


@dataclass(frozen=True, slots=True)
class LayerPool:
    """The KV pool and the ring, layer by layer.

    Attributes
    ----------
    keys, values
        One tensor per layer, shape ``(num_slots, num_kv_heads, head_dim)``.
    rings
        One tensor per layer, shape ``(num_entries, num_kv_heads, head_dim)``; empty without recorder.
    ring_len
        Tokens per ring unit.
    scales
        Softmax scale of each layer.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    rings: list[torch.Tensor]
    ring_len: int
    scales: list[float]


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
    units
        The recorder's units, shape ``(group,)`` or ``(1,)``, int64, on the pool's device; None where
        the selector needs no queries.
    """

    slots: torch.Tensor
    kept: int
    selector: Selector
    seed: int
    query_start: int
    query_count: int
    units: torch.Tensor | None


class Kernels(Protocol):
    """What the plugin asks of a set of kernels. All calls run on the current stream, unsynchronised."""

    name: str

    def record(self, ring: torch.Tensor, entries: torch.Tensor, queries: torch.Tensor) -> None:
        """As :func:`kara_sglang.kernels.record.record`; may run inside a CUDA graph."""

    def compress(self, pool: LayerPool, jobs: list[WindowJob]) -> list[torch.Tensor]:
        """Leave each job's kept tokens in the first R of its slots, in every layer and head.

        Returns
        -------
        list of torch.Tensor
            Per job the kept positions, shape ``(num_layers, num_kv_heads, R)``.
        """


class TorchKernels:
    """The reference: plain torch, one window and one layer at a time."""

    name = "torch"

    def record(self, ring: torch.Tensor, entries: torch.Tensor, queries: torch.Tensor) -> None:
        record.record(ring, entries, queries)

    def compress(self, pool: LayerPool, jobs: list[WindowJob]) -> list[torch.Tensor]:
        return [
            torch.stack([self._compress_layer(pool, job, i) for i in range(len(pool.keys))])
            for job in jobs
        ]

    def _compress_layer(self, pool: LayerPool, job: WindowJob, layer: int) -> torch.Tensor:
        slots = job.slots.long()
        queries = None
        if job.units is not None:
            queries = record.recorded(
                pool.rings[layer], job.query_start, job.query_count, job.units, pool.ring_len
            )
        scores = job.selector.score(
            queries,
            pool.keys[layer][slots],
            pool.values[layer][slots],
            scale=pool.scales[layer],
            seed=job.seed + layer,
        )
        kept = select(scores, job.kept, job.selector.chunks)
        compact(pool.keys[layer], slots, kept)
        compact(pool.values[layer], slots, kept)
        return kept
