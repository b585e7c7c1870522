"""FlashInfer itself over the page table that a pass leaves, on a GPU.

    python -m kara_sglang.benchmarks.gpu.paged_decode --output paged_decode.json

Needs torch, triton, this package and ``flashinfer``, no SGLang. For page sizes 1, 16 and 64 a pass
compresses one window of each of three requests, their rows are spliced as the server does, and
FlashInfer's paged decode must give the attention over the prompt, the retained tokens of each head, and
the tokens behind the window. ``tests/kernels/test_flashinfer.py`` checks the same on a CPU, with
FlashInfer's semantics written out.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.gpu.timing import versions
from kara_sglang.benchmarks.machine import command, kind
from kara_sglang.benchmarks.output import write_json
from kara_sglang.kernels.backend import Kernels, LayerPool, WindowJob, WindowShape
from kara_sglang.kernels.record import FP8, PAGE, Ring, blocks_of, most_blocks, to_fp8
from kara_sglang.kernels.score import AttentionRule
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.selectors.kara import KaraSelector
from kara_sglang.kernels.triton import TritonKernels

MODULE = "kara_sglang.benchmarks.gpu.paged_decode"
PAGES = (1, 16, 64)
MOST = 0.02  # of an output of size 1: what bfloat16 rounds
DEVICE = torch.device("cuda")
HEADS, GROUP, DIM, DELAY, SLOTS = 4, 4, 128, 16, 4096
SELECTOR = KaraSelector(chunks=ChunkRule(budget=0.1), rule=AttentionRule(squared=True, value_norm=1))


def check(flashinfer: Any, kernels: Kernels, page: int, width: int, kept: int) -> float:
    """One pass over three requests; the largest difference of FlashInfer's output, which is of size 1.

    ``flashinfer`` is the module.
    """
    blocks = most_blocks(width + DELAY)
    keys, values = (
        torch.randn(SLOTS, HEADS, DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
    )
    ring = Ring(*to_fp8(torch.randn(3 * GROUP * blocks * PAGE + 1, HEADS, DIM, device=DEVICE)))
    assert ring.queries.dtype == FP8
    base = [2 * max(page, 16), 0, max(page, 16)]
    tails = [DELAY, DELAY + page, 2 * page + DELAY + 3]
    lengths = [b + width + t for b, t in zip(base, tails, strict=True)]
    pages = torch.randperm(SLOTS // page, device=DEVICE)
    longest = -(-max(lengths) // page)
    rows = pages[: 3 * longest].view(3, longest, 1) * page + torch.arange(page, device=DEVICE)
    rows = rows.view(3, -1).int()

    before = keys.float(), values.float()
    pool = LayerPool([keys], [values], [ring], [DIM**-0.5])
    jobs = [
        WindowJob(
            slots=rows[i, base[i] : base[i] + width].clone(),
            kept=kept,
            selector=SELECTOR,
            seed=0,
            query_start=base[i],
            query_count=width + DELAY,
            pages=tuple(
                tuple(blocks * voice + block for block in range(len(blocks_of(base[i], width + DELAY))))
                for voice in range(GROUP * i, GROUP * (i + 1))
            ),
        )
        for i in range(3)
    ]
    positions = kernels.compress(pool, jobs, positions=True)
    assert positions is not None

    queries = torch.randn(3, HEADS * GROUP, DIM, device=DEVICE, dtype=torch.bfloat16)
    expected, indices, indptr, last_page_len = [], [], [0], []
    for i, row in enumerate(rows):
        own = row[: lengths[i]].long()
        head_tokens = [
            torch.cat([own[: base[i]], jobs[i].slots[chosen].long(), own[base[i] + width :]])
            for chosen in positions[i][0]
        ]
        k, v = (torch.stack([b[t, h] for h, t in enumerate(head_tokens)]) for b in before)
        grouped = queries[i].float().view(HEADS, GROUP, DIM)
        weights = (grouped @ k.transpose(1, 2) * DIM**-0.5).softmax(-1)
        expected.append((weights @ v).flatten(0, 1))
        spliced = torch.cat([own[: base[i] + kept], own[base[i] + width :]])
        indices.append(spliced[::page] // page)
        indptr.append(indptr[-1] + len(indices[-1]))
        last_page_len.append((len(spliced) - 1) % page + 1)
        freed = jobs[i].slots[kept:].long()
        keys[freed], values[freed] = float("nan"), float("nan")  # somebody else's by now

    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        torch.tensor(indptr, dtype=torch.int32, device=DEVICE),
        torch.cat(indices).int(),
        torch.tensor(last_page_len, dtype=torch.int32, device=DEVICE),
        HEADS * GROUP,
        HEADS,
        DIM,
        page,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    paged = tuple(buffer.view(-1, page, HEADS, DIM) for buffer in (keys, values))
    got = wrapper.run(queries, paged)
    return (got.float() - torch.stack(expected)).abs().max().item()


def main() -> None:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("paged_decode.py: no CUDA GPU here, nothing was checked")
    try:
        flashinfer = importlib.import_module("flashinfer")
    except ImportError as error:
        raise SystemExit(f"paged_decode.py: flashinfer cannot be imported ({error})") from error
    kernels = TritonKernels()
    kernels.reserve(DEVICE, WindowShape(1, HEADS, DIM, torch.bfloat16, 512, 512, GROUP, 512 + DELAY))
    report: dict[str, Any] = {
        "command": command(MODULE, sys.argv[1:]),
        "gpu": kind(),
        "versions": versions() | {"flashinfer": flashinfer.__version__},
        "allowed": MOST,
        "largest_difference": {},
    }
    for page in PAGES:
        largest = check(flashinfer, kernels, page, width=512, kept=256)
        print(f"flashinfer {flashinfer.__version__}, pages of {page}: largest difference {largest:.5f}")
        report["largest_difference"][f"pages of {page}"] = largest
        write_json(options.output, report, indent=2)
        if not largest < MOST:  # NaN fails, too
            raise SystemExit("paged_decode.py: FlashInfer does not see the retained tokens")


if __name__ == "__main__":
    main()
