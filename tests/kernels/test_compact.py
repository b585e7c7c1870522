"""Moving kept tokens in place: a model of the order of accesses, and Triton against the reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kara_sglang.kernels.backend import LayerPool, TorchKernels
from kara_sglang.kernels.compact import compact as reference
from kara_sglang.kernels.triton import compact as module
from kara_sglang.kernels.triton.backend import TritonKernels
from kara_sglang.kernels.triton.compact import compact
from kara_sglang.kernels.triton.pool import PoolTables
from kara_sglang.scheduler.drafts import Drafts

pytestmark = pytest.mark.usefixtures("interpreted")


# --- the claim, on plain lists ---------------------------------------------------------------------


def moved(window: list[int], kept: list[int], block: int, *, ahead: int = 0) -> list[int]:
    """Blocks in order, each loaded whole before it is stored.

    ``ahead`` blocks are loaded before the stores of a block: what a compiler that pipelines the loop,
    or a thread that is faster than its neighbour, may do.
    """
    window = list(window)
    targets = [range(first, min(first + block, len(kept))) for first in range(0, len(kept), block)]
    loaded: list[list[int]] = []
    for index, target in enumerate(targets):
        while len(loaded) <= min(index + ahead, len(targets) - 1):
            loaded.append([window[kept[j]] for j in targets[len(loaded)]])
        for j, value in zip(target, loaded[index], strict=True):
            window[j] = value
    return window


@st.composite
def ascending(draw, max_width: int = 40) -> tuple[int, list[int]]:
    width = draw(st.integers(1, max_width))
    return width, sorted(draw(st.sets(st.integers(0, width - 1), min_size=1)))


@given(ascending(), st.integers(1, 48), st.integers(0, 3))
def test_blocks_in_order_move_every_ascending_set(drawn, block, ahead):
    width, kept = drawn
    window = list(range(width))
    assert moved(window, kept, block, ahead=ahead)[: len(kept)] == kept


@given(st.permutations(range(12)), st.integers(1, 12), st.integers(1, 11))
def test_sets_that_do_not_ascend_are_not_moved_right(order, count, block):
    """Wherever a source lies in front of the block that needs it, it is overwritten by then."""
    kept = order[:count]
    too_late = [j for j in range(count) if kept[j] < j // block * block]
    assume(any(kept[kept[j]] != kept[j] for j in too_late))
    assert moved(list(range(12)), kept, block)[:count] != kept


def test_without_the_barrier_inside_a_block_it_is_wrong():
    """Lane 1 stores position 1 while lane 0 has not read it yet."""
    window, kept = [10, 11, 12], [1, 2]
    window[1] = window[kept[1]]
    window[0] = window[kept[0]]
    assert window[:2] != [11, 12]


# --- the kernel ------------------------------------------------------------------------------------


def run(pool: LayerPool, slots: torch.Tensor, kept: torch.Tensor) -> None:
    tables = PoolTables.of(pool)
    for launch in compact(tables, slots, kept.int()):
        launch()


def choose(shape: tuple[int, ...], width: int, kept: int) -> torch.Tensor:
    return torch.rand(*shape, width).argsort(-1)[..., :kept].sort(-1).values


def check(identical, make, pool: LayerPool, slots: torch.Tensor, kept: torch.Tensor) -> None:
    """Every byte of the pool, also those that must not change."""
    expected = make.copy(pool)
    for layer in range(len(pool.keys)):
        for job in range(len(slots)):
            for buffer in (expected.keys[layer], expected.values[layer]):
                reference(bytes_of(buffer), slots[job], kept[layer, job])
    run(pool, slots, kept)
    for ours, theirs in zip(pool.keys + pool.values, expected.keys + expected.values, strict=True):
        assert identical(ours, theirs)


def bytes_of(buffer: torch.Tensor) -> torch.Tensor:
    """The buffer with its heads as bytes: the reference indexes no 8-bit floats on every device."""
    return buffer.view(torch.uint8)


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("num_jobs", [1, 3, 7])
@pytest.mark.parametrize(("width", "pages"), [(48, 1), (48, -1), (48, 0), (176, 1), (176, -1)])
def test_pages_and_jobs(identical, make, width, pages, num_jobs, page):
    """R = one page, W less one page, and W."""
    torch.manual_seed(width + num_jobs)
    kept = (pages % (width // page) or width // page) * page
    pool = make.pool(1, layers=2, heads=2, dim=32, slots=1280, dtype=torch.bfloat16)
    slots = make.windows(num_jobs, width, slots=1280, seed=2, page=page)
    check(identical, make, pool, slots, choose((2, num_jobs, 2), width, kept))


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        (torch.bfloat16, 80),
        (torch.float16, 192),
        (torch.float8_e4m3fn, 64),
        (torch.float8_e5m2, 80),
        (torch.float32, 256),
        (torch.float16, 3),  # 6 bytes: 2-byte words
        (torch.uint8, 7),
    ],
    ids=str,
)
def test_any_head_and_element_size(identical, make, dtype, dim):
    pool = make.pool(3, layers=2, heads=3, dim=dim, dtype=dtype)
    slots = make.windows(2, 100, slots=256, seed=4, dtype=torch.int64)
    check(identical, make, pool, slots, choose((2, 2, 3), 100, 40))


def test_values_of_another_width(identical, make):
    pool = make.pool(3, layers=2, dim=32, value_dim=20, dtype=torch.bfloat16)
    assert len(PoolTables.of(pool).moves) == 2
    slots = make.windows(2, 100, slots=256, seed=4)
    check(identical, make, pool, slots, choose((2, 2, 2), 100, 40))


def test_buffers_that_start_anywhere(identical, make):
    """A V buffer at an odd multiple of two bytes allows two-byte words only."""
    pool = make.pool(3, dim=32, slots=128, dtype=torch.bfloat16)
    storage = torch.zeros(pool.values[0].numel() + 1, dtype=torch.bfloat16)
    shifted = storage[1:].view(pool.values[0].shape).copy_(pool.values[0])
    pool = LayerPool(pool.keys, [shifted], pool.rings, pool.scales)
    assert PoolTables.of(pool).alignment == 2
    slots = make.windows(1, 48, slots=128, seed=4)
    check(identical, make, pool, slots, choose((1, 1, 2), 48, 20))


@pytest.mark.parametrize(
    ("row_bytes", "alignment", "word"),
    [(256, 16, tl.int64), (40, 8, tl.int64), (80, 4, tl.int32), (6, 16, tl.int16), (7, 16, tl.int8)],
)
def test_no_access_is_misaligned(row_bytes, alignment, word):
    """A GPU faults there, the interpreter does not."""
    assert module._word(row_bytes, alignment) == word


def test_what_does_not_fit_is_refused(make):
    tables = PoolTables.of(make.pool(3, dim=8, slots=64))
    slots = make.windows(1, 48, slots=64, seed=1)
    kept = torch.arange(20, dtype=torch.int32).repeat(1, 1, 2, 1)
    for message, wrong in (
        ("for 1 layers, 1 windows of 48 slots and 2 KV heads", (slots, kept[:, :, :1])),
        ("for 1 layers, 2 windows", (slots.repeat(2, 1), kept)),
        ("of 10 slots", (slots[:, :10].contiguous(), kept)),
        ("must be int32", (slots, kept.long())),
        ("must be int32, positions and slots contiguous", (slots, kept.repeat(1, 1, 1, 2)[..., ::2])),
    ):
        with pytest.raises(ValueError, match=message):
            compact(tables, *wrong)


@pytest.mark.parametrize(("width", "kept"), [(1000, 504), (2048, 2032), (4096, 2048)])
def test_windows_of_thousands(identical, make, width, kept):
    torch.manual_seed(6)
    pool = make.pool(3, heads=1, dim=64, slots=width + 24, dtype=torch.bfloat16)
    slots = make.windows(1, width, slots=width + 24, seed=4)
    check(identical, make, pool, slots, choose((1, 1, 1), width, kept))


def test_every_number_is_where_it_belongs(make):
    """One by one, without the reference: head h of slot j holds what position kept[h, j] held."""
    pool = make.pool(3, layers=2, heads=3, dim=5, slots=64, dtype=torch.bfloat16)
    slots, kept = make.windows(2, 24, slots=64, seed=9), choose((2, 2, 3), 24, 11)
    before = [buffer.double().numpy() for buffer in (*pool.keys, *pool.values)]
    expected = [buffer.copy() for buffer in before]
    for index, buffer in enumerate(expected):
        for job, window in enumerate(slots.tolist()):
            for head, positions in enumerate(kept[index % 2, job].tolist()):
                for place, position in enumerate(positions):
                    buffer[window[place], head] = before[index][window[position], head]
    run(pool, slots, kept)
    for ours, theirs in zip((*pool.keys, *pool.values), expected, strict=True):
        assert (ours.double().numpy() == theirs).all()


@settings(max_examples=40, deadline=None)
@given(drawn=ascending(), other=st.randoms(), block=st.sampled_from([1, 2, 8]))
def test_any_ascending_set(identical, make, drawn, other, block):
    """Small blocks, so that a window has many; each head has its own set of the same size."""
    width, first = drawn
    sets = [first, *(sorted(other.sample(range(width), len(first))) for _ in range(2))]
    pool = make.pool(8, heads=3, dim=8, slots=48, dtype=torch.bfloat16)
    slots = make.windows(1, width, slots=48, seed=len(first))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_BYTES", block * 8 * 2)
        check(identical, make, pool, slots, torch.tensor([[sets]]))


@pytest.mark.parametrize("value_dim", [32, 20])
def test_one_windows_choice_is_moved_in_any_pool(identical, make, value_dim):
    """As the reference moves it, in one launch for all layers; the pool is no part of the pass."""
    pool = make.pool(3, layers=3, dim=32, value_dim=value_dim, dtype=torch.bfloat16)
    expected = make.copy(pool)
    slots = make.windows(1, 100, slots=256, seed=4)[0]
    kept = choose((3, 2), 100, 40)
    TritonKernels().mover(pool.keys, pool.values)(slots, kept)
    TorchKernels().mover(expected.keys, expected.values)(slots, kept)
    for ours, theirs in zip(pool.keys + pool.values, expected.keys + expected.values, strict=True):
        assert identical(ours, theirs)


def test_where_a_drafts_buffers_lie_is_uploaded_once(identical, make, monkeypatch):
    """However many windows and passes there are, and again when SGLang has other buffers."""
    made = []
    stock = PoolTables.of
    monkeypatch.setattr(PoolTables, "of", lambda pool: made.append(pool) or stock(pool))
    pools = [make.pool(seed, layers=3, dim=16, dtype=torch.bfloat16) for seed in (1, 2)]
    truths = [make.copy(pool) for pool in pools]
    sglangs = [SimpleNamespace(k_buffer=pool.keys, v_buffer=pool.values) for pool in pools]
    ours = Drafts(sglangs, TritonKernels())
    theirs = Drafts(
        [SimpleNamespace(k_buffer=pool.keys, v_buffer=pool.values) for pool in truths], TorchKernels()
    )

    def pass_over(windows: int, seed: int) -> None:
        for slots in make.windows(windows, 64, slots=256, seed=seed):
            job, kept = SimpleNamespace(slots=slots, kept=24), choose((3, 2), 64, 24)
            ours.follow(job, kept)
            theirs.follow(job, kept)

    pass_over(3, seed=4)
    pass_over(2, seed=5)
    assert len(made) == len(pools)
    other, truth = make.pool(6, layers=3, dim=16), make.pool(6, layers=3, dim=16)
    sglangs[1].k_buffer, sglangs[1].v_buffer = other.keys, other.values
    theirs.pools[1].k_buffer, theirs.pools[1].v_buffer = truth.keys, truth.values
    pass_over(2, seed=6)
    assert len(made) == len(pools) + 1
    for pool, expected in zip([*pools, other], [*truths, truth], strict=True):
        for mine, true in zip(pool.keys + pool.values, expected.keys + expected.values, strict=True):
            assert identical(mine, true)
