"""Scores times the distance of each key from the window's mean key, for all layers of a pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kara_sglang.kernels.triton.fp8 import load_float
from kara_sglang.kernels.triton.pool import PoolTables, layer_buffer, stored_type, task

_BLOCK_K = 32
_TINY: tl.constexpr = tl.constexpr(1e-8)  # torch.cosine_similarity's


@triton.jit
def _keys(
    buffer,
    slots,
    position,
    inside,
    head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The keys of one head at some positions of a window, float32, 0 outside."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    slot = tl.load(slots + position, mask=inside, other=0).to(tl.int64)
    place = (slot * HEADS + head)[:, None] * DIM + dim
    return load_float(buffer + place, inside[:, None] & (dim < DIM), KEY).to(tl.float32)


@triton.jit(do_not_specialize=("first_layer", "num_jobs", "width"))
def distance_kernel(
    scores,
    keys,
    slots,
    first_layer,
    num_jobs,
    width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    KEY: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (layer, window, head) walks the window twice: the mean, then the distances."""
    index, layer, job, head = task(1, num_jobs, first_layer, HEADS)
    buffer = layer_buffer(keys, layer, KEY, ALIGN)
    slots += job * width

    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, width, BLOCK_K):
        position = first + tl.arange(0, BLOCK_K)
        inside = position < width
        key = _keys(buffer, slots, position, inside, head, HEADS, DIM, KEY, BLOCK_D)
        total += tl.sum(key, axis=0)
    length = tl.sqrt(tl.sum(total * total, axis=0))
    # The direction of the sum is that of the mean; the bound on its length is the mean's.
    direction = total / tl.maximum(length, _TINY * width)

    for first in range(0, width, BLOCK_K):
        position = first + tl.arange(0, BLOCK_K)
        inside = position < width
        key = _keys(buffer, slots, position, inside, head, HEADS, DIM, KEY, BLOCK_D)
        along = tl.sum(key * direction[None, :], axis=1)
        cosine = along / tl.maximum(tl.sqrt(tl.sum(key * key, axis=1)), _TINY)
        score = scores + index.to(tl.int64) * width + position
        weighed = tl.load(score, mask=inside, other=0.0) * tl.maximum(1 - cosine, 0.0)
        tl.store(score, weighed, mask=inside)


def weigh_by_distance(
    tables: PoolTables, layers: range, slots: torch.Tensor, scores: torch.Tensor
) -> None:
    """Scores times :func:`kara_sglang.kernels.score.key_distances`, for many windows and layers.

    Parameters
    ----------
    tables : PoolTables
    layers : range
        Consecutive.
    slots : torch.Tensor
        The windows' slots in token order, shape ``(num_jobs, W)``, integer, contiguous.
    scores : torch.Tensor
        Multiplied in place, shape ``(len(layers), num_jobs, num_kv_heads, W)``, float32, contiguous.
    """
    num_jobs, width = slots.shape
    distance_kernel[(len(layers) * num_jobs * tables.num_kv_heads,)](
        scores,
        tables.keys,
        slots,
        layers.start,
        num_jobs,
        width,
        HEADS=tables.num_kv_heads,
        DIM=tables.head_dim,
        KEY=stored_type(tables.key_dtype),
        ALIGN=tables.alignment,
        BLOCK_K=_BLOCK_K,
        BLOCK_D=triton.next_power_of_2(tables.head_dim),
        num_warps=4,
    )
