"""The CUDA implementation of :class:`kara_sglang.kernels.backend.Kernels`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator

import torch

from kara_sglang.kernels.backend import LayerPool, WindowJob, WindowShape, reference_scores
from kara_sglang.kernels.copies import fill, to_device
from kara_sglang.kernels.record import Queries, Ring
from kara_sglang.kernels.selectors.base import AttentionSelector, BlindSelector
from kara_sglang.kernels.selectors.keys import KeysSelector
from kara_sglang.kernels.triton.compact import compact
from kara_sglang.kernels.triton.pool import PoolTables
from kara_sglang.kernels.triton.record import record
from kara_sglang.kernels.triton.score import Voters, attention_scores
from kara_sglang.kernels.triton.select import select
from kara_sglang.kernels.triton.weights import weight_scores

SCRATCH_BYTES = 32 << 20
"""Memory of a pass beside the pool, unless one window of one layer takes more."""
_ALIGNMENT = 16  # bytes; also what Triton specialises pointers by, so that all passes look alike to it


class TritonKernels:
    """Up to six launches for a group of windows: four score, one selects, one moves. Copies fill the
    scratch before, one follows the fourth, and where the heads of a layer share their tokens, two of
    torch's operations add up the scores.

    Windows with equal settings form a group: as many as fit the scratch with all layers, or one and as
    many layers as fit. Whatever a group needs lies in the scratch. Nothing synchronises and nothing is
    copied from the device. All calls of an instance must be made on the same stream.
    """

    name = "triton"
    compiles = True
    records_steps = False

    def __init__(self) -> None:
        self._tables: PoolTables | None = None
        self._scratch: torch.Tensor | None = None

    def reserve(self, device: torch.device, largest: WindowShape) -> int:
        size = max(SCRATCH_BYTES, _bytes(largest, 1, 1))
        self._scratch = torch.empty(size, dtype=torch.uint8, device=device)
        return size

    def record(self, ring: Ring, entries: torch.Tensor, queries: Queries) -> None:
        assert not isinstance(queries, list)  # records_steps
        record(ring, entries, queries)

    def compress(
        self, pool: LayerPool, jobs: list[WindowJob], *, positions: bool = False
    ) -> list[torch.Tensor] | None:
        if self._tables is None or not self._tables.matches(pool):
            self._tables = PoolTables.of(pool)
        tables = self._tables
        groups: dict[Hashable, list[int]] = {}
        for index, job in enumerate(jobs):
            num_units = 0 if job.units is None else len(job.units)
            shape = WindowShape(
                tables.num_kv_heads, len(job.slots), job.kept, num_units, job.query_count
            )
            groups.setdefault((job.selector, shape), []).append(index)

        found: list[torch.Tensor] = []
        if positions:
            heads = (tables.num_layers, tables.num_kv_heads)
            device = pool.keys[0].device
            found = [torch.empty((*heads, j.kept), dtype=torch.int64, device=device) for j in jobs]
        for (_, shape), members in groups.items():
            num_jobs, num_layers = self._fitting(shape, len(members), tables.num_layers)
            for first in range(0, len(members), num_jobs):
                part = members[first : first + num_jobs]
                for layers, kept in self._compress_alike(
                    pool, [jobs[index] for index in part], shape, num_layers
                ):
                    for place, index in enumerate(part if positions else []):
                        found[index][layers.start : layers.stop] = kept[:, place]
        return found if positions else None

    def _fitting(self, shape: WindowShape, num_jobs: int, num_layers: int) -> tuple[int, int]:
        """How many windows and how many layers to take at once: all layers where one window of them
        fits, so that a window is as few launches as possible."""
        if self._scratch is None:
            raise RuntimeError("kv-compress: a pass without scratch memory; call reserve() first")
        size = self._scratch.numel()
        if _bytes(shape, 1, 1) > size:
            raise RuntimeError(
                f"kv-compress: a window of {shape} takes {_bytes(shape, 1, 1)} bytes of scratch, "
                f"{size} were reserved"
            )
        # Padding only becomes less in larger groups, so these bounds are safe.
        all_layers = _bytes(shape, 1, num_layers)
        if all_layers <= size:
            return min(num_jobs, size // all_layers), num_layers
        without_layers = _bytes(shape, 1, 0)
        return 1, (size - without_layers) // (_bytes(shape, 1, 1) - without_layers)

    def _compress_alike(
        self, pool: LayerPool, jobs: list[WindowJob], shape: WindowShape, num_layers: int
    ) -> Iterator[tuple[range, torch.Tensor]]:
        """Compress windows with equal settings, so many layers at a time.

        Yields
        ------
        tuple of range and torch.Tensor
            Layers, and the positions kept in them, ``(len(layers), num_jobs, num_kv_heads, R)``, int32,
            which are valid until the next ones are asked for.
        """
        tables, scratch = self._tables, self._scratch
        assert tables is not None and scratch is not None
        selector = jobs[0].selector
        for first in range(0, tables.num_layers, num_layers):
            layers = range(first, min(first + num_layers, tables.num_layers))
            slots, units, starts, sums, scores, kept = _carve(scratch, shape, len(jobs), len(layers))
            if first == 0:  # where these three lie does not depend on the number of layers
                torch.cat([job.slots for job in jobs], out=slots.view(-1))
                fill(starts, torch.tensor([job.query_start for job in jobs]))
                if shape.units:
                    torch.cat([job.units for job in jobs if job.units is not None], out=units.view(-1))
            if isinstance(selector, AttentionSelector):
                if not shape.units:
                    raise ValueError(f"{type(selector).__name__} needs recorded queries")
                voting = selector.rule.voters(shape.query_count, shape.width)
                attention_scores(
                    tables,
                    layers,
                    slots,
                    Voters(units, starts, voting.start, len(voting)),
                    ring_len=pool.ring_len,
                    rule=selector.rule,
                    sums=sums,
                    out=scores,
                )
            elif isinstance(selector, KeysSelector):
                weight_scores(tables, layers, slots, rule=selector.rule, scratch=sums, out=scores)
            elif isinstance(selector, BlindSelector):
                _draw(selector, jobs, layers, scores)
            else:  # arithmetic of its own, for one window of one layer at a time
                for layer in layers:
                    for place, job in enumerate(jobs):
                        scores[layer - first, place] = reference_scores(pool, job, layer)
            select(scores, shape.kept, selector.chunks, kept)
            compact(tables, layers, slots, kept)
            yield layers, kept


def _draw(selector: BlindSelector, jobs: list[WindowJob], layers: range, scores: torch.Tensor) -> None:
    """Fill ``scores``, ``(len(layers), num_jobs, num_kv_heads, W)``, by one copy from the host."""
    heads, width = scores.shape[2:]
    if selector.seeded:
        drawn = [[selector.draw(heads, width, job.seed + layer) for job in jobs] for layer in layers]
        fill(scores, torch.stack([torch.stack(of_layer) for of_layer in drawn]))
    else:
        scores.copy_(to_device(selector.draw(heads, width, 0), scores.device).expand_as(scores))


def _regions(
    shape: WindowShape, num_jobs: int, num_layers: int
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of slots, units, starts, what lies between the scores' two passes and later,
    W numbers per head at most, while they are blended and added up, scores, and positions."""
    heads = num_layers, num_jobs, shape.num_kv_heads
    return (
        ((num_jobs, shape.width), torch.int32),
        ((num_jobs, shape.units), torch.int64),
        ((num_jobs,), torch.int64),
        ((math.prod(heads) * max(2 * shape.units * shape.query_count, shape.width),), torch.float32),
        ((*heads, shape.width), torch.float32),
        ((*heads, shape.kept), torch.int32),
    )


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _bytes(shape: WindowShape, num_jobs: int, num_layers: int) -> int:
    """Scratch that a group of windows and layers takes."""
    return sum(_padded(*region) for region in _regions(shape, num_jobs, num_layers))


def _carve(
    scratch: torch.Tensor, shape: WindowShape, num_jobs: int, num_layers: int
) -> Iterator[torch.Tensor]:
    """The group's tensors, one behind the other in the scratch."""
    start = 0
    for dimensions, dtype in _regions(shape, num_jobs, num_layers):
        size = math.prod(dimensions) * dtype.itemsize
        yield scratch[start : start + size].view(dtype).view(dimensions)
        start += _padded(dimensions, dtype)
