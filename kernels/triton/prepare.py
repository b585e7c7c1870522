"""What a window's score needs of K and V, once per window and head, in all layers of a pass; or all of
the score, where no query votes.

An attention score multiplies every recorded query with every key, several times over. So the keys are
read through their slots once and written one behind the other, in the type that matrix units multiply,
and whatever depends on the key alone is done here:

* *The shift.* ``R(W) q . k = q . R(-W) k``: where queries are moved ahead, W keys are turned back
  instead of W times as many queries as a group has heads.
* *A power of two* per window and head, by which keys are divided, so that float16 holds whatever
  bfloat16 did. It goes into the softmax scale.
* *The weight* of each key's score: the norm of its value and the distance of its direction from the
  window's mean key. By itself it is the score without votes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kara_sglang.kernels.record import EXPONENTS
from kara_sglang.kernels.score import AttentionRule, WeightRule
from kara_sglang.kernels.triton.launch import Launch
from kara_sglang.kernels.triton.numbers import (
    NATIVE_E4M3,
    exponent_of,
    load_float,
    power_of_two,
    size_of,
)
from kara_sglang.kernels.triton.pool import PoolTables, layer_buffer, stored_type, task, within

# Chosen by a run of benchmarks/gpu/tiles.py on an H100, see docs/kernels.md.
NUMBERS = 2048  # of K, and about as many of V, that a program holds at once
WARPS = 4
PARTS = 4  # programs that share a window and head, so that one window fills a GPU

UNROLL: tl.constexpr = tl.constexpr(2)  # blocks of the first walk whose loads are on their way
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_TINY: tl.constexpr = tl.constexpr(1e-8)  # torch.cosine_similarity's
# Smaller keys lose nothing to float16 either, and no product with a query's own power underflows.
_LOWEST: tl.constexpr = tl.constexpr(-16)
_HIGHEST: tl.constexpr = tl.constexpr(EXPONENTS[1])


@triton.jit
def _rows(
    buffer,
    slots,
    position,
    is_token,
    column,
    inside,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    STORED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Some ``column``s of one head of some tokens of a window, float32, 0 where not ``inside``."""
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
    PARTS: tl.constexpr,
):
    """One program per (layer, window, head, part of the window) walks the whole window for the mean and
    the largest, and then its own part for the rest.

    Keys are written as ``DOT`` unless that is None, and turned back unless ``AHEAD`` is 0; else it is
    the shift's ``run``.
    """
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_K * PARTS - 1) // (BLOCK_K * PARTS)  # of a part
    part = tl.program_id(0) % PARTS
    index, layer, job, head = task(PARTS, num_jobs, first_layer, HEADS)
    key_buffer = layer_buffer(keys, layer, KEY, ALIGN) + head * DIM
    value_buffer = layer_buffer(values, layer, KEY, ALIGN) + head * VALUE_DIM
    slots += job * WIDTH
    dim = tl.arange(0, BLOCK_D)
    is_dim = within(dim, DIM, BLOCK_D)
    value_dim = tl.arange(0, BLOCK_V)
    is_value = within(value_dim, VALUE_DIM, BLOCK_V)

    total = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    largest = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for first in tl.range(0, WIDTH, BLOCK_K, loop_unroll_factor=UNROLL):
        position = first + tl.arange(0, BLOCK_K)
        is_token = within(position, WIDTH, BLOCK_K)
        key = _rows(key_buffer, slots, position, is_token, dim, is_dim, HEADS, DIM, KEY, NATIVE)
        total += key
        largest = tl.maximum(largest, tl.abs(key))
    mean = tl.sum(total, axis=0)
    # The direction of the sum is that of the mean; the bound on its length is the mean's.
    direction = mean / tl.maximum(tl.sqrt(tl.sum(mean * mean, axis=0)), _TINY * WIDTH)
    if DOT is not None:
        scale = tl.load(scales + layer) * _LOG2_E
        shrink = 1.0
        if tl.float16 == DOT:
            size = size_of(tl.max(tl.max(largest, axis=1), axis=0))
            exponent = exponent_of(size, _LOWEST, _HIGHEST)
            scale *= power_of_two(exponent)
            shrink = power_of_two(-exponent)
        tl.store(key_scales + index, scale, mask=part == 0)
        turned += index.to(tl.int64) * (WIDTH * DIM)
    if AHEAD:
        # Spelled out by runs, so that the compiler knows how wide it may load.
        run = tl.load(partners + layer * DIM + dim // AHEAD * AHEAD, mask=is_dim, other=0) // AHEAD
        partner = run * AHEAD + dim % AHEAD
        cosine = tl.load(cosines + layer * DIM + dim, mask=is_dim, other=0) * shrink
        sine = tl.load(sines + layer * DIM + dim, mask=is_dim, other=0) * shrink
    weights += index.to(tl.int64) * WIDTH
    for block in range(BLOCKS):
        position = (part * BLOCKS + block) * BLOCK_K + tl.arange(0, BLOCK_K)
        is_token = within(position, WIDTH, BLOCKS * PARTS * BLOCK_K)
        key = _rows(key_buffer, slots, position, is_token, dim, is_dim, HEADS, DIM, KEY, NATIVE)
        # All loads before the first store, which the compiler would not move them across.
        if AHEAD:
            other = _rows(
                key_buffer, slots, position, is_token, partner, is_dim, HEADS, DIM, KEY, NATIVE
            )
            back = key * cosine[None, :] - other * sine[None, :]
        elif DOT is not None:
            back = key * shrink
        weight = tl.full((BLOCK_K,), 1.0, dtype=tl.float32)
        if VALUE_NORM:
            value = _rows(
                value_buffer,
                slots,
                position,
                is_token,
                value_dim,
                is_value,
                HEADS,
                VALUE_DIM,
                KEY,
                NATIVE,
            )
            norm = tl.sqrt(tl.sum(value * value, axis=1))
            for _ in tl.static_range(VALUE_NORM):
                weight *= norm
        if DOT is not None:
            place = position[:, None] * DIM + dim[None, :]
            tl.store(turned + place, back.to(DOT), mask=is_token[:, None] & is_dim[None, :])
        if DISTANCE:
            length = tl.sqrt(tl.sum(key * key, axis=1))
            cosine_to_mean = tl.sum(key * direction[None, :], axis=1) / tl.maximum(length, _TINY)
            # NaN stays NaN, as in torch.
            weight *= tl.maximum(1 - cosine_to_mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(weights + position, weight, mask=is_token)


def prepare(
    tables: PoolTables,
    layers: range,
    slots: torch.Tensor,
    rule: AttentionRule,
    turned: torch.Tensor,
    key_scales: torch.Tensor,
    weights: torch.Tensor,
) -> Launch:
    """What reads the windows' keys and values for their score.

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
    shifts: dict[str, object] = {"AHEAD": 0, "cosines": None, "sines": None, "partners": None}
    if rule.ahead:
        shift = tables.rope_shift
        assert shift is not None  # score.py has looked
        shifts = {
            "AHEAD": shift.run,
            "cosines": shift.cos,
            "sines": shift.sin,
            "partners": shift.partner,
        }
    dot = stored_type(tables.dot)
    parts = {"turned": turned, "key_scales": key_scales, "weights": weights}
    return _launch(tables, layers, slots, rule, DOT=dot, **parts, **shifts)


def weight_scores(
    tables: PoolTables, layers: range, slots: torch.Tensor, *, rule: WeightRule, out: torch.Tensor
) -> Launch:
    """What computes :func:`kara_sglang.kernels.score.weight_scores` for many windows and layers at
    once, up to the neighbours' blend and the sum over heads, which ``select.py`` makes.

    Parameters
    ----------
    tables, layers, slots
        As :func:`prepare`'s.
    rule : WeightRule
    out : torch.Tensor
        Scores, shape ``(len(layers), num_jobs, num_kv_heads, W)``, float32, contiguous.

    Raises
    ------
    ValueError
        Where shapes do not fit, or a tensor has gaps.
    """
    if out.shape != (len(layers), len(slots), tables.num_kv_heads, slots.shape[1]):
        raise ValueError(f"scores of shape {tuple(out.shape)} for {len(layers)} layers")
    if not slots.is_contiguous() or not out.is_contiguous():
        raise ValueError("slots and scores must be contiguous")
    no_keys = dict.fromkeys(("turned", "key_scales", "cosines", "sines", "partners", "DOT"))
    return _launch(tables, layers, slots, rule, weights=out, AHEAD=0, **no_keys)


def _launch(
    tables: PoolTables, layers: range, slots: torch.Tensor, rule: WeightRule, **arguments: object
) -> Launch:
    num_jobs, width = slots.shape
    block_d = triton.next_power_of_2(tables.head_dim)
    block_k = min(NUMBERS // block_d, triton.next_power_of_2(width))
    parts = min(PARTS, triton.cdiv(width, block_k))
    return Launch(
        prepare_kernel,
        len(layers) * num_jobs * tables.num_kv_heads * parts,
        keys=tables.keys,
        values=tables.values,
        scales=tables.scales,
        slots=slots,
        first_layer=layers.start,
        num_jobs=num_jobs,
        WIDTH=width,
        HEADS=tables.num_kv_heads,
        DIM=tables.head_dim,
        VALUE_DIM=tables.value_dim,
        KEY=stored_type(tables.key_dtype),
        ALIGN=tables.alignment,
        NATIVE=tables.capability >= NATIVE_E4M3,
        VALUE_NORM=rule.value_norm,
        DISTANCE=rule.key_distance,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        BLOCK_V=triton.next_power_of_2(tables.value_dim),
        PARTS=parts,
        num_warps=WARPS,
        enable_fp_fusion=True,
        **arguments,
    )
