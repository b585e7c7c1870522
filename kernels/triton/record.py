"""Storing one decode step's queries of several layers in the ring: one launch, fit for a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kara_sglang.kernels.record import EXPONENTS, PAGE, Ring, Step
from kara_sglang.kernels.triton.numbers import (
    E2M1,
    exponent_of,
    inverse_of,
    power_of_two,
    scale_code,
    size_of,
    to_e2m1,
    to_e4m3,
)
from kara_sglang.kernels.triton.pool import ring_type, scale_words

LAYERS_AT_ONCE = 8
"""Layers that a launch records. More would save launches and hold the queries of more layers."""


# row_stride is the model's; that it is a multiple of 16 makes for loads of 16 bytes.
@triton.jit(do_not_specialize=["num_blocks", "num_entries"])
def record_kernel(
    ring,
    scales,
    queries,
    rows,
    positions,
    pages,
    num_blocks,
    num_entries,
    row_stride,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    SCALES: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program per (row of the batch, head of the group) and layer: it moves that head of every KV
    head.

    Where a block has one page, the first head's program stores the mean of the group.
    """
    row = (tl.program_id(0) // GROUP).to(tl.int64)
    member = tl.program_id(0) % GROUP
    layer = tl.program_id(1)
    position = tl.load(positions + row)
    pages += (tl.load(rows + row) * num_blocks + position // PAGE % num_blocks) * GROUP
    page = tl.load(pages + member).to(tl.int64)
    if page < 0:
        return
    entry = layer.to(tl.int64) * num_entries + page * PAGE + position % PAGE
    of_layer = queries[0]
    for number in tl.static_range(1, len(queries)):
        of_layer = tl.where(layer == number, queries[number], of_layer)
    query = of_layer + row * row_stride
    with_others = False
    if GROUP > 1:
        with_others = tl.load(pages + 1) < 0
    kv_head = tl.arange(0, BLOCK_HEADS)
    head = kv_head[:, None]
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    if E2M1 == RING:
        HALF: tl.constexpr = DIM // 2
        PARTS: tl.constexpr = SCALES // 2
        mask = (head < HEADS) & (dim < HALF)
        part = dim // (DIM // SCALES)
        codes = tl.zeros((BLOCK_HEADS,), dtype=scales.dtype.element_ty)  # an integer holds all of them
        packed = tl.zeros((BLOCK_HEADS, BLOCK_DIM), dtype=tl.int32)
        for half in tl.static_range(2):
            value = _query(query + half * HALF, member, with_others, head, dim, mask, GROUP, DIM)
            size = size_of(value)
            inverse = tl.zeros((BLOCK_HEADS, BLOCK_DIM), dtype=tl.float32)
            for number in tl.static_range(PARTS):
                code = scale_code(tl.max(tl.where(part == number, size, 0), axis=1))
                codes |= code.to(codes.dtype) << (8 * (half * PARTS + number))
                inverse = tl.where(part == number, inverse_of(code)[:, None], inverse)
            negative, magnitude = to_e2m1(value * inverse)
            if half == 0:
                packed = (negative << 7) | (magnitude << 1)
            else:
                packed |= (magnitude << 4) | negative
        tl.store(scales + entry * HEADS + kv_head, codes, mask=kv_head < HEADS)
        tl.store(ring + entry * (HEADS * HALF) + head * HALF + dim, packed.to(tl.uint8), mask=mask)
    else:
        mask = (head < HEADS) & (dim < DIM)
        value = _query(query, member, with_others, head, dim, mask, GROUP, DIM)
        if tl.float8e4nv == RING:
            exponent = exponent_of(tl.max(size_of(value), axis=1), LOWEST, HIGHEST)
            value = to_e4m3(value * power_of_two(-exponent)[:, None])
            tl.store(scales + entry * HEADS + kv_head, exponent.to(tl.int8), mask=kv_head < HEADS)
        tl.store(ring + entry * (HEADS * DIM) + head * DIM + dim, value, mask=mask)


@triton.jit
def _query(query, member, with_others, head, dim, mask, GROUP: tl.constexpr, DIM: tl.constexpr):
    """One head of each group, float32, or the mean of all that are in it."""
    query += head * (GROUP * DIM) + dim
    value = tl.load(query + member * DIM, mask=mask, other=0.0).to(tl.float32)
    if GROUP > 1:  # noqa: SIM102 - this one is decided when it is compiled
        if with_others:
            for other in range(1, GROUP):
                value += tl.load(query + other * DIM, mask=mask, other=0.0).to(tl.float32)
            value *= 1 / GROUP
    return value


def record(ring: Ring, step: Step, queries: Sequence[torch.Tensor]) -> None:
    """As :func:`kara_sglang.kernels.record.record`, but nothing is written for rows without recorder.

    Parameters
    ----------
    ring : Ring
        Of as many layers as there are queries, at most ``LAYERS_AT_ONCE``; contiguous, written in
        place.
    step : Step
    queries : sequence of torch.Tensor
        One per layer, shape ``(batch, num_kv_heads * group * head_dim)`` or with the last dimension
        already split; rows may be apart, as in a fused QKV output, in all layers equally far.

    Raises
    ------
    ValueError
        Where a tensor does not lie in memory as said above.
    """
    _, num_blocks, group = step.pages.shape
    num_layers, num_entries, num_kv_heads, _ = ring.queries.shape
    head_dim = ring.head_dim
    batch = len(step.rows)
    if batch == 0:
        return
    if not ring.queries.is_contiguous() or not step.pages.is_contiguous():
        raise ValueError("ring and pages must be contiguous")
    if num_layers != len(queries) or num_layers > LAYERS_AT_ONCE:
        raise ValueError(f"{len(queries)} layers of queries for a ring of {num_layers}")
    rows = [of_layer.view(batch, -1) for of_layer in queries]
    stride = rows[0].stride(0)
    for of_layer in rows:
        if of_layer.shape[1] != num_kv_heads * group * head_dim or of_layer.stride(1) != 1:
            raise ValueError(
                f"queries of a row must be {num_kv_heads * group * head_dim} numbers without gaps, got "
                f"shape {tuple(of_layer.shape)} with strides {of_layer.stride()}"
            )
        if of_layer.stride(0) != stride:
            raise ValueError(f"rows of queries are {of_layer.stride(0)} and {stride} numbers apart")
    kind = ring_type(ring.queries.dtype)
    record_kernel[(batch * group, num_layers)](
        ring.queries.view(torch.uint8) if kind.is_fp8() else ring.queries,
        scale_words(ring),
        # The last one stands in for those that are missing, so that one compilation serves all.
        tuple(rows + rows[-1:] * (LAYERS_AT_ONCE - num_layers)),
        step.rows,
        step.positions,
        step.pages,
        num_blocks,
        num_entries,
        stride,
        PAGE=PAGE,
        GROUP=group,
        HEADS=num_kv_heads,
        DIM=head_dim,
        RING=kind,
        SCALES=ring.scales.shape[-1] if ring.scales is not None and kind == tl.uint8 else None,
        LOWEST=EXPONENTS[0],
        HIGHEST=EXPONENTS[1],
        BLOCK_HEADS=triton.next_power_of_2(num_kv_heads),
        BLOCK_DIM=triton.next_power_of_2(ring.queries.shape[-1]),
        num_warps=4,
    )
