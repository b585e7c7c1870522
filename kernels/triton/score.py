"""Attention scores of the keys of many windows, in all layers of a pass, without a W x W matrix.

``prepare.py`` leaves the keys of each window and head turned and in one piece. Then two launches. The
first walks the keys for a block of queries and leaves each query's log-sum-exp. The second walks the
queries for a block of keys, makes the probabilities again from the logits and those sums, and adds them
up per key. Queries are read from the ring through their pages; sums are float32 and their order is
fixed, so equal inputs give equal bits.

Matrix instructions leave columns 8i + 2j and 8i + 2j + 1 of a row in one thread. What is added up along
a row is therefore kept as four sums, one for each j, until the end: :func:`_by_thread`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kara_sglang.kernels.backend import WindowJob
from kara_sglang.kernels.record import EXPONENTS, FP4, FP4_SHIFT, PAGE, most_blocks, scales_of
from kara_sglang.kernels.score import AttentionRule
from kara_sglang.kernels.triton.launch import Launch
from kara_sglang.kernels.triton.numbers import (
    E2M1,
    NATIVE_E4M3,
    exponent_of,
    from_e2m1,
    load_float,
    power_of_two,
    scale_of,
    size_of,
)
from kara_sglang.kernels.triton.pool import (
    PoolTables,
    layer_buffer,
    ring_type,
    stored_type,
    task,
    within,
)
from kara_sglang.kernels.triton.prepare import prepare

_E2M1_EXPONENT: tl.constexpr = tl.constexpr(3 - FP4_SHIFT)  # of a product of from_e2m1 and scale_of
_LOWEST: tl.constexpr = tl.constexpr(EXPONENTS[0])
_HIGHEST: tl.constexpr = tl.constexpr(EXPONENTS[1])
# A logit that does not count. No infinity, whose difference from itself would be NaN.
_HIDDEN: tl.constexpr = tl.constexpr(-3e38)
# One compilation serves every number of windows and layers, so a warm-up compiles all that is needed.
_NUMBERS = ("first_layer", "num_jobs", "first_query")


@triton.jit
def _by_thread(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Axes 1 and 3 of the result lie in one thread; see above."""
    return tl.reshape(tile, (ROWS, COLUMNS // 8, 4, 2))


@triton.jit
def _page(pages, number):
    """One of a window's pages, by a sum and not by a load, for which the loop's copies would wait."""
    every = tl.arange(0, pages.shape[0])
    return tl.sum(tl.where(every == number, pages, 0), axis=0)


@triton.jit
def _of_head(
    rings,
    ring_scales,
    layer,
    head,
    DIM: tl.constexpr,
    SCALES: tl.constexpr,
    RING: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Where one KV head's queries and their scales begin in a layer's ring."""
    ring = layer_buffer(rings, layer, RING, ALIGN)
    if E2M1 == RING:
        WORD: tl.constexpr = tl.int32 if SCALES == 4 else tl.int64
        return ring + head * (DIM // 2), layer_buffer(ring_scales, layer, WORD, SCALES) + head
    elif tl.float8e4nv == RING:
        return ring + head * DIM, layer_buffer(ring_scales, layer, tl.int8, 1) + head
    else:
        return ring + head * DIM, None


@triton.jit
def _queries(
    ring,
    ring_scales,
    entry,
    inside,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SCALES: tl.constexpr,
    RING: tl.constexpr,
    DOT: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Recorded queries, a row each where ``ROWS`` is 1, a column each where it is 0, in one tile or, of
    e2m1, two: the first and the second half of a head's numbers. And an exponent for each: bfloat16 is
    divided by a power of two where it becomes float16, and e2m1 comes with one."""
    BYTES: tl.constexpr = DIM // 2 if E2M1 == RING else DIM  # or numbers, where they are no pairs
    dim = tl.arange(0, BLOCK_D)
    mask = tl.expand_dims(inside, ROWS) & tl.expand_dims(within(dim, BYTES, BLOCK_D), 1 - ROWS)
    offset = tl.expand_dims(entry * (HEADS * BYTES), ROWS) + tl.expand_dims(dim, 1 - ROWS)
    if E2M1 == RING:
        first, second = from_e2m1(tl.load(ring + offset, mask=mask, other=0))
        words = tl.load(ring_scales + entry * HEADS, mask=inside, other=0)
        part = dim // (DIM // SCALES)
        if BYTES % BLOCK_D != 0:  # numbers that are none have a scale, too: 0 times it must be 0
            part = tl.minimum(part, SCALES // 2 - 1)
        shift = tl.expand_dims(part * 8, 1 - ROWS)
        words = tl.expand_dims(words, ROWS)
        first *= scale_of(words >> shift)
        second *= scale_of(words >> (shift + SCALES * 4))
        return (first.to(DOT), second.to(DOT)), tl.full(entry.shape, _E2M1_EXPONENT, tl.int32)
    else:
        query = load_float(ring + offset, mask, RING, NATIVE)
        exponent = tl.zeros(entry.shape, tl.int32)
        if (tl.bfloat16 == RING) & (tl.float16 == DOT):
            query = query.to(tl.float32)
            exponent = exponent_of(tl.max(size_of(query), axis=ROWS), _LOWEST, _HIGHEST)
            query *= tl.expand_dims(power_of_two(-exponent), ROWS)
        elif tl.float8e4nv == RING and ROWS == 1:  # the second step has its products with the sums
            exponent = tl.load(ring_scales + entry * HEADS, mask=inside, other=0).to(tl.int32)
        return (query.to(DOT),), exponent


@triton.jit(do_not_specialize=_NUMBERS)
def log_sum_exp_kernel(
    sums,
    rings,
    ring_scales,
    turned,
    key_scales,
    recorders,
    first_layer,
    num_jobs,
    first_query,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    VOICES: tl.constexpr,
    RING_PAGE: tl.constexpr,
    MOST: tl.constexpr,
    DIM: tl.constexpr,
    SCALES: tl.constexpr,
    RING: tl.constexpr,
    DOT: tl.constexpr,
    ALIGN: tl.constexpr,
    NATIVE: tl.constexpr,
    CAUSAL: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (layer, window, head, voice, block of queries); sums are base-2 logarithms.

    Behind the sums of a head's ``VOICES * COUNT`` queries lies by what each one's logits were
    multiplied. Where probabilities are squared both are doubled, as the square of a power has twice
    its exponent.
    """
    BLOCKS: tl.constexpr = (COUNT + BLOCK_Q - 1) // BLOCK_Q
    index, layer, job, head = task(VOICES * BLOCKS, num_jobs, first_layer, HEADS)
    member = tl.program_id(0) // BLOCKS % VOICES
    recorder = recorders + job * (1 + VOICES * MOST)
    voter = tl.program_id(0) % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = within(voter, COUNT, BLOCK_Q)
    token = first_query + voter
    place = tl.load(recorder) + token
    page = tl.load(recorder + 1 + member * MOST + place // RING_PAGE, mask=inside, other=0)
    ring, ring_scales = _of_head(rings, ring_scales, layer, head, DIM, SCALES, RING, ALIGN)
    queries, exponent = _queries(
        ring,
        ring_scales,
        page * RING_PAGE + place % RING_PAGE,
        inside,
        HEADS,
        DIM,
        SCALES,
        RING,
        DOT,
        NATIVE,
        BLOCK_D,
        1,
    )
    query_scale = power_of_two(exponent) * tl.load(key_scales + index)

    NUMBERS: tl.constexpr = DIM // len(queries)
    dim = tl.arange(0, BLOCK_D)
    is_dim = within(dim, NUMBERS, BLOCK_D)
    turned += index.to(tl.int64) * (WIDTH * DIM)
    largest = tl.full((BLOCK_Q, 4), _HIDDEN, dtype=tl.float32)
    total = tl.zeros((BLOCK_Q, 4), dtype=tl.float32)
    for first in range(0, WIDTH, BLOCK_K):
        position = first + tl.arange(0, BLOCK_K)
        is_key = within(position, WIDTH, BLOCK_K)
        products = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32)
        for part in tl.static_range(len(queries)):
            key = tl.load(
                turned + part * NUMBERS + position[None, :] * DIM + dim[:, None],
                mask=is_dim[:, None] & is_key[None, :],
                other=0.0,
            )
            products = tl.dot(queries[part], key, products, input_precision="tf32")
        visible = is_key[None, :]
        if CAUSAL:
            visible = visible & (position[None, :] <= token[:, None])
        products = _by_thread(tl.where(visible, products, _HIDDEN), BLOCK_Q, BLOCK_K)
        new_largest = tl.maximum(largest, tl.max(tl.max(products, axis=3), axis=1))
        bound = new_largest * query_scale[:, None]
        shrink = tl.exp2(largest * query_scale[:, None] - bound)
        powers = tl.exp2(products * query_scale[:, None, None, None] - bound[:, None, :, None])
        total = total * shrink + tl.sum(tl.sum(powers, axis=3), axis=1)
        largest = new_largest
    bound = largest * query_scale[:, None]
    most = tl.max(bound, axis=1)
    total = tl.sum(total * tl.exp2(bound - most[:, None]), axis=1)
    sums += index.to(tl.int64) * (2 * VOICES * COUNT) + member * COUNT
    log_sum = most + tl.log2(total)
    if SQUARED:
        log_sum *= 2
        query_scale *= 2
    tl.store(sums + voter, log_sum, mask=inside)
    tl.store(sums + VOICES * COUNT + voter, query_scale, mask=inside)


@triton.jit(do_not_specialize=_NUMBERS)
def column_sum_kernel(
    scores,
    sums,
    weights,
    rings,
    ring_scales,
    turned,
    recorders,
    first_layer,
    num_jobs,
    first_query,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    VOICES: tl.constexpr,
    RING_PAGE: tl.constexpr,
    MOST: tl.constexpr,
    DIM: tl.constexpr,
    SCALES: tl.constexpr,
    RING: tl.constexpr,
    DOT: tl.constexpr,
    ALIGN: tl.constexpr,
    NATIVE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program per (layer, window, head, block of keys)."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = (COUNT + BLOCK_Q - 1) // BLOCK_Q
    index, layer, job, head = task(BLOCKS, num_jobs, first_layer, HEADS)
    ring, ring_scales = _of_head(rings, ring_scales, layer, head, DIM, SCALES, RING, ALIGN)
    recorder = recorders + job * (1 + VOICES * MOST)
    start = tl.load(recorder)
    number = tl.arange(0, BLOCK_P)
    pages = tl.load(recorder + 1 + number, mask=number < VOICES * MOST, other=0)
    sums += index.to(tl.int64) * (2 * VOICES * COUNT)

    dim = tl.arange(0, BLOCK_D)
    position = tl.program_id(0) % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    is_key = within(position, WIDTH, BLOCK_K)
    turned += index.to(tl.int64) * (WIDTH * DIM)
    NUMBERS: tl.constexpr = DIM // 2 if E2M1 == RING else DIM  # of a tile of queries
    at = turned + position[:, None] * DIM + dim[None, :]
    is_number = is_key[:, None] & within(dim, NUMBERS, BLOCK_D)[None, :]
    key = tl.load(at, mask=is_number, other=0.0)
    keys = (key, tl.load(at + NUMBERS, mask=is_number, other=0.0)) if E2M1 == RING else (key,)
    score = tl.zeros((BLOCK_K, 4, 2), dtype=tl.float32)
    for step in range(VOICES * STEPS):
        member = step // STEPS
        voter = step % STEPS * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside = within(voter, COUNT, BLOCK_Q)
        token = first_query + voter
        place = start + token
        # At most a page and the next one.
        block = (start + first_query + step % STEPS * BLOCK_Q) // RING_PAGE
        first, second = _page(pages, member * MOST + block), _page(pages, member * MOST + block + 1)
        page = tl.where(place // RING_PAGE == block, first, second)
        queries, _ = _queries(
            ring,
            ring_scales,
            page * RING_PAGE + place % RING_PAGE,
            inside,
            HEADS,
            DIM,
            SCALES,
            RING,
            DOT,
            NATIVE,
            BLOCK_D,
            0,
        )
        row = sums + member * COUNT + voter
        log_sum = tl.load(row, mask=inside, other=float("inf"))  # inf: no probability
        query_scale = tl.load(row + VOICES * COUNT, mask=inside, other=0.0)
        products = tl.zeros((BLOCK_K, BLOCK_Q), dtype=tl.float32)
        for part in tl.static_range(len(queries)):
            products = tl.dot(keys[part], queries[part], products, input_precision="tf32")
        probability = tl.exp2(products * query_scale[None, :] - log_sum[None, :])
        if CAUSAL:
            probability = tl.where(position[:, None] <= token[None, :], probability, 0.0)
        score += tl.sum(_by_thread(probability, BLOCK_K, BLOCK_Q), axis=1)
    place = index.to(tl.int64) * WIDTH + position
    weight = tl.load(weights + place, mask=is_key, other=0.0)
    score = tl.sum(tl.sum(score, axis=2), axis=1)
    tl.store(scores + place, score * weight, mask=is_key)


@dataclass(frozen=True, slots=True)
class Voters:
    """Which recorded queries score the windows of one call.

    Attributes
    ----------
    recorders
        A row per window, int32, shape ``(num_jobs, 1 + voices * most_blocks(recorded tokens))``: where
        in its page the query of the window's first token lies, and, voice by voice, the pages of the
        blocks from there on.
    voices
        Recorded queries of a token and KV head.
    first, count
        Tokens from the window's start on that are left out, and that vote.
    """

    recorders: torch.Tensor
    voices: int
    first: int
    count: int

    @property
    def blocks(self) -> int:
        """For which a voice has room for pages."""
        return (self.recorders.shape[1] - 1) // self.voices

    @property
    def rows(self) -> int:
        """Recorded query heads per window and KV head."""
        return self.count * self.voices


def recorders_of(jobs: list[WindowJob]) -> torch.Tensor:
    """:attr:`Voters.recorders` of windows with equally many voices and recorded tokens, on the host."""
    rows = []
    for job in jobs:
        most = most_blocks(job.query_count)
        row = [job.query_start % PAGE]
        for pages in job.pages or ():
            row += [*pages, *(0,) * (most - len(pages))]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int32)


class Scratch(NamedTuple):
    """What lies between the launches of one call, for each (layer, window, head): see ``prepare.py``
    for the first three; ``sums`` are the queries' log-sum-exps and what their logits are multiplied by,
    float32."""

    turned: torch.Tensor
    key_scales: torch.Tensor
    weights: torch.Tensor
    sums: torch.Tensor

    @staticmethod
    def regions(
        heads: tuple[int, int, int], width: int, head_dim: int, rows: int, dot: torch.dtype
    ) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shapes and dtypes of the four for ``(num_layers, num_jobs, num_kv_heads)``."""
        return (
            ((*heads, width, head_dim), dot),
            (heads, torch.float32),
            ((*heads, width), torch.float32),
            ((*heads, 2, rows), torch.float32),
        )


def attention_scores(
    tables: PoolTables,
    layers: range,
    slots: torch.Tensor,
    voters: Voters,
    *,
    rule: AttentionRule,
    scratch: Scratch,
    out: torch.Tensor,
) -> list[Launch]:
    """What computes :func:`kara_sglang.kernels.score.attention_scores` for many windows and layers at
    once, up to the neighbours' blend and the sum over heads, which ``select.py`` makes.

    Parameters
    ----------
    tables : PoolTables
    layers : range
        Layers to score, consecutive.
    slots : torch.Tensor
        The windows' slots in token order, shape ``(num_jobs, W)``, integer, contiguous.
    voters : Voters
        ``rule.voters`` is already in it.
    rule : AttentionRule
    scratch : Scratch
        Overwritten.
    out : torch.Tensor
        Scores, shape ``(len(layers), num_jobs, num_kv_heads, W)``, float32, contiguous.

    Raises
    ------
    ValueError
        Where there is no ring, or no RoPE shift although the rule wants one, there are pages for fewer
        tokens than vote, shapes do not fit, or a tensor has gaps.
    """
    num_jobs, width = slots.shape
    heads = len(layers), num_jobs, tables.num_kv_heads
    if tables.rings is None:
        raise ValueError("scores need recorded queries, and the pool has no ring")
    if rule.ahead and tables.rope_shift is None:
        raise ValueError("queries cannot be moved ahead: the pool has no RoPE shift")
    if voters.blocks < most_blocks(voters.first + voters.count):
        raise ValueError(
            f"{voters.first + voters.count} queries asked of {voters.blocks} pages of a ring"
        )
    if out.shape != (*heads, width):
        raise ValueError(f"scores of shape {tuple(out.shape)} for {len(layers)} layers")
    wanted = Scratch.regions(heads, width, tables.head_dim, voters.rows, tables.dot)
    for name, part, (shape, dtype) in zip(Scratch._fields, scratch, wanted, strict=True):
        if part.numel() < math.prod(shape) or part.dtype != dtype:
            raise ValueError(
                f"{part.numel()} {name} of {part.dtype} where {math.prod(shape)} of {dtype} are needed"
            )
    if len(voters.recorders) != num_jobs or voters.recorders.dtype != torch.int32:
        raise ValueError(
            f"{len(voters.recorders)} recorders of {voters.recorders.dtype} for {num_jobs} windows"
        )
    for tensor in (slots, out, *scratch, voters.recorders):
        if not tensor.is_contiguous():
            raise ValueError("slots, scores, scratch and recorders must be contiguous")
    arguments = {
        "rings": tables.rings,
        "ring_scales": tables.ring_scales,
        "turned": scratch.turned,
        "sums": scratch.sums,
        "recorders": voters.recorders,
        "first_layer": layers.start,
        "num_jobs": num_jobs,
        "first_query": voters.first,
        "WIDTH": width,
        "COUNT": voters.count,
        "HEADS": tables.num_kv_heads,
        "VOICES": voters.voices,
        "RING_PAGE": PAGE,
        "MOST": voters.blocks,
        "DIM": tables.head_dim,
        "SCALES": scales_of(tables.head_dim) if tables.ring_dtype == FP4 else None,
        "RING": ring_type(tables.ring_dtype),
        "DOT": stored_type(tables.dot),
        "ALIGN": tables.alignment,
        "NATIVE": tables.capability >= NATIVE_E4M3,
        "CAUSAL": rule.causal,
        "BLOCK_D": triton.next_power_of_2(tables.pool.rings[0].queries.shape[-1]),
        "enable_fp_fusion": True,
    }
    tiles = tiles_for(tables, rule.causal)
    rows, columns = tiles.log_sum_exp, tiles.column_sum
    programs = math.prod(heads)
    return [
        prepare(tables, layers, slots, rule, scratch.turned, scratch.key_scales, scratch.weights),
        Launch(
            log_sum_exp_kernel,
            programs * voters.voices * triton.cdiv(voters.count, rows.BLOCK_Q),
            key_scales=scratch.key_scales,
            SQUARED=rule.squared,
            **arguments,
            **rows._asdict(),
        ),
        Launch(
            column_sum_kernel,
            programs * triton.cdiv(width, columns.BLOCK_K),
            scores=out,
            weights=scratch.weights,
            BLOCK_P=triton.next_power_of_2(voters.voices * voters.blocks),
            **arguments,
            **columns._asdict(),
        ),
    ]


class Tile(NamedTuple):
    """Launch options of a kernel, by the names that the launch has for them: queries and keys of a
    block, warps, and how many blocks are on their way or at work at a time."""

    BLOCK_Q: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """Of the two passes over the logits."""

    log_sum_exp: Tile
    column_sum: Tile


def tiles_for(tables: PoolTables, causal: bool) -> Tiles:
    """Sizes that spill no register on sm_80, sm_90 and sm_100.

    For fp8 queries of up to 128 numbers, all keys visible, they were chosen by a run of
    ``benchmarks/gpu/tiles.py`` on an H100, whose figures are not committed, for windows of 512 as of
    1024; the others were not timed. Wider queries leave room for fewer blocks at a time, and ``causal``
    takes more registers.
    """
    if tables.dot == torch.float32:
        rows = Tile(32, 32, 4, 1) if tables.head_dim <= 128 else Tile(16, 32, 4, 1)
        return Tiles(rows, Tile(32, 32, 4, 1))
    if tables.head_dim > 128:
        return Tiles(Tile(64, 64, 8, 2), Tile(64 if tables.ring_dtype.itemsize == 1 else 32, 64, 8, 2))
    columns = Tile(64, 128 if causal else 256, 8, 3 if tables.ring_dtype.itemsize == 1 else 2)
    return Tiles(Tile(128, 128, 8, 2), columns)
