"""Where SGLang's flashinfer and triton backends find the K and V of a draft model's steps.

Before a draft model takes its steps they list, for each step and branch, the slots to read: the text's
and the branch's own (``generate_draft_decode_kv_indices``). Where a list begins they take from the
positions of the branches, which behind a pass are larger than KV lengths. SGLang's own functions and
kernels run here, in Triton's interpreter, between our hook and the backends of the single steps.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.kernels.ops.speculative import cache_locs
from sglang.srt.environ import envs
from sglang.srt.layers.attention import flashinfer_backend, triton_backend
from sglang.srt.mem_cache.kv_index_translator import KVIndexTable
from triton.runtime.interpreter import InterpretedFunction

from kara_sglang.scheduler import runtime
from kara_sglang.scheduler.lengths import Lengths
from kara_sglang.scheduler.pace import Pace

pytestmark = pytest.mark.usefixtures("interpreted")

STEPS, ROWS, COLUMNS = 3, 6, 640
HELD = {4: 140, 2: 37, 5: 600, 1: 20}  # rows and their KV lengths, in the order of the batch
REMOVED = {4: 64, 5: 480}
BACKENDS = {
    "flashinfer": flashinfer_backend.FlashInferMultiStepDraftBackend,
    "triton": triton_backend.TritonMultiStepDraftBackend,
}
WINDOW = 32  # of a draft model with sliding-window layers


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Lengths:
    """A server whose rows lack tokens, and whose draft backends launch interpreted kernels."""
    load = InterpretedFunction(cache_locs._load_token_ids.fn)
    monkeypatch.setattr(cache_locs, "_load_token_ids", load)
    for name in ("generate_draft_decode_kv_indices", "generate_draft_decode_window_kv_indices"):
        kernel = InterpretedFunction(getattr(cache_locs, name).fn)
        monkeypatch.setattr(triton_backend, name, kernel)
        if hasattr(flashinfer_backend, name):
            monkeypatch.setattr(flashinfer_backend, name, kernel)
    pool = SimpleNamespace(req_to_token=torch.zeros(ROWS, COLUMNS, dtype=torch.int32))
    lengths = Lengths(SimpleNamespace(req_to_token_pool=pool, enable_overlap=False), Pace(4))
    lengths.lacks(REMOVED.items())
    coordinator = SimpleNamespace(compaction=SimpleNamespace(lengths=lengths))
    monkeypatch.setattr(runtime, "runtime", runtime.Runtime(coordinator=coordinator))
    return lengths


class Draft:
    """A draft model's steps on a backend, over a page table of slots in random order."""

    def __init__(self, backend: str, topk: int, page: int, window: int = 0) -> None:
        self.topk, self.kind = topk, BACKENDS[backend]
        order = torch.randperm(ROWS * COLUMNS // page, generator=torch.Generator().manual_seed(7))
        self.table = (order[:, None] * page + torch.arange(page)).view(ROWS, COLUMNS).int()
        most = 8 * topk
        self.backend = self.kind.__new__(self.kind)
        vars(self.backend).update(
            topk=topk,
            speculative_num_steps=STEPS,
            page_size=page,
            pool_len=COLUMNS,
            max_context_len=COLUMNS,
            draft_window_size=0,
            draft_sink_size=0,
            kv_indptr=torch.full((STEPS, most + 1), 0, dtype=torch.int32),
            kv_index_translator=SimpleNamespace(read_source=self.source, window_kv_kind=None),
            generate_draft_decode_kv_indices=triton_backend.generate_draft_decode_kv_indices,
            sliding_window_size=window,
            window_rail=window > 0,
            window_kv_indptr=torch.zeros((STEPS, most + 1), dtype=torch.int32),
            cuda_graph_window_kv_indices=torch.full((STEPS, most * max(1, window)), -7),
        )
        self.buffer = torch.full((STEPS, topk * 3000), -7)

    def source(self, _plan: Any, *, req_pool_indices: torch.Tensor, **_kw: Any) -> KVIndexTable:
        return KVIndexTable(
            ids=self.table,
            row_ids=req_pool_indices,
            row_stride=self.table.stride(0),
            entry_page_size=1,
            is_translated=True,
            v2p=None,
        )

    def batch(self, padding: int, on_host: bool) -> SimpleNamespace:
        """Requests at a draft's first step, with what a CUDA graph adds to fill a batch up
        (``EAGLEDraftCudaGraphRunner.execute``)."""
        lengths = torch.tensor([*HELD.values()] + [1] * padding)
        return SimpleNamespace(
            batch_size=len(lengths),
            req_pool_indices=torch.tensor([*HELD] + [0] * padding),
            seq_lens=lengths,
            seq_lens_cpu=lengths if on_host else None,
            seq_lens_sum=int(lengths.sum()),
            positions=torch.tensor([*HELD.values()] + [0] * padding).repeat_interleave(self.topk),
            mrope_positions=None,
            kv_loc_plan=None,
            spec_info=SimpleNamespace(is_draft_input=lambda: True),
        )

    def read(self, step: SimpleNamespace, template: Callable[..., None]) -> list[list[list[int]]]:
        """The slots that each step reads, by request and branch."""
        lists = []

        def one_step(_index: int, batch: SimpleNamespace) -> None:
            borders, slots = batch.spec_info.kv_indptr.tolist(), batch.spec_info.kv_indices
            every = [slots[a:b].tolist() for a, b in pairwise(borders)]
            lists.append(every[: len(HELD) * self.topk])

        template(self.backend, step, self.buffer, one_step)
        return lists

    def expected(self) -> list[list[list[int]]]:
        """Of a chain, or of branches with a slot for each of their steps."""
        return [
            [
                [*row[:held], *row[held + branch * STEPS :][: step + 1]]
                for row, held in ((self.table[row].tolist(), held) for row, held in HELD.items())
                for branch in range(self.topk)
            ]
            for step in range(STEPS - 1)
        ]

    def hooked(self, backend: Any, step: SimpleNamespace, *args: Any) -> None:
        runtime.around_draft_indices(self.kind.common_template, backend, step, *args)


@pytest.mark.parametrize(("padding", "on_host"), [(0, False), (2, True)], ids=["eager", "graph"])
@pytest.mark.parametrize(("topk", "page"), [(1, 16), (3, 1)], ids=["chain", "tree"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draft_reads_its_own_row_behind_a_pass(
    served: Lengths, backend: str, topk: int, page: int, padding: int, on_host: bool
) -> None:
    """Every slot of every step, also in a batch that a graph pads and with lengths that the host knows;
    the model gets true positions."""
    draft = Draft(backend, topk, page)
    step = draft.batch(padding, on_host)
    served.shift_positions(step)
    true = step.positions.clone()
    assert true[0] == 140 + 64
    with envs.SGLANG_OPT_FLASHINFER_DRAFT_HOST_INDPTR.override(on_host):
        assert draft.read(step, draft.hooked) == draft.expected()
    assert torch.equal(step.positions, true)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_true_positions_it_would_read_others(served: Lengths, backend: str) -> None:
    """What the hook is for: when this fails, SGLang adds up lengths, and the hook can go."""
    draft = Draft(backend, 1, 16)
    step = draft.batch(0, on_host=False)
    assert draft.read(step, draft.kind.common_template) == draft.expected()
    served.shift_positions(step)
    assert draft.read(step, draft.kind.common_template) != draft.expected()


def test_a_layer_with_a_sliding_window_reads_the_newest_slots(served: Lengths) -> None:
    """Of the text, and what the branch has written; the lists of such layers begin elsewhere."""
    draft = Draft("triton", 2, 1, window=WINDOW)
    step = draft.batch(0, on_host=False)
    served.shift_positions(step)
    draft.read(step, draft.hooked)
    for written, of_step in enumerate(draft.expected()):
        borders = draft.backend.window_kv_indptr[written].tolist()
        slots = draft.backend.cuda_graph_window_kv_indices[written].tolist()
        for place, every in enumerate(of_step):
            assert slots[borders[place] : borders[place + 1]] == every[-WINDOW:]


READERS = {
    "flashinfer": {"common_template", "_process_multi_item_scoring"},
    "triton": {"common_template", "_fill_window_rail", "_set_kv_buffer"},
    "flashattention": set(),
    "torch_native": set(),
    "intel_amx": set(),
}
"""Functions of the backends that read what positions hold: for drafts, between our hook and the
kernels; for scoring items, which generates no text; for DCP, which is refused."""


@pytest.mark.parametrize("backend", READERS)
def test_no_backend_reads_positions_elsewhere(backend: str) -> None:
    """All others, and fa3's drafts too, find K and V by ``seq_lens``, which are KV lengths."""
    spec = importlib.util.find_spec(f"sglang.srt.layers.attention.{backend}_backend")
    assert spec is not None and spec.origin is not None
    found = set()
    for function in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = list(ast.walk(function))
        # How many there are says nothing about rows.
        counted = [
            node.value for node in nodes if isinstance(node, ast.Attribute) and node.attr == "numel"
        ]
        absent = [node.left for node in nodes if isinstance(node, ast.Compare)]
        found |= {
            function.name
            for node in nodes
            if isinstance(node, ast.Attribute) and node.attr == "positions"
            if node not in counted and node not in absent
        }
    assert found == READERS[backend]
