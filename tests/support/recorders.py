"""Recorders and queries, for tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from kara_sglang.kernels.backend import TorchKernels
from kara_sglang.kernels.record import (
    FP4,
    FP8,
    PAGE,
    Recorder,
    from_fp4,
    to_fp4,
)
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder

DIM = 4

BYTES = {torch.float32: 4 * DIM, FP8: DIM + 1, FP4: DIM // 2 + 4}  # of a head

KERNELS = TorchKernels()


def make(
    *,
    group: int = 2,
    kv_heads: int = 2,
    layers: int = 2,
    window: int = 4,
    delay: int = 1,
    pages: int = 8,
    ring_dtype: torch.dtype = torch.float32,
    rows: int = 6,
) -> QueryRecorder:
    """A recorder with exactly ``pages`` pages."""
    shape = AttentionShape(layers, group * kv_heads, kv_heads, DIM, torch.float32, torch.device("cpu"))
    entry = layers * kv_heads * BYTES[ring_dtype]
    made = QueryRecorder(shape, window, delay, pages * entry * PAGE + entry, ring_dtype)
    assert made.num_pages == made.free_pages == pages
    made.allocate_tables(rows)
    return made


def stored(queries: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the ring may remember of ``queries``: for fp8 e4m3 times the smallest power of two that
    fits; fp4 has a test of its own."""
    if dtype == FP4:
        return from_fp4(*to_fp4(queries))
    if dtype != FP8:
        return queries
    largest = queries.double().abs().amax(dim=-1, keepdim=True)
    power = 2.0 ** torch.where(largest > 0, largest / 448, 1.0).log2().ceil()
    return ((queries.double() / power).float().to(FP8).double() * power).float()


def mean(heads: Sequence[torch.Tensor]) -> torch.Tensor:
    """What is recorded of a group in a single page: float32, in the order of the heads."""
    return functools.reduce(torch.add, heads) * (1 / len(heads))


def flush(recorder: QueryRecorder) -> None:
    """As the coordinator does before a decode step."""
    if recorder.stale:
        recorder.flush()
    assert not recorder.stale


def acquire(recorder: QueryRecorder, row: int, heads: int, since: int) -> Recorder:
    """A recorder with pages for its first token."""
    given = recorder.acquire(row, heads, since, step=0)
    assert recorder.extend(given, since)
    return given
