"""A whole pass through the seam ``Kernels``: Triton must leave the bytes that torch leaves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kara_sglang.kernels.backend import LayerPool, TorchKernels, WindowJob
from kara_sglang.kernels.score import AttentionRule
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.kernels.triton import TritonKernels, backend
from kara_sglang.kernels.triton.pool import PoolTables

pytestmark = pytest.mark.usefixtures("interpreted")

WIDTH, DELAY, GROUP = 48, 9, 3
RING_LEN = WIDTH + DELAY + 6  # the ring holds more than one window's queries
BEST = AttentionRule(squared=True, value_norm=1)
KARA = REGISTRY["kara"](chunks=ChunkRule(budget=0.2, quantile=0.5), rule=BEST)
SELECTORS = {
    "kara": KARA,
    "causal": REGISTRY["causal"](rule=dataclasses.replace(BEST, causal=True)),
    "snapkv": REGISTRY["snapkv"](rule=AttentionRule(causal=True, last_queries=20)),
    "recent": REGISTRY["recent"](),
    "random": REGISTRY["random"](),
    "identity": REGISTRY["identity"](),
}


@pytest.fixture
def pool(make) -> LayerPool:
    return make.pool(1, layers=3, heads=2, dim=32, slots=512, units=20, ring_len=RING_LEN)


def jobs_for(make, settings: list[tuple[str, int, int]]) -> list[WindowJob]:
    """One job per (selector, R, units); units of 0 give no queries."""
    slots = make.windows(len(settings), WIDTH, slots=512, seed=5, page=16)
    units = iter(torch.randperm(20, generator=torch.Generator().manual_seed(0)))
    return [
        WindowJob(
            slots=window,
            kept=kept,
            selector=SELECTORS[name],
            seed=1000 * number,
            query_start=16 + 1003 * number,
            query_count=WIDTH + DELAY,
            units=torch.stack([next(units) for _ in range(count)]) if count else None,
        )
        for number, (window, (name, kept, count)) in enumerate(zip(slots, settings, strict=True))
    ]


def check(identical, make, kernels: TritonKernels, pool: LayerPool, jobs: list[WindowJob]) -> None:
    expected_pool = make.copy(pool)
    expected = TorchKernels().compress(expected_pool, jobs)
    kept = kernels.compress(pool, jobs)
    assert len(kept) == len(expected)
    for ours, theirs in zip(kept, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(
        pool.keys + pool.values, expected_pool.keys + expected_pool.values, strict=True
    ):
        assert identical(ours, theirs)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector(identical, make, pool, name):
    kept = WIDTH if REGISTRY[name].keeps_all else 16
    before = make.copy(pool)
    units = GROUP if REGISTRY[name].needs_queries else 0
    check(identical, make, TritonKernels(), pool, jobs_for(make, [(name, kept, units)]))
    same = all(identical(a, b) for a, b in zip(pool.keys, before.keys, strict=True))
    assert same == (name == "identity")


def test_jobs_of_all_kinds_in_one_call(identical, make, pool):
    """Settings of requests differ; the order of the answers is that of the jobs."""
    settings = [
        ("kara", 16, GROUP),
        ("random", 32, 0),
        ("kara", 32, GROUP),
        ("kara", 16, 1),  # a rotating recorder
        ("snapkv", 16, GROUP),
        ("kara", 16, GROUP),
        ("identity", WIDTH, 0),
    ]
    check(identical, make, TritonKernels(), pool, jobs_for(make, settings))


def test_layers_are_taken_in_groups_that_fit_the_scratch(identical, make, pool, monkeypatch):
    per_layer = 4 * 2 * (GROUP * (WIDTH + DELAY) + WIDTH)
    monkeypatch.setattr(backend, "SCRATCH_BYTES", 2 * per_layer)
    kernels = TritonKernels()
    check(identical, make, kernels, pool, jobs_for(make, [("kara", 16, GROUP)]))
    assert kernels._scratch.numel() * 4 == 2 * per_layer


def test_two_passes_and_another_pool(identical, make, pool):
    """What an instance remembers of a pool is not used for the next one."""
    kernels = TritonKernels()
    jobs = jobs_for(make, [("kara", 16, GROUP), ("kara", 16, GROUP)])
    check(identical, make, kernels, pool, jobs[:1])
    check(identical, make, kernels, pool, jobs[1:])
    other = make.pool(2, layers=2, heads=2, dim=32, slots=512, units=20, ring_len=RING_LEN)
    check(identical, make, kernels, other, jobs[:1])


def test_no_jobs(pool):
    assert TritonKernels().compress(pool, []) == []


def test_a_window_without_queries_is_refused(make, pool):
    with pytest.raises(ValueError, match="KaraSelector needs recorded queries"):
        TritonKernels().compress(pool, jobs_for(make, [("kara", 16, 0)]))


def test_scores_that_are_no_numbers_do_not_leave_the_window(make, pool):
    """A model that computes NaN spoils its own answers and nobody else's."""
    jobs = jobs_for(make, [("kara", 16, GROUP)])
    pool.keys[0][jobs[0].slots[:7].long()] = float("nan")
    before = make.copy(pool)
    (kept,) = TritonKernels().compress(pool, jobs)
    assert kept.min() >= 0
    assert kept.max() < WIDTH
    assert (kept.diff(dim=-1) > 0).all()
    outside = torch.ones(512, dtype=torch.bool)
    outside[jobs[0].slots.long()] = False
    for ours, theirs in zip(pool.values, before.values, strict=True):
        assert torch.equal(ours[outside], theirs[outside])


def test_buffers_that_cannot_be_walked_are_refused(make, pool):
    other = make.pool(1, heads=2, dim=16, slots=512)
    with pytest.raises(ValueError, match="differ in shape"):
        PoolTables.of(LayerPool([*pool.keys, *other.keys], pool.values, [], 1, pool.scales))
    strided = [key[:, :, ::2] for key in pool.keys]
    with pytest.raises(ValueError, match="not contiguous"):
        PoolTables.of(LayerPool(strided, pool.values, [], 1, pool.scales))


class Synchronising(TorchDispatchMode):
    """Notes the operations that make the host wait for a GPU."""

    NAMES = frozenset(
        {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select"}
        | {"_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        counted = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        if name in self.NAMES or by_mask or counted:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_operation_of_a_pass_waits_for_the_device(make, pool):
    x = torch.ones(3)
    with Synchronising() as control:
        x[x > 0].sum().item()
    assert len(control.seen) == 2
    kernels = TritonKernels()
    jobs = jobs_for(make, [("kara", 16, GROUP), ("recent", 16, 0), ("random", 16, 0)])
    with Synchronising() as mode:
        kernels.compress(pool, jobs)
    assert mode.seen == []
