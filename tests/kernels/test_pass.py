"""A whole pass through the seam ``Kernels``: Triton must leave the bytes that torch leaves."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from ring_pages import pages_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kara_sglang.benchmarks.gpu.compiled import caught
from kara_sglang.config import KaraConfig
from kara_sglang.kernels.backend import LayerPool, TorchKernels, WindowJob, WindowShape
from kara_sglang.kernels.record import FP8, Ring, most_blocks
from kara_sglang.kernels.score import AttentionRule, WeightRule
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.selectors import REGISTRY, Selector
from kara_sglang.kernels.selectors.base import AttentionSelector
from kara_sglang.kernels.triton import TritonKernels, backend
from kara_sglang.kernels.triton.pool import PoolTables
from kara_sglang.kernels.triton.score import attention_scores
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder

pytestmark = pytest.mark.usefixtures("interpreted")

WIDTH, DELAY, GROUP = 48, 9, 3
PAGES = 20 * most_blocks(WIDTH + DELAY)
BEST = AttentionRule(squared=True, value_norm=4, key_distance=True, neighbours=9)
KARA = REGISTRY["kara"](chunks=ChunkRule(budget=0.2, quantile=0.5), rule=BEST)


class Norm(Selector):
    """One that is not in the registry: arithmetic of its own on K and V."""

    def score(self, queries, keys, values, *, scale, seed):
        return (keys.norm(dim=-1) * scale + values.norm(dim=-1)).T.contiguous()


class Worst(AttentionSelector):
    """Attention, but with a score of its own."""

    def score(self, *args, **kwargs):
        return -super().score(*args, **kwargs)


class WorstKeys(type(REGISTRY["keys"]())):
    def score(self, *args, **kwargs):
        return -super().score(*args, **kwargs)


SELECTORS = {
    "kara": KARA,
    "causal": REGISTRY["causal"](rule=dataclasses.replace(BEST, causal=True)),
    "snapkv": REGISTRY["snapkv"](rule=AttentionRule(causal=True, last_queries=20)),
    "keys": REGISTRY["keys"](rule=WeightRule(value_norm=4, key_distance=True, neighbours=9)),
    "per layer": REGISTRY["kara"](rule=dataclasses.replace(BEST, per_layer=True)),
    "recent": REGISTRY["recent"](),
    "random": REGISTRY["random"](),
    "identity": REGISTRY["identity"](),
    "norm": Norm(),
    "worst": Worst(rule=BEST),
    "worst keys": WorstKeys(rule=WeightRule(value_norm=4)),
}


@pytest.fixture
def pool(make) -> LayerPool:
    return make.pool(1, layers=3, heads=2, dim=32, slots=512, voices=20, tokens=WIDTH + DELAY)


def jobs_for(make, settings: list[tuple[str, int, int]]) -> list[WindowJob]:
    """One job per (selector, R, voices); voices of 0 give no queries."""
    slots = make.windows(len(settings), WIDTH, slots=512, seed=5, page=16)
    members = iter(torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist())
    return [
        WindowJob(
            slots=window,
            kept=kept,
            selector=SELECTORS.get(name) or REGISTRY[name].from_config(KaraConfig()),
            seed=1000 * number,
            query_start=(start := 16 + 1003 * number),
            query_count=WIDTH + DELAY,
            pages=pages_of(PAGES, list(itertools.islice(members, count)), start, WIDTH + DELAY) or None,
        )
        for number, (window, (name, kept, count)) in enumerate(zip(slots, settings, strict=True))
    ]


def check(identical, make, kernels: TritonKernels, pool: LayerPool, jobs: list[WindowJob]) -> None:
    expected_pool = make.copy(pool)
    expected = TorchKernels().compress(expected_pool, jobs, positions=True)
    kept = kernels.compress(pool, jobs, positions=True)
    assert len(kept) == len(expected)
    for ours, theirs in zip(kept, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(
        pool.keys + pool.values, expected_pool.keys + expected_pool.values, strict=True
    ):
        assert identical(ours, theirs)


@pytest.mark.parametrize(("name", "units"), [("worst", GROUP), ("worst keys", 0)])
def test_a_score_of_its_own_counts(identical, make, pool, name, units):
    """Also where the class derives from one that the kernels know."""
    check(identical, make, make.kernels(), pool, jobs_for(make, [(name, 16, units)]))


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2], ids=str)
def test_a_score_of_its_own_gets_numbers_that_torch_computes_with(identical, make, dtype):
    """Not with 8-bit floats."""
    pool = make.pool(1, layers=3, heads=2, dim=32, slots=512, dtype=dtype)
    check(identical, make, make.kernels(), pool, jobs_for(make, [("norm", 16, 0)]))


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("dtype", [torch.float32, FP8, torch.float8_e5m2], ids=str)
def test_every_selector(identical, make, name, dtype):
    """8-bit floats are moved as they are, and what is kept is what torch keeps."""
    pool = make.pool(
        1, layers=3, heads=2, dim=32, slots=512, voices=20, tokens=WIDTH + DELAY, dtype=dtype
    )
    kept = WIDTH if REGISTRY[name].keeps_all else 16
    before = make.copy(pool)
    units = GROUP if REGISTRY[name].needs_queries else 0
    check(identical, make, make.kernels(), pool, jobs_for(make, [(name, kept, units)]))
    same = all(identical(a, b) for a, b in zip(pool.keys, before.keys, strict=True))
    assert same == (name == "identity")


def test_jobs_of_all_kinds_in_one_call(identical, make, pool):
    """Settings of requests differ; the order of the answers is that of the jobs."""
    settings = [
        ("kara", 16, GROUP),
        ("random", 32, 0),
        ("kara", 32, GROUP),
        ("kara", 16, 1),  # a recorder of the mean
        ("snapkv", 16, GROUP),
        ("kara", 16, GROUP),
        ("per layer", 16, GROUP),
        ("keys", 16, 0),
        ("identity", WIDTH, 0),
    ]
    check(identical, make, make.kernels(), pool, jobs_for(make, settings))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, [(1, 1)] * 3),
        (2, [(1, 2), (1, 1)]),
        (3, [(2, 1)] * 3 + [(1, 3)]),
        (60, [(5, 3)]),
    ],
)
@pytest.mark.parametrize("name", ["kara", "snapkv", "per layer"])
def test_windows_and_layers_are_taken_in_groups_that_fit_the_scratch(
    identical, make, monkeypatch, layers, expected, name
):
    """Five windows of three layers, with scratch in which so many layers of one window are scored."""
    pool = make.pool(1, layers=3, heads=1, dim=16, slots=512, voices=20, tokens=WIDTH + DELAY)
    shape = WindowShape(3, 1, 16, torch.float32, WIDTH, 16, 1, WIDTH + DELAY)
    monkeypatch.setattr(backend, "SCRATCH_BYTES", 0)
    kernels = TritonKernels()
    least = kernels.reserve(torch.device("cpu"), shape)
    size = least + (layers - 1) * backend._bytes(backend._inner(shape, 1, 1))
    kernels._scratch = torch.empty(size, dtype=torch.uint8)
    taken = []

    def noted(tables, layers, slots, voters, *, scratch, out, **rest):
        taken.append((len(slots), len(layers)))
        start, end = kernels._scratch.data_ptr(), kernels._scratch.data_ptr() + size
        for part in (slots, voters.recorders, *scratch, out):
            assert start <= part.data_ptr() <= end - part.nbytes
        return attention_scores(tables, layers, slots, voters, scratch=scratch, out=out, **rest)

    monkeypatch.setattr(backend, "attention_scores", noted)
    jobs = jobs_for(make, [(name, 16, 1)] * 5)
    check(identical, make, kernels, pool, jobs)
    assert taken == expected  # equal groups share what is made once


def test_groups_of_selectors_that_bring_their_own_scores(identical, make, pool, monkeypatch):
    """Drawn on the host or computed by torch: the numbers of the right layer and window each."""
    monkeypatch.setattr(backend, "SCRATCH_BYTES", 0)
    kernels = TritonKernels()
    shape = WindowShape(3, 2, 32, torch.float32, WIDTH, WIDTH, GROUP, WIDTH + DELAY)
    kernels.reserve(torch.device("cpu"), shape)
    names = ["random", "recent", "norm", "random", "keys", "random", "norm", "identity", "random"]
    jobs = jobs_for(make, [(name, WIDTH if name == "identity" else 16, 0) for name in names])
    check(identical, make, kernels, pool, jobs)


def test_a_window_that_does_not_fit_is_refused(make, pool):
    jobs = jobs_for(make, [("kara", 16, GROUP)])
    with pytest.raises(RuntimeError, match=r"without scratch memory; call reserve\(\) first"):
        TritonKernels().compress(pool, jobs)
    kernels = TritonKernels()
    kernels._scratch = torch.empty(1000, dtype=torch.uint8)
    with pytest.raises(
        RuntimeError, match=r"1 x WindowShape\(.* takes 17[0-9]{3} bytes of scratch, 1000 were"
    ):
        kernels.compress(pool, jobs)


def test_positions_are_returned_only_where_asked_for(make, pool):
    for kernels in (make.kernels(), TorchKernels()):
        jobs = jobs_for(make, [("recent", 16, 0)])
        assert kernels.compress(pool, jobs) is None
        (kept,) = kernels.compress(pool, jobs, positions=True)
        assert kept.shape == (3, 2, 16)
        assert kept.dtype == torch.int64


class Allocations(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {
            t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if is_tensor(t)
        }
        result = func(*args, **kwargs)
        for tensor in tree_flatten(result)[0]:
            if is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def is_tensor(thing: object) -> bool:
    return isinstance(thing, torch.Tensor)


@pytest.mark.parametrize("name", ["kara", "snapkv", "keys", "per layer", "recent", "identity"])
def test_a_pass_allocates_nothing_that_grows(make, name):
    """80 layers of 64 windows of 512 tokens, far more than the scratch: each launch reads and writes
    tensors that lie in the memory that was reserved, or in the pool's tables."""
    width, heads, num_layers, num_jobs = 512, 8, 80, 64
    delay = 64
    needs_queries = SELECTORS[name].needs_queries
    keys = torch.zeros(4, heads, 16, dtype=torch.bfloat16)  # never read: launches are only noted
    ring = Ring.zeros((2, heads, 16), FP8)
    pool = LayerPool(
        keys=[keys] * num_layers,
        values=[keys] * num_layers,
        rings=[ring] * num_layers,
        scales=[0.1] * num_layers,
    )
    slots, pages = torch.zeros(width, dtype=torch.int32), ((0,) * 9,) * 4
    kept = width if SELECTORS[name].keeps_all else 256
    job = WindowJob(slots, kept, SELECTORS[name], 0, 0, width + delay, pages if needs_queries else None)
    kernels = TritonKernels()
    shape = WindowShape(num_layers, heads, 16, torch.bfloat16, width, width, 4, width + delay)
    reserved = kernels.reserve(torch.device("cpu"), shape)
    assert reserved == 64 << 20
    start = kernels._scratch.data_ptr()
    with caught() as launches:
        kernels.compress(pool, [job])
        launches.clear()
        with Allocations() as made:
            kernels.compress(pool, [job] * num_jobs)
    # The host's list of positions; scores that are the same for all windows and layers.
    assert made.largest <= (8 * num_jobs if needs_queries else 4 * heads * width)
    assert kernels._scratch.data_ptr() == start
    tables = {t.data_ptr() for t in tree_flatten(vars_of(kernels._tables))[0] if is_tensor(t)}
    written = set()
    for launch in launches:
        for argument, tensor in launch.arguments.items():
            if is_tensor(tensor) and tensor.data_ptr() not in tables:
                assert start <= tensor.data_ptr() <= start + reserved - tensor.nbytes, argument
                written.add(argument)
    assert written >= {"slots", "scores", "kept", "out"}
    assert len(launches) >= 4


def vars_of(tables: PoolTables) -> list[Any]:
    return [getattr(tables, field.name) for field in dataclasses.fields(tables)]


def test_two_passes_and_another_pool(identical, make, pool):
    """What an instance remembers of a pool is not used for the next one."""
    kernels = make.kernels()
    jobs = jobs_for(make, [("kara", 16, GROUP), ("kara", 16, GROUP)])
    check(identical, make, kernels, pool, jobs[:1])
    check(identical, make, kernels, pool, jobs[1:])
    other = make.pool(2, layers=2, heads=2, dim=32, slots=512, voices=20, tokens=WIDTH + DELAY)
    check(identical, make, kernels, other, jobs[:1])
    check(identical, make, kernels, pool, jobs[:1])


def test_no_jobs(make, pool):
    assert make.kernels().compress(pool, [], positions=True) == []


def test_a_window_without_queries_is_refused(make, pool):
    with pytest.raises(ValueError, match="KaraSelector needs recorded queries"):
        make.kernels().compress(pool, jobs_for(make, [("kara", 16, 0)]))


def test_nan_does_not_leave_the_window(make, pool):
    """A model that computes NaN spoils its own answers and nobody else's."""
    jobs = jobs_for(make, [("kara", 16, GROUP)])
    pool.keys[0][jobs[0].slots[:7].long()] = float("nan")
    before = make.copy(pool)
    (kept,) = make.kernels().compress(pool, jobs, positions=True)
    assert kept.min() >= 0
    assert kept.max() < WIDTH
    assert (kept.diff(dim=-1) > 0).all()
    outside = torch.ones(512, dtype=torch.bool)
    outside[jobs[0].slots.long()] = False
    for ours, theirs in zip(pool.values, before.values, strict=True):
        assert torch.equal(ours[outside], theirs[outside])


def test_buffers_that_cannot_be_walked_are_refused(make, pool):
    other = make.pool(1, heads=2, dim=16, slots=512)
    wide = make.pool(1, layers=3, heads=4, dim=32, slots=512)
    keys, values, scales = pool.keys, pool.values, pool.scales
    strided = [key[:, :, ::2] for key in keys]
    for message, wrong in (
        ("differ in shape", LayerPool([*keys[:2], *other.keys], values, [], scales)),
        ("not contiguous", LayerPool(strided, values, [], scales)),
        ("3 layers of K, 2 of V", LayerPool(keys, values[:2], [], scales)),
        ("3 layers of K, 2 of ring", LayerPool(keys, values, pool.rings[:2], scales)),
        ("3 layers of K, 1 of scale", LayerPool(keys, values, [], scales[:1])),
        ("K and V differ in dtype", LayerPool(keys, [v.bfloat16() for v in values], [], scales)),
        ("K and V differ in slots or heads", LayerPool(keys, wide.values, [], scales)),
        ("the ring's heads are not those of K", LayerPool(keys, values, wide.rings, scales)),
        ("without layers", LayerPool([], [], [], [])),
    ):
        with pytest.raises(ValueError, match=message):
            PoolTables.of(wrong)


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
    kernels = make.kernels()
    settings = [("kara", 16, GROUP), ("keys", 16, 0), ("recent", 16, 0), ("random", 16, 0)]
    jobs = jobs_for(make, settings)
    with Synchronising() as mode:
        kernels.compress(pool, jobs)
    assert mode.seen == []


class Uploads(TorchDispatchMode):
    """Notes copies from the host to a device: from pageable memory, or waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.good = 0
        self.pinned: list[torch.Tensor] = []  # kept alive, so that no address is used again
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        result = func(*args, **kwargs)
        source = {"_to_copy": args[:1], "copy_": args[1:2]}.get(name, ())
        if source and source[0].device.type == "cpu" and result.device.type != "cpu":
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
            # A view of it that is not contiguous goes through pageable memory, too.
            is_pinned = any(source[0].data_ptr() == tensor.data_ptr() for tensor in self.pinned)
            if waits or not is_pinned or not source[0].is_contiguous():
                self.seen.append(f"{func} of {tuple(source[0].shape)}")
            self.good += 1
        return result


def test_nothing_is_uploaded_from_pageable_memory(make, monkeypatch):
    """The device is ``meta``, and launches are only noted."""
    device = torch.device("meta")
    made = make.pool(1, layers=3, heads=2, dim=32, slots=512, voices=20, tokens=WIDTH + DELAY)
    pool = LayerPool(
        keys=[key.to(device) for key in made.keys],
        values=[value.to(device) for value in made.values],
        rings=[Ring(ring.queries.to(device)) for ring in made.rings],
        scales=made.scales,
    )
    wanted = [("kara", 16, GROUP), ("kara", 32, 1), ("keys", 16, 0), ("recent", 16, 0)]
    wanted.append(("random", 16, 0))
    jobs = [
        dataclasses.replace(
            job,
            slots=job.slots.to(device),
        )
        for job in jobs_for(make, wanted)
    ]
    kernels = TritonKernels()
    kernels.reserve(device, WindowShape(3, 2, 32, torch.float32, WIDTH, WIDTH, GROUP, WIDTH + DELAY))
    shape = AttentionShape(3, 2 * GROUP, 2, 32, torch.float32, device)
    recorder = QueryRecorder(shape, WIDTH, DELAY, 10**6, FP8)
    recorder.allocate_tables(8)
    with Uploads(monkeypatch) as control:
        torch.ones(3).to(device)
        torch.empty(3, device=device).copy_(torch.ones(3).pin_memory())
        torch.empty(3, device=device).copy_(torch.ones(3), non_blocking=True)
    assert len(control.seen) == control.good == 3
    with Uploads(monkeypatch) as mode, caught():
        kernels.compress(pool, jobs)
        assert recorder.extend(recorder.acquire(3, GROUP, since=0, step=1), 0)
        recorder.flush()
    assert mode.good >= 8
    assert mode.seen == []
