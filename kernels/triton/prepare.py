"""What a window's score needs of K and V, once per window and head, in all layers of a pass.

The score multiplies every recorded query with every key, several times over. So the keys are read
through their slots once and written one behind the other, in the type that matrix units multiply, and
whatever depends on the key alone is done here:

* *The turn.* ``R(W) q . k = q . R(-W) k``: where queries are moved ahead, W keys are turned back
  instead of W times as many queries as a group has heads.
* *A power of two* per window and head, by which keys are divided, so that float16 holds whatever
  bfloat16 did. It goes into the softmax scale.
* *The weight* of each key's score: the norm of its value and the distance of its direction from the
  window's mean key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kara_sglang.kernels.record import EXPONENTS
from kara_sglang.kernels.score import AttentionRule
from kara_sglang.kernels.triton.fp8 import (
    NATIVE_E4M3,
    exponent_of,
    load_float,
    power_of_two,
    size_of,
)
from kara_sglang.kernels.triton.pool import PoolTables, layer_buffer, stored_type, task, within

NUMBERS = 8192  # of K, and about as many of V, that a program holds at once
WARPS = 8

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_TINY: tl.constexpr = tl.constexpr(1e-8)  # torch.cosine_similarity's
# Smaller keys lose nothing to float16 either, and no product with a query's own power underflows.
_LOWEST: tl.constexpr = tl.constexpr(-16)
_HIGHEST: tl.constexpr = tl.constexpr(EXPONENTS[1])


@triton.jit
def _rows(
    buffer,
    slots,
    first,
    column,
    inside,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    STORED: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some ``column``s of one head of a block of a window's tokens, float32, 0 where not ``inside``."""
    position = first + tl.arange(0, BLOCK_K)
    is_token = within(position, WIDTH, BLOCK_K)
    slot = tl.load(slots + position, mask=is_token, other=0).to(tl.int64)
    rows = buffer + (slot * (HEADS * DIM))[:, None] + column[None, :]
    return load_float(rows, is_token[:, None] & inside[None, :], STORED, NATIVE).to(tl.float32)


@triton.jit(do_not_specialize=("first_layer", "num_jobs"))
def prepare_kernel(
    turned,
    key_scales,
    weights,
    keys,
    values,
    scales,
    cosines,
    sines,
    partners,
    slots,
    first_layer,
    num_jobs,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY: tl.constexpr,
    DOT: tl.constexpr,
    ALIGN: tl.constexpr,
    NATIVE: tl.constexpr,
    AHEAD: tl.constexpr,
    VALUE_NORM: tl.constexpr,
    DISTANCE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per (layer, window, head) walks the window twice: mean and largest, then the rest.

    Keys are turned back unless ``AHEAD`` is 0; else it is the turn's ``run``.
    """
    index, layer, job, head = task(1, num_jobs, first_layer, HEADS)
    key_buffer = layer_buffer(keys, layer, KEY, ALIGN) + head * DIM
    value_buffer = layer_buffer(values, layer, KEY, ALIGN) + head * VALUE_DIM
    slots += job * WIDTH
    dim = tl.arange(0, BLOCK_D)
    is_dim = within(dim, DIM, BLOCK_D)
    value_dim = tl.arange(0, BLOCK_V)
    is_value = within(value_dim, VALUE_DIM, BLOCK_V)

    total = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    largest = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.int32)
    for first in range(0, WIDTH, BLOCK_K):
        key = _rows(key_buffer, slots, first, dim, is_dim, WIDTH, HEADS, DIM, KEY, NATIVE, BLOCK_K)
        total += key
        largest = tl.maximum(largest, size_of(key))
    mean = tl.sum(total, axis=0)
    # The direction of the sum is that of the mean; the bound on its length is the mean's.
    direction = mean / tl.maximum(tl.sqrt(tl.sum(mean * mean, axis=0)), _TINY * WIDTH)
    scale = tl.load(scales + layer) * _LOG2_E
    shrink = 1.0
    if tl.float16 == DOT:
        exponent = exponent_of(tl.max(tl.max(largest, axis=1), axis=0), _LOWEST, _HIGHEST)
        scale *= power_of_two(exponent)
        shrink = power_of_two(-exponent)
    tl.store(key_scales + index, scale)

    if AHEAD:
        partner = tl.load(partners + layer * DIM + dim, mask=is_dim, other=0)
        partner = tl.max_contiguous(tl.multiple_of(partner, AHEAD), AHEAD)
        cosine = tl.load(cosines + layer * DIM + dim, mask=is_dim, other=0) * shrink
        sine = tl.load(sines + layer * DIM + dim, mask=is_dim, other=0) * shrink
    turned += index.to(tl.int64) * (WIDTH * DIM)
    weights += index.to(tl.int64) * WIDTH
    for first in range(0, WIDTH, BLOCK_K):
        position = first + tl.arange(0, BLOCK_K)
        is_token = within(position, WIDTH, BLOCK_K)
        key = _rows(key_buffer, slots, first, dim, is_dim, WIDTH, HEADS, DIM, KEY, NATIVE, BLOCK_K)
        if AHEAD:
            other = _rows(
                key_buffer, slots, first, partner, is_dim, WIDTH, HEADS, DIM, KEY, NATIVE, BLOCK_K
            )
            back = key * cosine[None, :] - other * sine[None, :]
        else:
            back = key * shrink
        place = position[:, None] * DIM + dim[None, :]
        tl.store(turned + place, back.to(DOT), mask=is_token[:, None] & is_dim[None, :])

        weight = tl.full((BLOCK_K,), 1.0, dtype=tl.float32)
        if VALUE_NORM:
            value = _rows(
                value_buffer,
                slots,
                first,
                value_dim,
                is_value,
                WIDTH,
                HEADS,
                VALUE_DIM,
                KEY,
                NATIVE,
                BLOCK_K,
            )
            norm = tl.sqrt(tl.sum(value * value, axis=1))
            for _ in tl.static_range(VALUE_NORM):
                weight *= norm
        if DISTANCE:
            length = tl.sqrt(tl.sum(key * key, axis=1))
            cosine_to_mean = tl.sum(key * direction[None, :], axis=1) / tl.maximum(length, _TINY)
            weight *= tl.maximum(1 - cosine_to_mean, 0.0)
        tl.store(weights + position, weight, mask=is_token)


def prepare(
    tables: PoolTables,
    layers: range,
    slots: torch.Tensor,
    rule: AttentionRule,
    turned: torch.Tensor,
    key_scales: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Read the windows' keys and values for their score.

    Parameters
    ----------
    tables : PoolTables
    layers : range
        Consecutive.
    slots : torch.Tensor
        The windows' slots in token order, shape ``(num_jobs, W)``, integer, contiguous.
    rule : AttentionRule
    turned : torch.Tensor
        Written: keys, turned back by W positions where the rule is ``ahead`` and divided by a power of
        two, shape ``(len(layers), num_jobs, num_kv_heads, W, head_dim)``, of type ``tables.dot``.
    key_scales : torch.Tensor
        Written: the softmax scale of base-2 logits times that power of two, shape ``(len(layers),
        num_jobs, num_kv_heads)``, float32.
    weights : torch.Tensor
        Written: what the attention of each key is multiplied by, shape ``(len(layers), num_jobs,
        num_kv_heads, W)``, float32.
    """
    num_jobs, width = slots.shape
    turn = tables.turn
    turns = (turn.cos, turn.sin, turn.partner) if rule.ahead else (None, None, None)
    block_d = triton.next_power_of_2(tables.head_dim)
    prepare_kernel[(len(layers) * num_jobs * tables.num_kv_heads,)](
        turned,
        key_scales,
        weights,
        tables.keys,
        tables.values,
        tables.scales,
        *turns,
        slots,
        layers.start,
        num_jobs,
        WIDTH=width,
        HEADS=tables.num_kv_heads,
        DIM=tables.head_dim,
        VALUE_DIM=tables.value_dim,
        KEY=stored_type(tables.key_dtype),
        DOT=stored_type(tables.dot),
        ALIGN=tables.alignment,
        NATIVE=tables.capability >= NATIVE_E4M3,
        AHEAD=turn.run if rule.ahead else 0,
        VALUE_NORM=rule.value_norm,
        DISTANCE=rule.key_distance,
        BLOCK_K=min(NUMBERS // block_d, triton.next_power_of_2(width)),
        BLOCK_D=block_d,
        BLOCK_V=triton.next_power_of_2(tables.value_dim),
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
