"""Storing one decode step's queries in the ring: one launch per layer, fit for a CUDA graph."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kara_sglang.kernels.record import EXPONENTS, Ring
from kara_sglang.kernels.triton.fp8 import exponent_of, power_of_two, size_of, to_e4m3


# row_stride is the model's; that it is a multiple of 16 makes for loads of 16 bytes.
@triton.jit(do_not_specialize=["trash"])
def record_kernel(
    ring,
    exponents,
    entries,
    queries,
    trash,
    row_stride,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TO_E4M3: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program per (row, head of the group): it moves that head of every KV head.

    Where only the first head's place is kept, it gets the mean of the group.
    """
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    if entry == trash:
        return
    row = (program // GROUP).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (head < HEADS) & (dim < DIM)
    query = queries + row * row_stride + head * (GROUP * DIM) + dim
    value = tl.load(query + program % GROUP * DIM, mask=mask, other=0.0).to(tl.float32)
    if GROUP > 1:  # noqa: SIM102 - this one is decided when it is compiled
        if tl.load(entries + row * GROUP + 1) == trash:
            for other in range(1, GROUP):
                value += tl.load(query + other * DIM, mask=mask, other=0.0).to(tl.float32)
            value *= 1 / GROUP
    if TO_E4M3:
        exponent = exponent_of(tl.max(size_of(value), axis=1), LOWEST, HIGHEST)
        value = to_e4m3(value * power_of_two(-exponent)[:, None])
        kv_head = tl.arange(0, BLOCK_HEADS)
        tl.store(exponents + entry * HEADS + kv_head, exponent.to(tl.int8), mask=kv_head < HEADS)
    tl.store(ring + entry * (HEADS * DIM) + head * DIM + dim, value, mask=mask)


def record(ring: Ring, entries: torch.Tensor, queries: torch.Tensor) -> None:
    """As :func:`kara_sglang.kernels.record.record`, but nothing is written for idle rows.

    Parameters
    ----------
    ring : Ring
        Contiguous, written in place. The last entry is the trash: a row that points there is skipped.
    entries : torch.Tensor
        Shape ``(batch, group)``, int64, contiguous.
    queries : torch.Tensor
        Shape ``(batch, num_kv_heads * group * head_dim)`` or with the last dimension already split;
        rows may be apart, as in a fused QKV output.

    Raises
    ------
    ValueError
        Where a tensor does not lie in memory as said above.
    """
    batch, group = entries.shape
    num_entries, num_kv_heads, head_dim = ring.queries.shape
    if batch == 0:
        return
    if not ring.queries.is_contiguous() or not entries.is_contiguous():
        raise ValueError("ring and entries must be contiguous")
    queries = queries.view(batch, -1)
    if queries.shape[1] != num_kv_heads * group * head_dim or queries.stride(1) != 1:
        raise ValueError(
            f"queries of a row must be {num_kv_heads * group * head_dim} numbers without gaps, got "
            f"shape {tuple(queries.shape)} with strides {queries.stride()}"
        )
    is_fp8 = ring.exponents is not None
    record_kernel[(batch * group,)](
        ring.queries.view(torch.uint8) if is_fp8 else ring.queries,
        ring.exponents,
        entries,
        queries,
        num_entries - 1,
        queries.stride(0),
        GROUP=group,
        HEADS=num_kv_heads,
        DIM=head_dim,
        TO_E4M3=is_fp8,
        LOWEST=EXPONENTS[0],
        HIGHEST=EXPONENTS[1],
        BLOCK_HEADS=triton.next_power_of_2(num_kv_heads),
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
