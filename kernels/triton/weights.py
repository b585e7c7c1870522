"""Scores without queries, for all layers of a pass: what K and V say of each token by themselves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kara_sglang.kernels.score import WeightRule, share_heads
from kara_sglang.kernels.triton.fp8 import load_float
from kara_sglang.kernels.triton.neighbours import blend_neighbours
from kara_sglang.kernels.triton.pool import PoolTables, layer_buffer, stored_type, task

_TILE = 4096  # numbers that a program loads at once; twice as many spill registers for some types
_TINY: tl.constexpr = tl.constexpr(1e-8)  # torch.cosine_similarity's


@triton.jit
def _rows(buffer, entry, inside, DIM: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr):
    """The heads ``entry`` of a layer's K or V, float32, 0 outside."""
    dim = tl.arange(0, BLOCK)[None, :]
    mask = inside[:, None] & (dim < DIM)
    return load_float(buffer + entry[:, None] * DIM + dim, mask, STORED).to(tl.float32)


@triton.jit(do_not_specialize=("first_layer", "num_jobs", "width"))
def weights_kernel(
    scores,
    keys,
    values,
    slots,
    first_layer,
    num_jobs,
    width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY: tl.constexpr,
    ALIGN: tl.constexpr,
    VALUE_NORM: tl.constexpr,
    KEY_DISTANCE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """One program per (layer, window, head) walks the window twice: the mean key, then the scores."""
    index, layer, job, head = task(1, num_jobs, first_layer, HEADS)
    key_buffer = layer_buffer(keys, layer, KEY, ALIGN)
    value_buffer = layer_buffer(values, layer, KEY, ALIGN)
    slots += job * width
    scores += index.to(tl.int64) * width

    direction = tl.zeros((BLOCK_D,), dtype=tl.float32)
    if KEY_DISTANCE:
        for first in range(0, width, BLOCK_K):
            position = first + tl.arange(0, BLOCK_K)
            inside = position < width
            entry = tl.load(slots + position, mask=inside, other=0).to(tl.int64) * HEADS + head
            direction += tl.sum(_rows(key_buffer, entry, inside, DIM, KEY, BLOCK_D), axis=0)
        length = tl.sqrt(tl.sum(direction * direction, axis=0))
        # The direction of the sum is that of the mean; the bound on its length is the mean's.
        direction /= tl.maximum(length, _TINY * width)

    for first in range(0, width, BLOCK_K):
        position = first + tl.arange(0, BLOCK_K)
        inside = position < width
        entry = tl.load(slots + position, mask=inside, other=0).to(tl.int64) * HEADS + head
        score = tl.full((BLOCK_K,), 1.0, dtype=tl.float32)
        if VALUE_NORM:
            value = _rows(value_buffer, entry, inside, VALUE_DIM, KEY, BLOCK_VALUE)
            norm = tl.sqrt(tl.sum(value * value, axis=1))
            for _ in tl.static_range(VALUE_NORM):
                score *= norm
        if KEY_DISTANCE:
            key = _rows(key_buffer, entry, inside, DIM, KEY, BLOCK_D)
            along = tl.sum(key * direction[None, :], axis=1)
            cosine = along / tl.maximum(tl.sqrt(tl.sum(key * key, axis=1)), _TINY)
            # What is no number stays none, as in torch.
            score *= tl.maximum(1 - cosine, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(scores + position, score, mask=inside)


def weight_scores(
    tables: PoolTables,
    layers: range,
    slots: torch.Tensor,
    *,
    rule: WeightRule,
    scratch: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """As :func:`kara_sglang.kernels.score.weight_scores`, for many windows and layers at once.

    Parameters
    ----------
    tables : PoolTables
    layers : range
        Layers to score, consecutive.
    slots : torch.Tensor
        The windows' slots in token order, shape ``(num_jobs, W)``, integer, contiguous.
    rule : WeightRule
    scratch : torch.Tensor
        Float32, contiguous, at least as many numbers as ``out``, which are overwritten.
    out : torch.Tensor
        Scores, shape ``(len(layers), num_jobs, num_kv_heads, W)``, float32, contiguous.

    Raises
    ------
    ValueError
        Where shapes do not fit, or a tensor has gaps.
    """
    num_jobs, width = slots.shape
    heads = len(layers), num_jobs, tables.num_kv_heads
    if out.shape != (*heads, width):
        raise ValueError(f"scores of shape {tuple(out.shape)} for {len(layers)} layers")
    if scratch.numel() < out.numel() or scratch.dtype != torch.float32:
        raise ValueError(
            f"scratch of {scratch.numel()} {scratch.dtype} where {out.numel()} of float32 are needed"
        )
    for tensor in (slots, scratch, out):
        if not tensor.is_contiguous():
            raise ValueError("slots, scratch and scores must be contiguous")
    block_d = triton.next_power_of_2(tables.head_dim)
    block_value = triton.next_power_of_2(tables.value_dim)
    weights_kernel[(out.numel() // width,)](
        out,
        tables.keys,
        tables.values,
        slots,
        layers.start,
        num_jobs,
        width,
        HEADS=tables.num_kv_heads,
        DIM=tables.head_dim,
        VALUE_DIM=tables.value_dim,
        KEY=stored_type(tables.key_dtype),
        ALIGN=tables.alignment,
        VALUE_NORM=rule.value_norm,
        KEY_DISTANCE=rule.key_distance,
        BLOCK_K=_TILE // max(block_d, block_value),
        BLOCK_D=block_d,
        BLOCK_VALUE=block_value,
        num_warps=8,
    )
    if rule.neighbours > 1:
        blend_neighbours(out, rule.neighbours, scratch)
    if rule.per_layer:
        sums = scratch[: len(layers) * num_jobs * width].view(len(layers), num_jobs, 1, width)
        share_heads(out, sums)
