"""Moving the kept tokens of a window to its first slots, in place and without scratch memory.

Why in place is safe. Of one (window, layer, K or V, KV head) a single program moves everything, and
no other program touches those bytes: slots differ from window to window, and inside a slot each head
has its own. The program walks the targets j = 0 .. R-1 in blocks of B. ``kept`` strictly ascends from
at least 0, so ``kept[j] >= j``, and that gives, for block b with the targets [b*B, (b+1)*B):

* *stores of a block and loads of later ones are disjoint*: block b writes positions below (b+1)*B, and
  every later block reads positions ``kept[j] >= j >= (b+1)*B``. A load may even be made early;
* *loads of a block and stores of it or of later ones overlap* (target j+1 may be the source of target
  j), so they are ordered: all threads load their part of block b, meet at the barrier, and only then
  store. PTX's ``bar.sync`` orders all memory accesses of the program's threads before it with those
  after it. Values wait in registers, which are the scratch.

``tests/kernels/test_compiled.py`` checks in the generated code that the barrier is where it must be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_BYTES = 16384  # in flight per program: 128 bytes for each of 128 threads


@triton.jit(do_not_specialize=["num_layers", "num_jobs", "width", "num_kept"])
def compact_kernel(
    table,
    slots,
    kept,
    num_layers,
    num_jobs,
    width,
    num_kept,
    HEADS: tl.constexpr,
    WORDS: tl.constexpr,
    WORD: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """One program per (tensor, window, head); see the module's docstring for the order of accesses."""
    program = tl.program_id(0)
    head = program % HEADS
    job = program // HEADS % num_jobs
    tensor = program // (HEADS * num_jobs)
    layer = tensor % num_layers  # the table lists the keys of all layers, then the values

    base = tl.multiple_of(tl.load(table + tensor).to(tl.pointer_type(WORD)), ALIGN) + head * WORDS
    slots += job * width
    kept += ((layer * num_jobs + job) * HEADS + head).to(tl.int64) * num_kept
    word = tl.arange(0, BLOCK_WORDS)[None, :]
    for first in range(0, num_kept, BLOCK):
        target = first + tl.arange(0, BLOCK)
        source = tl.load(kept + target, mask=target < num_kept, other=0)
        moves = (target < num_kept) & (source != target)
        to = tl.load(slots + target, mask=moves, other=0).to(tl.int64)
        origin = tl.load(slots + source, mask=moves, other=0).to(tl.int64)
        mask = moves[:, None] & (word < WORDS)
        rows = tl.load(base + origin[:, None] * (HEADS * WORDS) + word, mask=mask)
        tl.debug_barrier()
        tl.store(base + to[:, None] * (HEADS * WORDS) + word, rows, mask=mask)


def compact(
    table: torch.Tensor,
    slots: torch.Tensor,
    kept: torch.Tensor,
    *,
    num_kv_heads: int,
    row_bytes: int,
    alignment: int,
) -> None:
    """Move the kept rows of all layers and windows to their windows' first R slots, in place.

    Parameters
    ----------
    table : torch.Tensor
        Addresses of buffers of shape ``(num_slots, num_kv_heads, head_dim)``, contiguous:
        shape ``(T,)``, int64. T is a multiple of the number of layers; entry t belongs to layer
        ``t % num_layers``.
    slots : torch.Tensor
        The windows' slots in token order, shape ``(num_jobs, W)``, integer, no slot twice.
    kept : torch.Tensor
        Positions to keep, shape ``(num_layers, num_jobs, num_kv_heads, R)``, int64, contiguous,
        strictly ascending along R, in [0, W).
    num_kv_heads : int
    row_bytes : int
        Bytes of one head of one slot.
    alignment : int
        Bytes (a power of two, at most 16) that divide every address in ``table``.
    """
    num_layers, num_jobs, _, num_kept = kept.shape
    word = _word(row_bytes, alignment)
    words = row_bytes // (word.primitive_bitwidth // 8)
    block_words = triton.next_power_of_2(words)
    block = max(1, _BLOCK_BYTES // (block_words * word.primitive_bitwidth // 8))
    compact_kernel[(table.numel() * num_jobs * num_kv_heads,)](
        table,
        slots,
        kept,
        num_layers,
        num_jobs,
        slots.shape[1],
        num_kept,
        HEADS=num_kv_heads,
        WORDS=words,
        WORD=word,
        ALIGN=alignment,
        BLOCK=min(block, triton.next_power_of_2(num_kept)),
        BLOCK_WORDS=block_words,
        num_warps=4,
    )


def _word(row_bytes: int, alignment: int) -> tl.dtype:
    """The widest integer type that divides a row and its address."""
    for word in (tl.int64, tl.int32, tl.int16):
        size = word.primitive_bitwidth // 8
        if row_bytes % size == 0 and alignment % size == 0:
            return word
    return tl.int8
