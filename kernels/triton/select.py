"""Choosing exactly R of W positions with Token2Chunk, one program per row of scores.

The program also blends the scores with those of their neighbours and, where the heads of a layer share
their tokens, adds up the rows of the heads: it owns them, so the result lies in their place.

Nothing here needs the sorted order, only its cuts: a token is an anchor when fewer than A tokens come
before it, a chunk is accepted when the widths that come before it and its own fit the budget. Each set
is "all that come before some cut", and the cut is found bit by bit with one masked sum per bit: first
the score's bits, then, among equal scores, the position's. That is exact and the same in every run,
takes no scratch memory and no synchronisation, and stays small code where a bitonic sort of 4096 scores
would unroll 78 stages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kara_sglang.kernels.score import LEAST_SCORE, MOST_SCORE, NEIGHBOURS_SHARE
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.triton.launch import Launch

_SHARE: tl.constexpr = tl.constexpr(NEIGHBOURS_SHARE)
_LEAST: tl.constexpr = tl.constexpr(LEAST_SCORE)
_MOST: tl.constexpr = tl.constexpr(MOST_SCORE)
_NONE: tl.constexpr = tl.constexpr(0xFFFFFFFF)  # comes after every score


@triton.jit
def _order(score):
    """uint32 that is smaller for a higher score; equal for equal scores, so for 0.0 and -0.0."""
    bits = score.to(tl.uint32, bitcast=True)
    bits = tl.where(score == 0.0, 0, bits)
    bits = tl.where(score != score, 0x7FFFFFFF, bits)  # any NaN comes first, as torch sorts it
    return tl.where(bits < 0x80000000, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _cut(order, position, weight, budget, SHIFT: tl.constexpr):
    """Where the longest run, best and earliest first, ends that weighs at most ``budget``.

    Returns an order and a position, for :func:`_comes_before`.
    """
    cut = tl.zeros((), dtype=tl.uint32)
    bit = tl.full((), 0x80000000, dtype=tl.uint32)
    for _ in range(32):
        spent = tl.sum(tl.where(order < cut + bit, weight, 0), axis=0)
        cut = tl.where(spent <= budget, cut + bit, cut)
        bit = bit >> 1
    left_over = budget - tl.sum(tl.where(order < cut, weight, 0), axis=0)
    ties = tl.where(order == cut, weight, 0)
    end = tl.zeros((), dtype=tl.int32)
    step = tl.full((), 1 << SHIFT, dtype=tl.int32)
    for _ in range(SHIFT + 1):
        spent = tl.sum(tl.where(position < end + step, ties, 0), axis=0)
        end = tl.where(spent <= left_over, end + step, end)
        step = step >> 1
    return cut, end


@triton.jit
def _comes_before(order, position, cut, end):
    return (order < cut) | ((order == cut) & (position < end))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _blended(scores, position, width, REACH: tl.constexpr):
    """As :func:`kara_sglang.kernels.score.blend_neighbours`, ``REACH`` neighbours on either side.

    Leaves logarithms in place of the scores, so that each is taken once.
    """
    inside = position < width
    score = tl.load(scores + position, mask=inside, other=1.0)
    # NaN stays NaN, as in torch.
    own = tl.log2(tl.clamp(score, _LEAST, _MOST, propagate_nan=tl.PropagateNan.ALL))
    tl.store(scores + position, own, mask=inside)
    tl.debug_barrier()  # other threads have stored theirs
    total = tl.zeros(position.shape, dtype=tl.float32)
    for step in range(-REACH, REACH + 1):
        neighbour = position + step
        is_token = (neighbour >= 0) & (neighbour < width)
        total += tl.load(scores + neighbour, mask=is_token, other=0.0)
    count = tl.minimum(position + REACH, width - 1) - tl.maximum(position - REACH, 0) + 1
    return tl.exp2(own + _SHARE * (total / tl.maximum(count, 1).to(tl.float32) - own))


@triton.jit(do_not_specialize=["width", "num_kept", "extra", "best", "chunk_width"])
def select_kernel(
    out,
    scores,
    width,
    num_kept,
    extra,
    best,
    chunk_width,
    HEADS: tl.constexpr,
    REACH: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """One program per ``HEADS`` rows of ``scores``, whose heads share their tokens.

    ``BLOCK = 2**SHIFT`` is at least ``width``.
    """
    row = tl.program_id(0).to(tl.int64) * HEADS
    scores += row * width
    position = tl.arange(0, BLOCK)
    inside = position < width
    if REACH > 0 or HEADS > 1:
        score = tl.zeros((BLOCK,), dtype=tl.float32)
        for head in range(HEADS):
            if REACH > 0:
                score += _blended(scores + head * width, position, width, REACH)
            else:
                score += tl.load(scores + head * width + position, mask=inside, other=0.0)
        tl.debug_barrier()  # all threads have read their neighbours' logarithms
        tl.store(scores + position, score, mask=inside)
        tl.debug_barrier()  # and may read them again
    else:
        score = tl.load(scores + position, mask=inside, other=0.0)
    order = tl.where(inside, _order(score), _NONE)
    one = tl.full((BLOCK,), 1, dtype=tl.int32)

    if CHUNKS:
        cut, end = _cut(order, position, one, num_kept - extra, SHIFT)
        anchor = inside & _comes_before(order, position, cut, end)
        # The anchor before each position, -1 for none: a running maximum over the left neighbours.
        has_neighbour = inside & (position >= 1)
        neighbour = tl.load(scores + position - 1, mask=has_neighbour, other=0.0)
        is_anchor = has_neighbour & _comes_before(_order(neighbour), position - 1, cut, end)
        left = tl.associative_scan(tl.where(is_anchor, position - 1, -1), 0, _larger)
        left_score = tl.load(scores + left, mask=left >= 0, other=0.0)
        added = position - left - 1
        cut, end = _cut(order, position, one, best, SHIFT)
        possible = (
            anchor
            & (left >= 0)
            & (added >= 1)
            & (added + 2 <= chunk_width)
            & _comes_before(order, position, cut, end)
            & _comes_before(_order(left_score), left, cut, end)
        )
        priority = tl.where(possible, _order(score + left_score), _NONE)
        cut, end = _cut(priority, position, tl.where(possible, added, 0), extra, SHIFT)
        accepted = possible & _comes_before(priority, position, cut, end)
        # A token is inside an accepted chunk when the next anchor to its right ends that chunk.
        named = tl.where(anchor, position * 2 + accepted.to(tl.int32), 2 * BLOCK)
        taken = anchor | ((tl.associative_scan(named, 0, _smaller, reverse=True) & 1) == 1)
        singles = num_kept - tl.sum(taken.to(tl.int32), axis=0)
        order = tl.where(taken, _NONE, order)
        cut, end = _cut(order, position, tl.where(taken, 0, one), singles, SHIFT)
        chosen = taken | (inside & _comes_before(order, position, cut, end))
    else:
        cut, end = _cut(order, position, one, num_kept, SHIFT)
        chosen = inside & _comes_before(order, position, cut, end)

    index = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    for head in range(HEADS):
        tl.store(out + (row + head) * num_kept + index, position, mask=chosen)


def select(
    scores: torch.Tensor,
    kept: int,
    chunks: ChunkRule,
    out: torch.Tensor,
    *,
    neighbours: int = 1,
    shared: bool = False,
) -> Launch:
    """What does as :func:`kara_sglang.kernels.select.select`, into ``out``; before, as
    :func:`kara_sglang.kernels.score.blend_neighbours` and, where heads share their tokens,
    :func:`kara_sglang.kernels.score.share_heads`.

    Parameters
    ----------
    scores : torch.Tensor
        Shape ``(..., num_kv_heads, W)``, float32, contiguous. Overwritten by what decides: blended, and
        the sum over the heads in the place of the first where they share their tokens.
    kept : int
        R, with 1 <= R <= W.
    chunks : ChunkRule
    out : torch.Tensor
        Shape ``(..., num_kv_heads, R)``, int32, contiguous, written whole.
    neighbours : int
        Odd; the token itself is one of them.
    shared : bool
        Whether all KV heads keep the same tokens.

    Raises
    ------
    ValueError
        Where R is impossible, shapes or dtypes do not fit, or a tensor has gaps.
    """
    width = scores.shape[-1]
    if not 1 <= kept <= width:
        raise ValueError(f"cannot keep {kept} of {width} tokens")
    if out.shape != (*scores.shape[:-1], kept):
        raise ValueError(f"positions of shape {tuple(out.shape)} for {kept} of {tuple(scores.shape)}")
    if out.dtype != torch.int32 or scores.dtype != torch.float32:
        raise ValueError(f"scores must be float32 and positions int32, not {scores.dtype}, {out.dtype}")
    if not out.is_contiguous() or not scores.is_contiguous():
        raise ValueError("scores and positions must be contiguous")
    block = triton.next_power_of_2(width)
    heads = scores.shape[-2] if shared else 1
    return Launch(
        select_kernel,
        scores.numel() // (heads * width),
        out=out,
        scores=scores,
        width=width,
        num_kept=kept,
        extra=chunks.extra(kept),
        best=chunks.best(width),
        chunk_width=chunks.width,
        HEADS=heads,
        REACH=neighbours // 2,
        # Not "extra > 0": an R too small for any gap would need another compilation.
        CHUNKS=chunks.budget > 0,
        BLOCK=block,
        SHIFT=block.bit_length() - 1,
        # Up to 16 scores a thread: more threads would wait for each other longer, fewer would spill.
        num_warps=min(max(block // 256, 1), max(block // 512, 4)),
        enable_fp_fusion=True,
    )
