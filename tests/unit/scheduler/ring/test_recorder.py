"""The ring of recorded queries against a dictionary ``(request, logical position) -> query``."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorders import DIM, KERNELS, acquire, flush, make, mean, stored

from kara_sglang.kernels.record import (
    FP4,
    FP8,
    PAGE,
    Recorder,
    Ring,
    Step,
    plan,
    record,
    recorded,
)
from kara_sglang.scheduler.ring.recorder import LAG, AttentionShape, QueryRecorder


def store(ring: Ring, pages: torch.Tensor, queries: torch.Tensor) -> None:
    """Record one layer's queries of tokens at position 0 into these pages, ``(batch, group)``."""
    batch = len(pages)
    positions, rows = torch.zeros(batch, dtype=torch.int64), torch.arange(batch)
    record(one_layer(ring), Step(positions, rows, pages.int()[:, None]), [queries])


def one_layer(ring: Ring) -> Ring:
    """A layer's ring as that of a model with one layer."""
    return Ring(*(part[None] for part in ring.parts))


@dataclass
class Request:
    """A request of the model: what it computed, whether or not anyone recorded it."""

    row: int
    length: int
    recorder: Recorder | None = None
    queries: dict[int, torch.Tensor] = field(default_factory=dict)  # (layers, kv, group, dim)


def check_recorded(recorder: QueryRecorder, request: Request) -> None:
    """Everything that ``voters`` promises is in the ring, bit for bit."""
    given = request.recorder
    group = recorder.shape.group
    oldest = (request.length - 1) // PAGE - recorder.num_blocks + 1
    first = max(given.since, oldest * PAGE)
    count = request.length - first
    kind = "all" if given.heads == group else "mean"
    assert given.first == first
    assert recorder.voters(given, first) == kind
    assert recorder.voters(given, first - 1) == "none"
    if count == 0:
        return
    for layer, ring in enumerate(recorder.rings):
        got = recorded(ring, first, count, recorder.pages_of(given, first, count))
        heads = group if given.heads == group else 1
        assert got.shape == (count, recorder.shape.num_kv_heads, heads, recorder.shape.head_dim)
        for i in range(count):
            truth = request.queries[first + i][layer]
            if heads < group:
                truth = mean(truth.unbind(dim=1))[:, None]
            expected = stored(truth, ring.queries.dtype)
            assert torch.equal(got[i].float(), expected.float()), (first + i, given)


def play(random: Random) -> tuple[int, int]:
    """One history of requests that come, are recorded or not, decode together and leave.

    Returns
    -------
    tuple of int
        Queries compared, and how many of them had lost their pages to newer ones.
    """
    group = random.choice([1, 2, 3, 7])
    recorder = make(
        group=group,
        kv_heads=random.randint(1, 2),
        layers=random.randint(1, 2),
        pages=random.randint(0, 9 * group),
        ring_dtype=random.choice([FP4, FP8, torch.float32]),
    )
    generator = torch.Generator().manual_seed(random.getrandbits(31))
    running: dict[int, Request] = {}
    shape = recorder.shape
    compared = wrapped = 0

    def step(requests: list[Request]) -> None:
        """One decode step: flush as the coordinator does, then every layer stores its queries."""
        flush(recorder)
        size = (shape.num_layers, len(requests), shape.num_kv_heads, group, shape.head_dim)
        queries = torch.randn(size, generator=generator) * 300
        rows = torch.tensor([request.row for request in requests])
        positions = torch.tensor([request.length for request in requests])
        for layer in range(shape.num_layers):
            flat = queries[layer].reshape(len(requests), -1)
            recorder.record(KERNELS, layer, flat, rows, positions)
        for i, request in enumerate(requests):
            request.queries[request.length] = queries[:, i]
            request.length += 1

    def prepare(requests: list[Request]) -> None:
        """Pages for the next step's queries, as the coordinator asks for them; who gets none stops."""
        for request in requests:
            if request.recorder is not None and not recorder.extend(request.recorder, request.length):
                recorder.release(request.recorder)
                request.recorder = None

    for _ in range(30):
        action = random.choice(["arrive", "acquire", "decode", "decode", "leave", "drop"])
        free_rows = [row for row in range(1, 6) if row not in running]
        silent = [request for request in running.values() if request.recorder is None]
        if action == "arrive" and free_rows:
            row = random.choice(free_rows)
            running[row] = Request(row, random.randint(0, 300))
        elif action == "acquire" and silent:
            request, wanted = random.choice(silent), random.choice([1, group])
            request.recorder = recorder.acquire(request.row, wanted, request.length, step=0)
        elif action == "decode" and running:
            for _ in range(random.choice([1, 3, 20, 60])):
                prepare(list(running.values()))
                step(list(running.values()))
        elif running and random.random() < 0.5:
            request = random.choice(list(running.values()))
            if request.recorder is not None:
                recorder.release(request.recorder)
                request.recorder = None
            if action == "leave":
                del running[request.row]

        holders = [request for request in running.values() if request.recorder is not None]
        blocks = [pages for request in holders for pages in request.recorder.pages.values()]
        held = [page for pages in blocks for page in pages]
        assert len(held) == len(set(held)) and set(held) <= set(range(recorder.num_pages))
        assert recorder.free_pages == recorder.num_pages - len(held)
        assert recorder.in_use == len(holders)
        for request in holders if action == "decode" else []:
            check_recorded(recorder, request)
            compared += request.length - request.recorder.first
            wrapped += request.recorder.first - request.recorder.since
    return compared, wrapped


def test_the_ring_is_a_dictionary() -> None:
    """Through arrivals, late recorders, row reuse and wraps, what ``voters`` promises is there."""
    totals = [play(Random(seed)) for seed in range(60)]
    assert sum(compared for compared, _ in totals) > 5_000
    assert sum(wrapped for _, wrapped in totals) > 300


@settings(max_examples=100)
@given(st.data())
def test_plan_sends_each_head_to_its_page_or_to_the_trash(data: st.DataObject) -> None:
    """Entry by entry, from the layout's description."""
    batch, group = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 5))
    num_blocks = data.draw(st.integers(1, 4))
    rows = [data.draw(st.sampled_from(["none", "all", "mean"])) for _ in range(batch)]
    blocks, tables, positions, expected = [], [], [], []
    trash, next_page = 10**6, 0
    for kind in rows:
        position = data.draw(st.integers(0, 10_000))
        place = position % PAGE
        if kind == "none":
            mine, entries = [-1] * group, [trash] * group
        elif kind == "all":
            mine = [next_page + g for g in range(group)]
            entries = [page * PAGE + place for page in mine]
        else:
            mine = [next_page] + [-1] * (group - 1)
            entries = [next_page * PAGE + place] + [trash] * (group - 1)
        next_page += group
        blocks.append(position // PAGE % num_blocks)
        tables.append(mine)
        positions.append(position)
        expected.append(entries)
    num_rows = batch + 2
    where = torch.tensor(data.draw(st.permutations(range(num_rows)))[:batch], dtype=torch.int64)
    # What stands in other rows, and for other blocks, must not matter.
    table = torch.full((num_rows, num_blocks, group), 77, dtype=torch.int32)
    table[where, torch.tensor(blocks, dtype=torch.int64)] = torch.tensor(
        tables, dtype=torch.int32
    ).reshape(batch, group)
    got = plan(Step(torch.tensor(positions, dtype=torch.int64), where, table), trash)
    assert got.dtype == torch.int64 and got.tolist() == expected


@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("heads", ["all", "one"])
def test_the_oldest_pages_go_where_the_table_ends(group: int, heads: str) -> None:
    """Three times around the table; at each step the newest blocks that it has room for are there."""
    recorder = make(group=group, kv_heads=1, layers=1, pages=4 * group)
    request = Request(row=3, length=17)
    request.recorder = recorder.acquire(3, group if heads == "all" else 1, since=17, step=0)
    tokens = recorder.num_blocks * PAGE
    for turn in range(3 * tokens):
        assert recorder.extend(request.recorder, request.length)
        flush(recorder)
        queries = torch.full((1, group * DIM), float(turn))
        recorder.record(KERNELS, 0, queries, torch.tensor([3]), torch.tensor([request.length]))
        request.queries[request.length] = queries.view(1, 1, group, DIM)
        request.length += 1
        if turn % 29 == 0 or turn > 2.9 * tokens:
            check_recorded(recorder, request)


def test_a_row_without_recorder_leaves_the_ring_alone() -> None:
    """Its queries go to the trash, and so do those of a row that gave its recorder back."""
    recorder = make()
    mine = acquire(recorder, 1, 2, since=0)
    gone = acquire(recorder, 2, 2, since=0)
    assert not {*mine.pages[0]} & {*gone.pages[0]}
    flush(recorder)
    recorder.release(gone)
    flush(recorder)
    before = recorder.rings[0].queries.clone()
    rows, positions = torch.tensor([2, 4, 5]), torch.tensor([0, 1, 2])
    for layer in range(recorder.shape.num_layers):
        recorder.record(KERNELS, layer, torch.ones(3, 4 * DIM), rows, positions)
    assert torch.equal(recorder.rings[0].queries[: recorder.trash], before[: recorder.trash])
    for layer in range(recorder.shape.num_layers):
        recorder.record(KERNELS, layer, torch.ones(1, 4 * DIM), torch.tensor([1]), torch.tensor([0]))
    assert recorder.rings[0].queries.count_nonzero() > 0


def test_a_reused_row_writes_into_its_own_pages_only() -> None:
    """Finish and arrival between two decode steps: one flush, and the new owner's pages hold."""
    recorder = make(group=2, pages=4)
    old = acquire(recorder, 1, 2, since=5)
    were = old.pages[0]
    flush(recorder)
    recorder.release(old)
    other = acquire(recorder, 2, 2, since=0)  # takes the freed pages
    new = acquire(recorder, 1, 1, since=9)
    flush(recorder)
    assert {*other.pages[0]} == {*were} and not {*new.pages[0]} & {*other.pages[0]}
    assert recorder.pages[1, 0].tolist() == [new.pages[0][0], -1]
    assert recorder.pages[2, 0].tolist() == list(other.pages[0])
    recorder.release(new)
    flush(recorder)
    assert (recorder.pages[1] == -1).all()


def test_nothing_reaches_the_tables_before_flush() -> None:
    """The step in flight still reads them; only ``flush`` runs behind it."""
    recorder = make()
    before = recorder.pages.clone()
    given = acquire(recorder, 1, 1, since=0)
    assert torch.equal(recorder.pages, before)
    flush(recorder)
    tables = recorder.pages.clone()
    assert not torch.equal(tables, before)
    recorder.release(given)
    assert torch.equal(recorder.pages, tables)


def test_handing_out_and_taking_back_twice_is_an_error() -> None:
    """A row has one recorder; a recorder has one end."""
    recorder = make(pages=4)
    first = acquire(recorder, 1, 2, since=0)
    with pytest.raises(RuntimeError, match="row 1 already has a recorder"):
        recorder.acquire(1, 1, since=0, step=0)
    assert recorder.free_pages == 2 and recorder.in_use == 1
    recorder.release(first)
    with pytest.raises(RuntimeError, match="row 1 released twice"):
        recorder.release(first)
    again = acquire(recorder, 1, 2, since=0)  # an equal value, but another recorder
    with pytest.raises(RuntimeError, match="row 1 released twice"):
        recorder.release(first)
    recorder.release(again)
    assert recorder.free_pages == 4 and recorder.in_use == 0


def test_more_pages_than_are_free_are_not_given_in_part() -> None:
    recorder = make(group=4, pages=3)
    given = recorder.acquire(1, 4, since=0, step=0)
    assert not recorder.extend(given, 0)
    assert recorder.free_pages == 3 and given.pages == {} and not recorder.stale


@pytest.mark.parametrize("window,delay", [(1, 0), (16, 0), (512, 64)])
@pytest.mark.parametrize("since", [100, 128, 191])
def test_voters(window: int, delay: int, since: int) -> None:
    """A window can be voted on if recording began with it or before, at least until LAG tokens after it
    is due."""
    recorder = make(window=window, delay=delay, pages=40, layers=1)
    assert recorder.shape.group > 1
    for heads, kind in ((1, "mean"), (recorder.shape.group, "all")):
        given = acquire(recorder, 1, heads, since)
        due = since + window + delay
        for position in range(since, due + LAG):
            assert recorder.extend(given, position)
        assert recorder.voters(given, since) == kind
        assert recorder.voters(given, since - 1) == "none"
        for position in range(due + LAG, since + (recorder.num_blocks + 1) * PAGE):
            assert recorder.extend(given, position)
        assert recorder.voters(given, since) == "none"
        assert recorder.voters(given, given.first) == kind
        recorder.release(given)


def test_the_budget_is_never_exceeded() -> None:
    """All pages stay within the bytes that were given; 16 entries for trash lie beyond."""
    shape = AttentionShape(3, 8, 4, 16, torch.bfloat16, torch.device("cpu"))
    for budget in (0, 1, 10**5, 10**6, 3 * 10**6):
        for dtype, head in ((torch.bfloat16, 16 * 2), (FP8, 16 + 1), (FP4, 16 // 2 + 4)):
            recorder = QueryRecorder(shape, 64, 16, budget, dtype)
            used = sum(part.nbytes for ring in recorder.rings for part in ring.parts)
            entry = 3 * 4 * head
            pages = entry * recorder.num_pages * PAGE
            assert pages == recorder.num_bytes <= budget < pages + recorder.page_bytes
            assert used == pages + 16 * entry
            assert len(recorder.rings) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, FP4])
def test_a_ring_that_kernels_cannot_reach_says_so(dtype: torch.dtype) -> None:
    """They reckon with 32 bits within a layer; a ring of Qwen3-8B."""
    shape = AttentionShape(36, 32, 8, 128, torch.bfloat16, torch.device("meta"))
    most = 2**31 // (PAGE * 8 * 128) - 1
    page = PAGE * shape.entry_bytes(dtype)
    within, beyond = (QueryRecorder(shape, 512, 64, n * page, dtype) for n in (most, most + 1))
    assert within.num_pages == beyond.num_pages == most
    assert within.ring.queries[0].numel() * (2 if dtype == FP4 else 1) < 2**31
    assert (within.why, beyond.why) == ("as set", "as set, but kernels reach no further")


def test_fp8_keeps_queries_of_any_size() -> None:
    """Each head has a power of two of its own: 2000 is as exact as 2, beside it and in other heads."""
    ring = Ring.zeros((2 * PAGE + 1, 4, 6), FP8)
    rows = torch.tensor([2000.0, -1999.0, 448.0, 3.0, -0.03, 1.7])
    queries = torch.stack([rows, rows / 1000, rows * 1e30, torch.zeros(6)]).view(1, -1)
    store(ring, torch.tensor([[1]]), queries)
    got = recorded(ring, 0, 1, ((1,),))[0, :, 0]
    assert ring.scales[PAGE].tolist() == [3, -7, 102, -100]
    for ours, head in zip(got, queries.view(4, 6), strict=True):
        # Three bits behind the point, and the smallest number that a head's scale leaves.
        assert ((ours - head).abs() <= head.abs() / 16 + head.abs().max() * 2.0**-18).all()
    assert torch.equal(got, stored(queries.view(4, 6), FP8))
    ring.queries[PAGE], ring.scales[PAGE] = torch.zeros(4, 6), 0
    assert ring.queries.float().count_nonzero() == ring.scales.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp8_clamps_instead_of_making_nan(dtype: torch.dtype) -> None:
    """e4m3 has no infinity: one becomes the largest number that there is, and a NaN stays alone."""
    ring = Ring.zeros((PAGE + 1, 3, 2), FP8)
    huge = torch.finfo(dtype).max
    queries = torch.tensor([[-huge, 1.0, torch.inf, huge, torch.nan, huge]], dtype=dtype)
    store(ring, torch.tensor([[0]]), queries)
    finite, infinite, broken = recorded(ring, 0, 1, ((0,),))[0, :, 0]
    assert finite[0] == pytest.approx(max(-huge, -448 * 2.0**119), rel=1 / 16)
    assert infinite[0] == 448 * 2.0**119 and infinite[1].isfinite()
    assert broken[0].isnan() and broken[1].isfinite()


@pytest.mark.parametrize("dim", [64, 80, 128, 192, 256])
def test_fp4_keeps_the_nearest_of_fifteen_numbers(dim: int) -> None:
    """From the definition: the largest number of each part divided by 6, rounded to 3 bits of mantissa,
    is its scale; and every part has one of its own."""
    parts = 4 if dim <= 128 else 8
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    rows = torch.randn(50, parts, dim // parts) * 10.0 ** torch.arange(-4, parts - 4)[:, None]
    got = Ring.of(rows.flatten(1), FP4).numbers().unflatten(1, (parts, -1)).double()
    fraction, exponent = (rows.double().abs().amax(-1, keepdim=True) / 6).frexp()
    scale = ((fraction * 16).round() / 16).ldexp(exponent)
    nearest = (rows.double().abs()[..., None] - scale[..., None] * sizes).abs().amin(-1)
    assert torch.equal((got.abs() / scale).unique(), sizes)
    torch.testing.assert_close((rows.double() - got).abs(), nearest, rtol=0, atol=0)


def test_a_ring_is_checked() -> None:
    with pytest.raises(ValueError, match=r"takes scales of torch.int8, \(3, 1\)"):
        Ring(torch.zeros(3, 1, 4).to(FP8))
    with pytest.raises(ValueError, match=r"takes scales of torch.int8, \(3, 1\)"):
        Ring(torch.zeros(3, 1, 4).to(FP8), torch.zeros(3, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"takes scales of torch.uint8, \(3, 1, 8\)"):
        Ring(torch.zeros(3, 1, 96, dtype=FP4), torch.zeros(3, 1, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"takes no scales"):
        Ring(torch.zeros(3, 1, 4), torch.zeros(3, 1, dtype=torch.int8))
    with pytest.raises(ValueError, match="fp4 needs a head_dim that is a multiple of 8, not 132"):
        Ring.zeros((3, 1, 132), FP4)
    with pytest.raises(ValueError, match="another number of blocks than that of 2 tokens at 63"):
        recorded(Ring.zeros((2 * PAGE + 1, 1, 4), torch.float32), 63, 2, ((0,),))


@pytest.mark.parametrize("ring_dtype", [torch.float32, torch.float16, torch.bfloat16, FP8, FP4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_queries_of_any_float_dtype_are_accepted(ring_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Some models keep RoPE's result in float32 while the ring has the model's dtype."""
    ring = Ring.zeros((3 * PAGE + 1, 2, 4), ring_dtype)
    numbers = [0, 6, 12, 24, 1.5, 3, -3, 48]
    store(ring, torch.tensor([[2]]), torch.tensor([numbers]).to(dtype))
    got = recorded(ring, 0, 1, ((2,),))
    assert got.float().flatten().tolist() == numbers


def test_queries_may_be_a_slice_of_a_wider_projection() -> None:
    """q is a view into qkv in models without RoPE or with in-place RoPE; heads may be split already."""
    qkv = torch.randn(3, 40)
    pages = torch.tensor([[0, 1], [2, 3], [4, 5]])
    flat, split = (Ring.zeros((6 * PAGE + 1, 2, 4), torch.float32) for _ in range(2))
    store(flat, pages, qkv[:, 8:24])
    store(split, pages, qkv[:, 8:24].view(3, 4, 4))
    assert torch.equal(flat.queries, split.queries)
    for token in range(3):
        for head in range(4):  # heads of one GQA group follow each other
            member, kv_head = head % 2, head // 2
            expected = qkv[token, 8 + 4 * head : 12 + 4 * head]
            assert torch.equal(flat.queries[(2 * token + member) * PAGE, kv_head], expected)


def test_what_is_read_is_a_copy() -> None:
    """The ring is overwritten by the next step while scores are still computed from it."""
    for dtype in (torch.float32, FP8):
        ring = Ring.zeros((5 * PAGE + 1, 1, 2), dtype)
        store(ring, torch.arange(5)[:, None], torch.randn(5, 2))
        got = recorded(ring, 0, 1, ((0,), (1,), (2,), (3,)))
        before = got.clone()
        assert before.count_nonzero() == 8
        ring.queries.zero_()
        assert torch.equal(got, before)
