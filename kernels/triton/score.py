"""Attention scores of the keys of many windows, in all layers of a pass, without a W x W matrix.

Two launches. The first walks the window's keys for a block of queries and leaves each query's
log-sum-exp. The second walks the queries for a block of keys, makes the probabilities again from the
logits and those sums, and adds them up per key. A third (``distance.py``) follows where the rule weighs
by the distance of keys, a fourth (``neighbours.py``) where it blends the scores of neighbours. Keys and
values are read from the paged pool through their slots, queries from the ring through their units; sums
are float32 and their order is fixed, so equal inputs give equal bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kara_sglang.kernels.score import AttentionRule, share_heads
from kara_sglang.kernels.triton.distance import weigh_by_distance
from kara_sglang.kernels.triton.fp8 import load_float, power_of_two
from kara_sglang.kernels.triton.neighbours import blend_neighbours
from kara_sglang.kernels.triton.pool import PoolTables, layer_buffer, stored_type, task

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# One compilation serves every number of windows and layers, so a warm-up compiles all that is needed.
_NUMBERS = ("first_layer", "num_jobs", "width", "first_query", "num_rows", "ring_len")


@triton.jit
def _query_scale(exponents, query_head, is_row, scale, RING: tl.constexpr):
    """By what the logits of each row are multiplied; an fp8 query has an exponent of its own."""
    if tl.float8e4nv == RING:
        exponent = tl.load(exponents + query_head, mask=is_row, other=0)
        return power_of_two(exponent.to(tl.int32)) * scale
    else:
        return tl.zeros(query_head.shape, tl.float32) + scale


@triton.jit
def _query_head(
    row, is_row, token, units, start, ring_len, head, UNITS: tl.constexpr, HEADS: tl.constexpr
):
    """Where the ring holds the queries of ``row``, counted in heads from the ring's start."""
    unit = tl.load(units + row % UNITS, mask=is_row, other=0)
    place = start + token
    place = tl.where(place < ring_len, place, place - ring_len)
    return (unit * ring_len + place) * HEADS + head


@triton.jit
def _queries(
    ring,
    query_head,
    is_row,
    cosines,
    sines,
    partners,
    layer,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    DOT: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Recorded queries, a row each where ``ROWS`` is 1, a column each where it is 0.

    They are moved ahead unless ``AHEAD`` is 0; else it is the turn's ``run``.
    """
    dim = tl.arange(0, BLOCK_D)
    start = tl.expand_dims(query_head * DIM, ROWS)
    mask = tl.expand_dims(is_row, ROWS) & tl.expand_dims(dim < DIM, 1 - ROWS)
    query = load_float(ring + start + tl.expand_dims(dim, 1 - ROWS), mask, RING)
    if AHEAD:
        partner = tl.load(partners + layer * DIM + dim, mask=dim < DIM, other=0)
        partner = tl.max_contiguous(tl.multiple_of(partner, AHEAD), AHEAD)
        cosine = tl.load(cosines + layer * DIM + dim, mask=dim < DIM, other=0)
        sine = tl.load(sines + layer * DIM + dim, mask=dim < DIM, other=0)
        other = load_float(ring + start + tl.expand_dims(partner, 1 - ROWS), mask, RING)
        query = query.to(tl.float32) * tl.expand_dims(cosine, 1 - ROWS)
        query += other.to(tl.float32) * tl.expand_dims(sine, 1 - ROWS)
    return query.to(DOT)


@triton.jit(do_not_specialize=_NUMBERS)
def log_sum_exp_kernel(
    sums,
    rings,
    exponents,
    keys,
    scales,
    cosines,
    sines,
    partners,
    slots,
    units,
    starts,
    first_layer,
    num_jobs,
    width,
    first_query,
    num_rows,
    ring_len,
    HEADS: tl.constexpr,
    UNITS: tl.constexpr,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    KEY: tl.constexpr,
    DOT: tl.constexpr,
    ALIGN: tl.constexpr,
    CAUSAL: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (layer, window, head, block of queries); sums are base-2 logarithms.

    A row is one recorded query: row r is head ``r % UNITS`` of token ``first_query + r // UNITS``.
    Behind the sums of a head's rows lies by what each row's logits were multiplied.
    """
    blocks = tl.cdiv(num_rows, BLOCK_Q)
    index, layer, job, head = task(blocks, num_jobs, first_layer, HEADS)
    ring = layer_buffer(rings, layer, RING, ALIGN)
    key_buffer = layer_buffer(keys, layer, KEY, ALIGN)
    scale = tl.load(scales + layer) * _LOG2_E

    dim = tl.arange(0, BLOCK_D)
    row = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_row = row < num_rows
    token = first_query + row // UNITS
    start = tl.load(starts + job) % ring_len
    query_head = _query_head(
        row, is_row, token, units + job * UNITS, start, ring_len, head, UNITS, HEADS
    )
    query = _queries(
        ring,
        query_head,
        is_row,
        cosines,
        sines,
        partners,
        layer,
        DIM,
        RING,
        DOT,
        AHEAD,
        BLOCK_D,
        1,
    )
    if tl.float8e4nv == RING:
        exponents = layer_buffer(exponents, layer, tl.int8, 1)
    query_scale = _query_scale(exponents, query_head, is_row, scale, RING)

    largest = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for first in range(0, width, BLOCK_K):
        position = first + tl.arange(0, BLOCK_K)
        inside = position < width
        slot = tl.load(slots + job * width + position, mask=inside, other=0).to(tl.int64)
        key_head = slot * HEADS + head
        key = load_float(
            key_buffer + key_head[None, :] * DIM + dim[:, None],
            inside[None, :] & (dim[:, None] < DIM),
            KEY,
        ).to(DOT)
        logits = tl.dot(query, key, input_precision="tf32") * query_scale[:, None]
        visible = inside[None, :]
        if CAUSAL:
            visible = visible & (position[None, :] <= token[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(tl.exp2(logits - new_largest[:, None]), axis=1)
        largest = new_largest
    sums += index.to(tl.int64) * (2 * num_rows)
    tl.store(sums + row, largest + tl.log2(total), mask=is_row)
    tl.store(sums + num_rows + row, query_scale, mask=is_row)


@triton.jit(do_not_specialize=_NUMBERS)
def column_sum_kernel(
    scores,
    sums,
    rings,
    keys,
    values,
    cosines,
    sines,
    partners,
    slots,
    units,
    starts,
    first_layer,
    num_jobs,
    width,
    first_query,
    num_rows,
    ring_len,
    HEADS: tl.constexpr,
    UNITS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RING: tl.constexpr,
    KEY: tl.constexpr,
    DOT: tl.constexpr,
    ALIGN: tl.constexpr,
    CAUSAL: tl.constexpr,
    AHEAD: tl.constexpr,
    SQUARED: tl.constexpr,
    VALUE_NORM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """One program per (layer, window, head, block of keys); rows as in the first kernel."""
    blocks = tl.cdiv(width, BLOCK_K)
    index, layer, job, head = task(blocks, num_jobs, first_layer, HEADS)
    ring = layer_buffer(rings, layer, RING, ALIGN)
    start = tl.load(starts + job) % ring_len
    sums += index.to(tl.int64) * (2 * num_rows)

    dim = tl.arange(0, BLOCK_D)
    position = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = position < width
    slot = tl.load(slots + job * width + position, mask=inside, other=0).to(tl.int64)
    key_head = slot * HEADS + head
    key = load_float(
        layer_buffer(keys, layer, KEY, ALIGN) + key_head[:, None] * DIM + dim[None, :],
        inside[:, None] & (dim[None, :] < DIM),
        KEY,
    ).to(DOT)

    score = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for first in range(0, num_rows, BLOCK_Q):
        row = first + tl.arange(0, BLOCK_Q)
        is_row = row < num_rows
        token = first_query + row // UNITS
        query_head = _query_head(
            row, is_row, token, units + job * UNITS, start, ring_len, head, UNITS, HEADS
        )
        query = _queries(
            ring,
            query_head,
            is_row,
            cosines,
            sines,
            partners,
            layer,
            DIM,
            RING,
            DOT,
            AHEAD,
            BLOCK_D,
            0,
        )
        log_sum = tl.load(sums + row, mask=is_row, other=float("inf"))  # inf: no probability
        query_scale = tl.load(sums + num_rows + row, mask=is_row, other=0.0)
        logits = tl.dot(key, query, input_precision="tf32") * query_scale[None, :]
        probability = tl.exp2(logits - log_sum[None, :])
        if CAUSAL:
            probability = tl.where(position[:, None] <= token[None, :], probability, 0.0)
        if SQUARED:
            probability = probability * probability
        score += tl.sum(probability, axis=1)

    if VALUE_NORM:
        value_head = layer_buffer(values, layer, KEY, ALIGN) + key_head[:, None] * VALUE_DIM
        squares = tl.zeros((BLOCK_K,), dtype=tl.float32)
        for first in range(0, VALUE_DIM, BLOCK_VALUE):  # all at once would spill registers
            value_dim = first + tl.arange(0, BLOCK_VALUE)[None, :]
            mask = inside[:, None] & (value_dim < VALUE_DIM)
            value = load_float(value_head + value_dim, mask, KEY).to(tl.float32)
            squares += tl.sum(value * value, axis=1)
        for _ in tl.static_range(VALUE_NORM):
            score *= tl.sqrt(squares)
    tl.store(scores + index.to(tl.int64) * width + position, score, mask=inside)


@dataclass(frozen=True, slots=True)
class Voters:
    """Which recorded queries score the windows of one call.

    Attributes
    ----------
    units
        The recorders' units, shape ``(num_jobs, group)`` or ``(num_jobs, 1)``, int64.
    starts
        Logical position of each window's first token, shape ``(num_jobs,)``, int64.
    first, count
        Tokens from the window's start on that are left out, and that vote.
    """

    units: torch.Tensor
    starts: torch.Tensor
    first: int
    count: int

    @property
    def rows(self) -> int:
        """Recorded query heads per window and KV head."""
        return self.count * self.units.shape[1]


def attention_scores(
    tables: PoolTables,
    layers: range,
    slots: torch.Tensor,
    voters: Voters,
    *,
    ring_len: int,
    rule: AttentionRule,
    sums: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """As :func:`kara_sglang.kernels.score.attention_scores`, for many windows and layers at once.

    Parameters
    ----------
    tables : PoolTables
    layers : range
        Layers to score, consecutive.
    slots : torch.Tensor
        The windows' slots in token order, shape ``(num_jobs, W)``, integer, contiguous.
    voters : Voters
        ``rule.voters`` is already in it.
    ring_len : int
        Tokens per ring unit.
    rule : AttentionRule
    sums : torch.Tensor
        Scratch of ``2 * len(layers) * num_jobs * num_kv_heads * voters.rows`` float32; where the rule
        is ``per_layer``, at least ``len(layers) * num_jobs * W``, where it has ``neighbours``, at least
        as many as ``out``.
    out : torch.Tensor
        Scores, shape ``(len(layers), num_jobs, num_kv_heads, W)``, float32, contiguous.

    Raises
    ------
    ValueError
        Where there is no ring, or no turn although the rule wants one, the ring holds fewer tokens than
        asked for, shapes do not fit, or a tensor has gaps.
    """
    num_jobs, width = slots.shape
    head_rows = len(layers) * num_jobs * tables.num_kv_heads
    if tables.rings is None:
        raise ValueError("scores need recorded queries, and the pool has no ring")
    if rule.ahead and tables.turn is None:
        raise ValueError("queries cannot be moved ahead: the pool has no turn")
    if voters.first + voters.count > ring_len:
        raise ValueError(
            f"{voters.first + voters.count} queries asked of a ring that holds {ring_len} tokens"
        )
    if out.shape != (len(layers), num_jobs, tables.num_kv_heads, width):
        raise ValueError(f"scores of shape {tuple(out.shape)} for {len(layers)} layers")
    num_shared = len(layers) * num_jobs * width if rule.per_layer else 0
    num_blended = out.numel() if rule.neighbours > 1 else 0
    needed = max(2 * head_rows * voters.rows, num_shared, num_blended)
    if sums.numel() < needed or sums.dtype != torch.float32:
        raise ValueError(f"{sums.numel()} sums of {sums.dtype} where {needed} of float32 are needed")
    if voters.units.shape[0] != num_jobs or voters.starts.shape != (num_jobs,):
        raise ValueError(f"units and starts of {len(voters.units)} recorders for {num_jobs} windows")
    for tensor in (slots, out, sums, voters.units, voters.starts):
        if not tensor.is_contiguous():
            raise ValueError("slots, scores, sums, units and starts must be contiguous")
    dot = dot_dtype(tables.key_dtype, tables.ring_dtype)
    tile = tile_for(tables.head_dim, dot, causal=rule.causal, turns=False)
    column_tile = tile_for(tables.head_dim, dot, causal=rule.causal, turns=rule.ahead)
    shared = {
        "first_layer": layers.start,
        "num_jobs": num_jobs,
        "width": width,
        "first_query": voters.first,
        "num_rows": voters.rows,
        "ring_len": ring_len,
        "HEADS": tables.num_kv_heads,
        "UNITS": voters.units.shape[1],
        "DIM": tables.head_dim,
        "RING": stored_type(tables.ring_dtype),
        "KEY": stored_type(tables.key_dtype),
        "DOT": stored_type(dot),
        "ALIGN": tables.alignment,
        "CAUSAL": rule.causal,
        "AHEAD": tables.turn.run if rule.ahead else 0,
        "BLOCK_D": triton.next_power_of_2(tables.head_dim),
    }
    windows = (slots, voters.units, voters.starts)
    turn = tables.turn
    turns = (turn.cos, turn.sin, turn.partner) if rule.ahead else (None, None, None)
    log_sum_exp_kernel[(head_rows * triton.cdiv(voters.rows, tile.outer),)](
        sums,
        tables.rings,
        tables.exponents,
        tables.keys,
        tables.scales,
        *turns,
        *windows,
        BLOCK_Q=tile.outer,
        BLOCK_K=tile.inner,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **shared,
    )
    column_sum_kernel[(head_rows * triton.cdiv(width, column_tile.outer),)](
        out,
        sums,
        tables.rings,
        tables.keys,
        tables.values,
        *turns,
        *windows,
        VALUE_DIM=tables.value_dim,
        SQUARED=rule.squared,
        VALUE_NORM=rule.value_norm,
        BLOCK_Q=column_tile.inner,
        BLOCK_K=column_tile.outer,
        BLOCK_VALUE=32,
        num_warps=column_tile.num_warps,
        num_stages=column_tile.num_stages,
        **shared,
    )
    if rule.key_distance:
        weigh_by_distance(tables, layers, slots, out)
    # The sums of the two launches are not needed any more.
    if rule.neighbours > 1:
        blend_neighbours(out, rule.neighbours, sums)
    if rule.per_layer:
        share_heads(out, sums[:num_shared].view(len(layers), num_jobs, 1, width))


class Tile(NamedTuple):
    """Block sizes of a kernel: rows that a program owns, and rows per step of its loop."""

    outer: int
    inner: int
    num_warps: int
    num_stages: int


def tile_for(head_dim: int, dtype: torch.dtype, *, causal: bool, turns: bool) -> Tile:
    """Sizes that spill no register on sm_80, sm_90 and sm_100 (docs/kernels.md has the table).

    ``dtype`` is that of the dot product's operands, see :func:`dot_dtype`; ``turns`` says whether
    queries are turned inside the loop.
    """
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1) if head_dim <= 128 else Tile(16 if turns else 32, 16, 4, 1)
    if head_dim <= 128:
        return Tile(128, 32 if causal or turns else 64, 8, 3)
    return Tile(64, 16, 8, 1) if turns else Tile(64, 64, 8, 2)


def dot_dtype(*stored: torch.dtype) -> torch.dtype:
    """The narrowest type that holds all ``stored`` types exactly and has a matrix instruction.

    float32 operands are multiplied as TF32, which holds float16 and bfloat16 exactly; numbers that are
    stored in float32 are rounded to its 10 bits.
    """
    wide = [dtype for dtype in stored if dtype.itemsize > 1]
    return functools.reduce(torch.promote_types, wide, wide[0]) if wide else torch.float16
