"""What a CUDA graph replays of the recording."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorders import DIM, KERNELS, acquire, flush, make, mean, stored
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kara_sglang.kernels.backend import TorchKernels
from kara_sglang.kernels.record import (
    FP4,
    FP8,
    PAGE,
    recorded,
)
from kara_sglang.scheduler.ring.recorder import Recorder

BY_TWOS = TorchKernels(layers_at_once=2)  # a call for every two layers, as in a CUDA graph


class Tape(TorchDispatchMode):
    """What a CUDA graph is: the operations of one run, on the tensors of that run, without the Python
    around them. :meth:`replay` does them again and leaves each result where it was the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for new, old in zip(tree_leaves(again), tree_leaves(result), strict=True):
                if new.data_ptr() != old.data_ptr():  # else a view, or written in place
                    old.copy_(new)


@pytest.mark.parametrize("ring_dtype", [torch.float32, FP8, FP4], ids=str)
def test_a_captured_step_follows_the_tables(ring_dtype: torch.dtype) -> None:
    """Recorders come and go between replays of one captured step; nobody else writes the ring. Five
    layers, stored two at a time, whose queries are made in the step and dropped by the model."""
    group, kv_heads, layers, batch = 3, 2, 5, 4
    recorder = make(group=group, kv_heads=kv_heads, layers=layers, pages=8, ring_dtype=ring_dtype)
    table = recorder.pages
    addresses = [t.data_ptr() for t in (table, *(ring.queries for ring in recorder.rings))]
    # The graph's own inputs, which SGLang fills by copy before each replay.
    rows, positions = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    queries = torch.zeros(layers, batch, kv_heads * group * DIM)
    with Tape() as graph:
        for layer in range(layers):
            recorder.record(BY_TWOS, layer, queries[layer] + 0, rows, positions)

    generator = torch.Generator().manual_seed(0)
    held: dict[int, Recorder] = {}
    expected: dict[tuple[int, int], torch.Tensor] = {}  # (page, place): (layers, kv_heads, dim)
    for step in range(60):
        row = 1 + step % 5
        if row in held and step % 3 == 0:
            recorder.release(held.pop(row))
        elif row not in held and recorder.free_pages >= (1 if row % 2 else group):
            held[row] = acquire(recorder, row, 1 if row % 2 else group, since=0)
        flush(recorder)
        rows.copy_(torch.randperm(5, generator=generator)[:batch] + 1)
        # Within the block that they have pages for.
        positions.copy_(torch.randint(0, PAGE, (batch,), generator=generator))
        queries.copy_(torch.randn(queries.shape, generator=generator))
        graph.replay()
        by_head = queries.view(layers, batch, kv_heads, group, DIM)
        for index, (who, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            if who not in held:
                continue
            (pages,) = held[who].pages.values()
            heads = by_head[:, index].unbind(dim=2)
            if len(pages) == 1:
                heads = [mean(heads)]
            for page, head in zip(pages, heads, strict=True):
                place = (page, position)
                expected[place] = stored(head, ring_dtype).clone()
    assert len(expected) > 100
    for page in range(recorder.num_pages):
        got = [recorded(ring, 0, PAGE, ((page,),)) for ring in recorder.rings]
        for place in range(PAGE):
            truth = expected.get((page, place), torch.zeros(layers, kv_heads, DIM))
            ours = torch.stack([layer[place, :, 0] for layer in got])
            assert torch.equal(ours.float(), truth.float()), (page, place)
    now = [t.data_ptr() for t in (recorder.pages, *(ring.queries for ring in recorder.rings))]
    assert now == addresses
    assert recorder.pages is table


@pytest.mark.parametrize("ring_dtype", [torch.float32, FP8, FP4], ids=str)
def test_a_step_in_one_call_is_its_layers_some_at_a_time(ring_dtype: torch.dtype) -> None:
    """Same bytes; and a step that broke off leaves nothing behind in the next one."""
    recorders = [make(layers=3, pages=4, ring_dtype=ring_dtype) for _ in range(2)]
    for recorder in recorders:
        acquire(recorder, 1, 2, since=0)
        acquire(recorder, 3, 1, since=0)
        flush(recorder)
    generator = torch.Generator().manual_seed(1)
    rows, positions = torch.tensor([1, 2, 3]), torch.tensor([5, 9, 7])
    stale = torch.randn(3, 4 * DIM, generator=generator)
    recorders[0].record(KERNELS, 0, stale, rows, positions)
    for layer in range(3):
        queries = 500 * torch.randn(3, 4 * DIM, generator=generator)
        for recorder, kernels in zip(recorders, (KERNELS, BY_TWOS), strict=True):
            recorder.record(kernels, layer, queries, rows, positions)
    for ours, theirs in zip(recorders[0].rings, recorders[1].rings, strict=True):
        for mine, other in zip(ours.parts, theirs.parts, strict=True):
            assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
        assert ours.queries.view(torch.uint8).count_nonzero() > 0
