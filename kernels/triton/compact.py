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

from kara_sglang.kernels.triton.launch import Launch
from kara_sglang.kernels.triton.pool import PoolTables

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
    # The table lists all layers once, or all layers' keys and then all layers' values.
    layer = tensor % num_layers

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


def compact(tables: PoolTables, slots: torch.Tensor, kept: torch.Tensor) -> list[Launch]:
    """What moves the kept rows of K and V to their windows' first R slots, in place: one launch, or
    one for K and one for V where their rows differ in size.

    Parameters
    ----------
    tables : PoolTables
    slots : torch.Tensor
        The windows' slots in token order, shape ``(num_jobs, W)``, integer, contiguous, no slot twice.
    kept : torch.Tensor
        Positions to keep, shape ``(num_layers, num_jobs, num_kv_heads, R)``, int32, contiguous,
        strictly ascending along R, in [0, W).

    Raises
    ------
    ValueError
        Where shapes do not fit or a tensor has gaps.
    """
    num_jobs, width = slots.shape
    num_kept = kept.shape[-1]
    if kept.shape != (tables.num_layers, num_jobs, tables.num_kv_heads, num_kept) or num_kept > width:
        raise ValueError(
            f"positions of shape {tuple(kept.shape)} for {tables.num_layers} layers, {num_jobs} "
            f"windows of {width} slots and {tables.num_kv_heads} KV heads"
        )
    if kept.dtype != torch.int32 or not kept.is_contiguous() or not slots.is_contiguous():
        raise ValueError("positions must be int32, positions and slots contiguous")
    launches = []
    for table, row_bytes in tables.moves:
        word = _word(row_bytes, tables.alignment)
        words = row_bytes // (word.primitive_bitwidth // 8)
        block_words = triton.next_power_of_2(words)
        sides = table.numel() // tables.num_layers
        launches.append(
            Launch(
                compact_kernel,
                sides * kept.numel() // num_kept,
                table=table,
                slots=slots,
                kept=kept,
                num_layers=tables.num_layers,
                num_jobs=num_jobs,
                width=width,
                num_kept=num_kept,
                HEADS=tables.num_kv_heads,
                WORDS=words,
                WORD=word,
                ALIGN=tables.alignment,
                # Whatever R is, so that no request's own R needs a compiler.
                BLOCK=max(1, _BLOCK_BYTES // (block_words * word.primitive_bitwidth // 8)),
                BLOCK_WORDS=block_words,
                num_warps=4,
            )
        )
    return launches


def _word(row_bytes: int, alignment: int) -> tl.dtype:
    """The widest integer type that divides a row and its address."""
    for word in (tl.int64, tl.int32, tl.int16):
        size = word.primitive_bitwidth // 8
        if row_bytes % size == 0 and alignment % size == 0:
            return word
    return tl.int8
