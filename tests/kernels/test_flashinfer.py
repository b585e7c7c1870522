"""After a pass the page table means to FlashInfer what it meant before.

The page table is built as SGLang's flashinfer backend builds it (``call_begin_forward`` of
``FlashInferIndicesUpdaterDecode``: one page per slot, whatever the server's page size), and as a
backend with real pages does. Attention over it, in plain torch by FlashInfer's definition, must equal
attention over the prompt, the retained tokens of each head, and the tokens behind the window.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from ring_pages import pages_of
from sglang.kernels.ops.attention.kv_indices import create_flashinfer_kv_indices_triton
from triton.runtime.interpreter import InterpretedFunction

from kara_sglang.kernels.backend import Kernels, LayerPool, TorchKernels, WindowJob
from kara_sglang.kernels.record import most_blocks
from kara_sglang.kernels.score import AttentionRule
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.selectors import REGISTRY

pytestmark = pytest.mark.usefixtures("interpreted")

HEADS, GROUP, DIM, DELAY = 2, 3, 16, 5
SLOTS = 2048
KARA = REGISTRY["kara"](
    chunks=ChunkRule(budget=0.2, quantile=0.5), rule=AttentionRule(squared=True, value_norm=1)
)


class PageTable(NamedTuple):
    """FlashInfer's: request i owns the pages ``indices[indptr[i] : indptr[i + 1]]``."""

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    page_size: int


def as_sglang_does(req_to_token: torch.Tensor, seq_lens: torch.Tensor) -> PageTable:
    """Pages of one slot; ``kv_last_page_len`` is a buffer of ones."""
    indptr = torch.zeros(len(seq_lens) + 1, dtype=torch.int32)
    indptr[1:] = torch.cumsum(seq_lens, dim=0)
    indices = torch.cat([row[:length] for row, length in zip(req_to_token, seq_lens, strict=True)])
    return PageTable(indptr, indices.int(), torch.ones(len(seq_lens), dtype=torch.int32), 1)


def by_sglangs_kernel(req_to_token: torch.Tensor, seq_lens: torch.Tensor) -> PageTable:
    """SGLang's own kernel, as ``call_begin_forward`` launches it; the table's rows in another order."""
    rows = torch.tensor([2, 0, 1])
    shuffled = torch.empty_like(req_to_token)
    shuffled[rows] = req_to_token
    indptr = torch.zeros(len(seq_lens) + 1, dtype=torch.int32)
    indptr[1:] = torch.cumsum(seq_lens, dim=0)
    indices = torch.full((int(indptr[-1]),), -7, dtype=torch.int32)
    InterpretedFunction(create_flashinfer_kv_indices_triton.fn)[(len(seq_lens),)](
        shuffled, rows, seq_lens, indptr, None, indices, shuffled.stride(0)
    )
    return PageTable(indptr, indices, torch.ones(len(seq_lens), dtype=torch.int32), 1)


def with_real_pages(req_to_token: torch.Tensor, seq_lens: torch.Tensor, page: int) -> PageTable:
    """Every ``page``-th column names a page, as fa3 reads a row, too."""
    counts = (seq_lens + page - 1) // page
    indptr = torch.zeros(len(seq_lens) + 1, dtype=torch.int32)
    indptr[1:] = torch.cumsum(counts, dim=0)
    rows = zip(req_to_token, seq_lens, strict=True)
    indices = torch.cat([row[:length:page] // page for row, length in rows])
    return PageTable(indptr, indices.int(), ((seq_lens - 1) % page + 1).int(), page)


def paged_decode(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: PageTable
) -> torch.Tensor:
    """``BatchDecodeWithPagedKVCacheWrapper.run`` for layout NHD, written out, float64.

    queries ``(batch, num_qo_heads, head_dim)``; keys, values ``(num_slots, num_kv_heads, head_dim)``.
    """
    paged_keys = keys.view(-1, table.page_size, HEADS, DIM)
    paged_values = values.view(-1, table.page_size, HEADS, DIM)
    out = []
    for i, query in enumerate(queries):
        pages = table.indices[table.indptr[i] : table.indptr[i + 1]].long()
        length = (len(pages) - 1) * table.page_size + int(table.last_page_len[i])
        out.append(
            attention(
                query,
                paged_keys[pages].flatten(0, 1)[:length].transpose(0, 1),
                paged_values[pages].flatten(0, 1)[:length].transpose(0, 1),
            )
        )
    return torch.stack(out)


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One token: query ``(num_qo_heads, head_dim)``; keys, values ``(num_kv_heads, n, head_dim)``."""
    grouped = query.double().view(HEADS, GROUP, DIM)
    logits = torch.einsum("hgd,hnd->hgn", grouped, keys.double()) * DIM**-0.5
    return torch.einsum("hgn,hnd->hgd", logits.softmax(-1), values.double()).flatten(0, 1)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("page", [1, 16, 64])
def test_attention_over_the_spliced_row(make, page: int, name: str):
    kernels: Kernels = TorchKernels() if name == "torch" else make.kernels()
    width, kept = (128, 64) if page == 64 else (48, 16)
    base = torch.tensor([2, 0, 1]) * max(page, 16)  # prompts, in whole pages
    tail = torch.tensor([DELAY, DELAY + page, 2 * page + 3])
    seq_lens = base + width + tail
    pool = make.pool(
        page, layers=1, heads=HEADS, dim=DIM, slots=SLOTS, voices=3 * GROUP, tokens=width + DELAY
    )
    num_pages = 3 * GROUP * most_blocks(width + DELAY)
    before = make.copy(pool)
    longest = -(-int(seq_lens.max()) // page) * page
    req_to_token = make.windows(3, longest, slots=SLOTS, seed=page, page=page)
    original = req_to_token.clone()

    jobs = [
        WindowJob(
            slots=req_to_token[i, base[i] : base[i] + width].clone(),
            kept=kept,
            selector=KARA,
            seed=0,
            query_start=int(base[i]),
            query_count=width + DELAY,
            pages=pages_of(
                num_pages,
                range(GROUP * i, GROUP * (i + 1)),
                int(base[i]),
                width + DELAY,
            ),
        )
        for i in range(3)
    ]
    positions = kernels.compress(pool, jobs, positions=True)
    assert positions is not None
    freed = torch.cat([job.slots[kept:] for job in jobs]).long()
    pool.keys[0][freed] = float("nan")  # somebody else's by now
    pool.values[0][freed] = float("nan")
    for i in range(3):
        rest = original[i, base[i] + width : seq_lens[i]]
        req_to_token[i, base[i] + kept : base[i] + kept + len(rest)] = rest
        req_to_token[i, base[i] + kept + len(rest) :] = -1
    new_lens = seq_lens - (width - kept)

    queries = torch.randn(3, HEADS * GROUP, DIM)
    expected = torch.stack(
        [
            attention(queries[i], *retained(before, original[i], base[i], width, seq_lens[i], p[0]))
            for i, p in enumerate(positions)
        ]
    )
    plain = as_sglang_does(req_to_token, new_lens)
    theirs = by_sglangs_kernel(req_to_token, new_lens)
    assert torch.equal(theirs.indices, plain.indices)
    for table in (theirs, plain, with_real_pages(req_to_token, new_lens, page)):
        got = paged_decode(queries, pool.keys[0], pool.values[0], table)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def retained(
    pool: LayerPool, row: torch.Tensor, base: int, width: int, length: int, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V that each head must still see, ``(num_kv_heads, n, head_dim)``, from the old pool."""
    everything = torch.arange(length)
    outside = (everything < base) | (everything >= base + width)
    tokens = [torch.cat([everything[outside], base + chosen]).sort().values for chosen in positions]
    slots = [row[chosen].long() for chosen in tokens]
    keys, values = (
        torch.stack([buffer[slots[head], head] for head in range(HEADS)])
        for buffer in (pool.keys[0], pool.values[0])
    )
    return keys, values
