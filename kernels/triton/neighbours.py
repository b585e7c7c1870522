"""Scores blended with those of their neighbours, for all layers of a pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kara_sglang.kernels.score import LEAST_SCORE, MOST_SCORE, NEIGHBOURS_SHARE

_BLOCK = 256
_SHARE: tl.constexpr = tl.constexpr(NEIGHBOURS_SHARE)
_LEAST: tl.constexpr = tl.constexpr(LEAST_SCORE)
_MOST: tl.constexpr = tl.constexpr(MOST_SCORE)


@triton.jit
def _log(scores, position, inside):
    """0 outside; what is no number stays none, as in torch."""
    score = tl.load(scores + position, mask=inside, other=1.0)
    return tl.log2(tl.clamp(score, _LEAST, _MOST, propagate_nan=tl.PropagateNan.ALL))


@triton.jit(do_not_specialize=("width", "reach"))
def neighbours_kernel(out, scores, width, reach, BLOCK: tl.constexpr):
    """One program per (row of scores, block of tokens); neighbours are up to ``reach`` away."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * width
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = position < width
    scores += row

    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(-reach, reach + 1):
        neighbour = position + step
        total += _log(scores, neighbour, (neighbour >= 0) & (neighbour < width))
    count = tl.minimum(position + reach, width - 1) - tl.maximum(position - reach, 0) + 1
    own = _log(scores, position, inside)
    blended = own + _SHARE * (total / tl.maximum(count, 1).to(tl.float32) - own)
    tl.store(out + row + position, tl.exp2(blended), mask=inside)


def blend_neighbours(scores: torch.Tensor, neighbours: int, scratch: torch.Tensor) -> None:
    """As :func:`kara_sglang.kernels.score.blend_neighbours`, in place, for many windows and layers.

    Parameters
    ----------
    scores : torch.Tensor
        Shape ``(..., W)``, float32, contiguous.
    neighbours : int
        Odd.
    scratch : torch.Tensor
        Float32, contiguous, at least as many numbers as ``scores``, which are overwritten.
    """
    width = scores.shape[-1]
    blended = scratch[: scores.numel()]
    neighbours_kernel[(scores.numel() // width * triton.cdiv(width, _BLOCK),)](
        blended, scores, width, neighbours // 2, BLOCK=_BLOCK, num_warps=4
    )
    scores.view(-1).copy_(blended)
