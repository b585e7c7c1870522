"""The CUDA implementation of :class:`kara_sglang.kernels.backend.Kernels`."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from kara_sglang.kernels import record as reference_record
from kara_sglang.kernels.backend import LayerPool, WindowJob
from kara_sglang.kernels.selectors.base import AttentionSelector
from kara_sglang.kernels.triton.compact import compact
from kara_sglang.kernels.triton.pool import PoolTables, to_device
from kara_sglang.kernels.triton.record import record
from kara_sglang.kernels.triton.score import Voters, attention_scores
from kara_sglang.kernels.triton.select import select

SCRATCH_BYTES = 32 << 20
"""Bound of log-sum-exps and scores; layers are taken in groups that fit, at least one at a time."""


class TritonKernels:
    """Four launches for all windows that share their settings: two score, one selects, one moves.

    Nothing synchronises and nothing is copied from the device. The scratch is allocated by the first
    pass and kept, so run one pass over an empty pool at start: it compiles the kernels, too. All calls
    of an instance must be made on the same stream.
    """

    name = "triton"

    def __init__(self) -> None:
        self._tables: PoolTables | None = None
        self._scratch: torch.Tensor | None = None

    def record(self, ring: torch.Tensor, entries: torch.Tensor, queries: torch.Tensor) -> None:
        record(ring, entries, queries)

    def compress(self, pool: LayerPool, jobs: list[WindowJob]) -> list[torch.Tensor]:
        if self._tables is None or not self._tables.matches(pool):
            self._tables = PoolTables.of(pool)
        tables = self._tables
        groups: dict[Hashable, list[int]] = {}
        for index, job in enumerate(jobs):
            num_units = 0 if job.units is None else len(job.units)
            settings = (len(job.slots), job.kept, job.selector, num_units, job.query_count)
            groups.setdefault(settings, []).append(index)

        kept_of: dict[int, torch.Tensor] = {}
        for members in groups.values():
            batch = [jobs[index] for index in members]
            slots = torch.stack([job.slots for job in batch])
            kept = self._choose(tables, pool, batch, slots)
            for table, row_bytes in tables.moves:
                compact(
                    table,
                    slots,
                    kept,
                    num_kv_heads=tables.num_kv_heads,
                    row_bytes=row_bytes,
                    alignment=tables.alignment,
                )
            kept_of |= {index: kept[:, place] for place, index in enumerate(members)}
        return [kept_of[index] for index in range(len(jobs))]

    def _choose(
        self, tables: PoolTables, pool: LayerPool, jobs: list[WindowJob], slots: torch.Tensor
    ) -> torch.Tensor:
        """Positions to keep, ``(num_layers, num_jobs, num_kv_heads, R)``, int64; settings are equal."""
        selector, kept = jobs[0].selector, jobs[0].kept
        shape = (tables.num_layers, len(jobs), tables.num_kv_heads)
        chosen = torch.empty((*shape, kept), dtype=torch.int64, device=slots.device)
        if not isinstance(selector, AttentionSelector):
            scores = torch.stack(
                [
                    torch.stack([_reference_scores(pool, job, layer) for job in jobs])
                    for layer in range(tables.num_layers)
                ]
            )
            select(scores, kept, selector.chunks, chosen)
            return chosen

        voters = _voters(jobs, selector)
        width = slots.shape[1]
        per_layer = shape[1] * shape[2]
        step = max(1, SCRATCH_BYTES // (4 * per_layer * (voters.rows + width)))
        for first in range(0, tables.num_layers, step):
            layers = range(first, min(first + step, tables.num_layers))
            heads = len(layers) * per_layer
            scratch = self._floats(heads * (voters.rows + width), slots.device)
            scores = scratch[: heads * width].view(len(layers), *shape[1:], width)
            attention_scores(
                tables,
                layers,
                slots,
                voters,
                ring_len=pool.ring_len,
                rule=selector.rule,
                sums=scratch[heads * width :],
                out=scores,
            )
            select(scores, kept, selector.chunks, chosen[first : layers.stop])
        return chosen

    def _floats(self, count: int, device: torch.device) -> torch.Tensor:
        """The first ``count`` float32 of the scratch."""
        if self._scratch is None or self._scratch.numel() < count:
            count_kept = max(count, SCRATCH_BYTES // 4)
            self._scratch = torch.empty(count_kept, dtype=torch.float32, device=device)
        return self._scratch[:count]


def _voters(jobs: list[WindowJob], selector: AttentionSelector) -> Voters:
    units = [job.units for job in jobs if job.units is not None]
    if len(units) < len(jobs):
        raise ValueError(f"{type(selector).__name__} needs recorded queries")
    stacked = torch.stack(units)
    count = jobs[0].query_count
    first = max(0, count - (selector.rule.last_queries or count))
    return Voters(
        units=stacked,
        starts=to_device([job.query_start for job in jobs], torch.int64, stacked.device),
        first=first,
        count=count - first,
    )


def _reference_scores(pool: LayerPool, job: WindowJob, layer: int) -> torch.Tensor:
    """Scores of a selector that brings its own arithmetic, shape ``(num_kv_heads, W)``, float32."""
    slots = job.slots.long()
    queries = None
    if job.units is not None:
        queries = reference_record.recorded(
            pool.rings[layer], job.query_start, job.query_count, job.units, pool.ring_len
        )
    return job.selector.score(
        queries,
        pool.keys[layer][slots],
        pool.values[layer][slots],
        scale=pool.scales[layer],
        seed=job.seed + layer,
    )
