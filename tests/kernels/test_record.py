"""The ring of recorded queries: Triton against the reference, byte for byte."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kara_sglang.kernels import record as reference
from kara_sglang.kernels.record import PAGE, Ring, Step
from kara_sglang.kernels.triton import TritonKernels, numbers
from kara_sglang.kernels.triton.record import record
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder

pytestmark = pytest.mark.usefixtures("interpreted")

POISON = 0xA5


def poisoned_ring(entries: int, heads: int, dim: int, dtype: torch.dtype, layers: int = 1) -> Ring:
    ring = Ring.zeros((layers, entries, heads, dim), dtype)
    for raw in bytes_of(ring):
        raw.fill_(POISON)
    return ring


def bytes_of(ring: Ring) -> list[torch.Tensor]:
    """Everything that a ring holds."""
    return [part.view(torch.uint8) for part in ring.parts]


def step_to(pages: torch.Tensor) -> Step:
    """Rows that record a token at position 0 into these pages, ``(batch, group)``."""
    batch = len(pages)
    return Step(torch.zeros(batch, dtype=torch.int64), torch.arange(batch), pages.int()[:, None])


@pytest.mark.parametrize("group", [1, 3, 5, 7, 12, 16])
@pytest.mark.parametrize(
    ("ring_dtype", "query_dtype"),
    [
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float16),
        (torch.float8_e4m3fn, torch.float32),
        (reference.FP4, torch.bfloat16),
        (reference.FP4, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_bytes_are_the_references(identical, group, ring_dtype, query_dtype):
    layers, batch, heads, dim = 3, 4, 3, 20
    trash = (group + 2) * PAGE
    pages = torch.stack(
        [
            torch.arange(group),  # all heads
            torch.full((group,), -1),  # no recorder
            torch.tensor([group, *[-1] * (group - 1)]),  # the mean
            torch.tensor([group + 1, *[-1] * (group - 1)]),
        ]
    )
    positions = torch.tensor([1003, 7, 58, 1_000_001])
    table = torch.full((batch, 5, group), 99, dtype=torch.int32)  # other blocks must not matter
    rows = torch.tensor([2, 0, 3, 1])
    table[rows, positions // PAGE % 5] = pages.int()
    step = Step(positions, rows, table)
    queries = torch.randn(layers, batch, heads * group * dim).mul(200).to(query_dtype)

    ours, theirs = (poisoned_ring(trash + 1, heads, dim, ring_dtype, layers) for _ in range(2))
    record(ours, step, list(queries))
    reference.record(theirs, step, list(queries))

    if ring_dtype == torch.bfloat16 and group > 1:
        # The interpreter cuts float32 off where it should round: a mean may be the next number.
        means = reference.plan(step, trash)[2:, 0]
        ours_bits, bits = (ring.queries.view(torch.int16)[:, means].int() for ring in (ours, theirs))
        assert (ours_bits - bits).abs().max() <= 1
        assert (ours_bits != POISON * 0x101 - 0x10000).flatten(2).any(dim=2).all()
        ours.queries[:, means] = theirs.queries[:, means]
    for mine, other in zip(bytes_of(ours), bytes_of(theirs), strict=True):
        assert identical(mine[:, :-1], other[:, :-1])
        assert (mine[:, -1] == POISON).all(), "an idle row was stored"
        assert (other[:, -1] != POISON).flatten(1).any(dim=1).all(), "the test has no idle row"


@pytest.mark.parametrize("group", [2, 3, 5, 7, 12])
def test_the_mean_is_the_mean(group):
    """Beside rows with all heads and idle ones, from the definition."""
    heads, dim, trash = 2, 6, 24 * PAGE
    queries = torch.randn(3, heads, group, dim)
    pages = torch.full((3, group), -1)
    pages[0, 0] = 7
    pages[2] = torch.arange(10, 10 + group)
    for store in (record, reference.record):
        ring = Ring.zeros((1, trash + 1, heads, dim), torch.float32)
        store(ring, step_to(pages), [queries.view(3, -1)])
        (stored,) = ring.queries
        torch.testing.assert_close(stored[7 * PAGE], queries[0].mean(dim=1))
        assert torch.equal(stored[10 * PAGE :: PAGE][:group], queries[2].transpose(0, 1))
        written = stored[:trash].flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert written == [7 * PAGE, *(PAGE * page for page in range(10, 10 + group))]


def test_every_query_is_stored_as_the_nearest_number():
    """From the definition, float64: of all 253 numbers of e4m3, times the smallest power of two that
    brings a head's largest query into their range, the nearest, and of two the even one."""
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], dtype=np.uint8)
    numbers = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
    heads, dim = 3, 24
    queries = torch.randn(2, heads * dim) * torch.tensor([2000.0, 1.0, 1e-3]).repeat_interleave(dim)
    queries[1, :dim] = torch.tensor([448.0, 17.0, 19.0]).repeat(dim // 3)  # 17 and 19: in the middle
    ring = poisoned_ring(3 * PAGE + 1, heads, dim, reference.FP8)
    record(ring, step_to(torch.tensor([[2], [0]])), [queries])
    for entry, row in ((2 * PAGE, queries[0]), (0, queries[1])):
        for head, given in enumerate(row.view(heads, dim).double().numpy()):
            power = 1.0
            while abs(given).max() > 448 * power:
                power *= 2
            while abs(given).max() <= 448 * power / 2:
                power /= 2
            assert 2.0 ** int(ring.scales[0, entry, head]) == power
            distance = abs(given[:, None] / power - numbers[None, :])
            odd = (codes & 1)[None, :] * 1e-12  # the even one, where two are as near
            nearest = numbers[(distance + odd).argmin(axis=1)]
            assert (ring.queries[0, entry, head].double().numpy() == nearest).all()


@pytest.mark.parametrize("dim", [64, 80, 128, 192])
def test_every_query_of_four_bits_is_the_nearest_number(dim):
    """From the definition, float64: a scale is the largest number of its part divided by 6, as a
    float16 of 3 mantissa bits; of the eight sizes that this leaves each query is the nearest, and of
    two the one of an even code."""
    heads, parts = 3, 4 if dim <= 128 else 8
    queries = torch.randn(2, heads, dim) * torch.tensor([2000.0, 1.0, 1e-3])[:, None]
    queries[1, 0, :8] = torch.tensor([6.0, 5.0, -3.5, 2.5, 1.25, -0.75, 0.25, -0.0])  # in the middle
    queries[1, 0, 8 : dim // parts] = 0
    ring = poisoned_ring(3 * PAGE + 1, heads, dim, reference.FP4)
    record(ring, step_to(torch.tensor([[2], [0]])), [queries.view(2, -1)])
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for entry, rows in ((2 * PAGE, queries[0]), (0, queries[1])):
        numbers = ring[0].numbers()[entry].double().numpy()
        for head, given in enumerate(rows.double().numpy()):
            for part, stored in zip(
                given.reshape(parts, -1), numbers[head].reshape(parts, -1), strict=True
            ):
                fraction, exponent = np.frexp(abs(part).max() / 6)
                scale = np.ldexp(np.round(fraction * 16) / 16, exponent)
                distance = abs(abs(part)[:, None] - scale * sizes[None, :])
                odd = np.arange(8) % 2 * 1e-12  # the even one, where two are as near
                nearest = np.copysign(scale * sizes[(distance + odd).argmin(axis=1)], part)
                np.testing.assert_array_equal(stored, nearest)
                assert (np.signbit(stored) == np.signbit(part)).all()


def test_nan_and_infinity_become_the_largest_of_four_bits(identical):
    queries = torch.tensor([[torch.inf, 1, torch.nan, -torch.inf, 1e30, -3e4, 0, 2.0] * 8])
    ours, theirs = (poisoned_ring(PAGE + 1, 1, 64, reference.FP4) for _ in range(2))
    record(ours, step_to(torch.tensor([[0]])), [queries])
    reference.record(theirs, step_to(torch.tensor([[0]])), [queries])
    assert all(identical(a[:, 0], b[:, 0]) for a, b in zip(ours.parts, theirs.parts, strict=True))
    found = ours[0].numbers()[0, 0, :8].tolist()
    assert found == [23040, 0, 23040, -23040, 23040, -23040, 0, 0]


def test_rows_of_a_fused_projection(identical):
    """The query part of a QKV output: rows are further apart than they are long."""
    batch, heads, group, dim = 5, 2, 3, 16
    qkv = torch.randn(batch, heads * (group + 2) * dim)
    queries = qkv[:, : heads * group * dim]
    step = step_to(torch.randperm(40)[: batch * group].view(batch, group))
    ours, theirs = (poisoned_ring(40 * PAGE + 1, heads, dim, torch.float32) for _ in range(2))
    record(ours, step, [queries])
    reference.record(theirs, step, [queries])
    assert identical(ours.queries, theirs.queries)


def test_rows_that_are_not_what_they_should_be_are_refused():
    ring, step = Ring.zeros((2, 9, 2, 4), torch.float32), step_to(torch.zeros(3, 2, dtype=torch.int64))
    good = torch.zeros(3, 16)
    with pytest.raises(ValueError, match=r"must be 16 numbers without gaps, got shape \(3, 12\)"):
        record(ring, step, [torch.zeros(3, 12)] * 2)
    with pytest.raises(ValueError, match="without gaps"):
        record(ring, step, [good, torch.zeros(3, 32)[:, ::2]])
    with pytest.raises(ValueError, match="rows of queries are 32 and 16 numbers apart"):
        record(ring, step, [good, torch.zeros(3, 32)[:, :16]])
    with pytest.raises(ValueError, match="1 layers of queries for a ring of 2"):
        record(ring, step, [good])
    with pytest.raises(ValueError, match="ring and pages must be contiguous"):
        step = step_to(torch.zeros(3, 2))
        record(ring, dataclasses.replace(step, pages=step.pages.expand(3, 2, 2)), [good] * 2)


def test_an_empty_batch_is_nothing():
    ring = Ring.zeros((1, 3, 1, 16), torch.float32)
    record(ring, step_to(torch.empty(0, 2, dtype=torch.int64)), [torch.empty(0, 32)])
    assert not ring.queries.any()


@triton.jit
def _encode(out, source, COUNT: tl.constexpr):
    lane = tl.arange(0, COUNT)
    tl.store(out + lane, numbers.to_e4m3(tl.load(source + lane)))


@triton.jit
def _decode(out, source, COUNT: tl.constexpr, STORED: tl.constexpr, NATIVE: tl.constexpr):
    lane = tl.arange(0, COUNT)
    tl.store(out + lane, numbers.load_float(source + lane, lane < COUNT, STORED, NATIVE).to(tl.float32))


def interpret(kernel):
    from triton.runtime.interpreter import InterpretedFunction

    return kernel if isinstance(kernel, InterpretedFunction) else InterpretedFunction(kernel.fn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_becomes_torchs_e4m3(dtype):
    source = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    limit = torch.finfo(torch.float8_e4m3fn).max
    expected = source.clamp(-limit, limit).to(torch.float8_e4m3fn).view(torch.uint8)
    out = torch.zeros(2**16, dtype=torch.uint8)
    interpret(_encode)[(1,)](out, source, COUNT=2**16)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("name", "native"), [("float8_e4m3fn", False), ("float8_e4m3fn", True), ("float8_e5m2", False)]
)
def test_every_8_bit_number_is_decoded_exactly(name, native):
    dtype = getattr(torch, name)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    stored = {"float8_e4m3fn": tl.float8e4nv, "float8_e5m2": tl.float8e5}[name]
    out = torch.zeros(256)
    interpret(_decode)[(1,)](out, codes, COUNT=256, STORED=stored, NATIVE=native)
    expected = codes.view(dtype).float()
    if name == "float8_e4m3fn":  # its two NaNs become numbers; by the hardware in the interpreter only
        assert expected[[0x7F, 0xFF]].isnan().all()
        expected[[0x7F, 0xFF]] = torch.tensor([480.0, -480.0])
    assert torch.equal(out.nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", [reference.FP4, reference.FP8, torch.bfloat16], ids=str)
def test_a_recorders_ring_keeps_what_somebody_recorded_and_nothing_else(group, dtype):
    """The server's own ring and tables: idle rows, one with all heads and one with their mean; the rest
    stays poisoned."""
    layers = 10  # more than a launch takes
    shape = AttentionShape(layers, 2 * group, 2, 4, torch.bfloat16, torch.device("cpu"))
    recorder = QueryRecorder(shape, 5, 2, 200_000, dtype)
    assert recorder.num_pages > group and recorder.ring.queries.shape[1] % 16 == 0
    recorder.allocate_tables(4)
    full = recorder.acquire(1, group, since=0, step=1)
    mean = recorder.acquire(3, 1, since=PAGE, step=1)
    assert recorder.extend(full, 9) and recorder.extend(mean, PAGE + 5)
    recorder.flush()
    for ring in recorder.rings:
        for raw in bytes_of(ring):
            raw.fill_(POISON)
    rows, positions = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 9, 1, PAGE + 5])
    for layer in range(layers):
        queries = torch.randn(4, 2 * group * 4, dtype=torch.bfloat16)
        recorder.record(TritonKernels(), layer, queries, rows, positions)

    written = {page * PAGE + 9 for page in full.pages[0]}
    written.add(mean.pages[1][0] * PAGE + 5)
    for ring in recorder.rings:
        for raw in bytes_of(ring):
            touched = (raw != POISON).flatten(1).any(dim=1)
            assert set(touched.nonzero().flatten().tolist()) == written
