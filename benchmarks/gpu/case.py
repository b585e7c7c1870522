"""What the kernels are checked and timed on: one model's pool, ring and windows."""

from __future__ import annotations

import dataclasses

import torch

from kara_sglang.benchmarks.arithmetic import Settings
from kara_sglang.benchmarks.gpu.timing import DEVICE
from kara_sglang.benchmarks.models import Model
from kara_sglang.config import KaraConfig
from kara_sglang.kernels import record as reference_record
from kara_sglang.kernels.backend import LayerPool, WindowJob, WindowShape
from kara_sglang.kernels.record import FP4, FP8, Ring, Step
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.score import AttentionRule
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.selectors.base import Selector
from kara_sglang.kernels.selectors.kara import KaraSelector
from kara_sglang.kernels.selectors.keys import KeysSelector
from kara_sglang.kernels.triton import TritonKernels
from kara_sglang.kernels.triton.compact import compact
from kara_sglang.kernels.triton.pool import PoolTables
from kara_sglang.kernels.triton.prepare import weight_scores
from kara_sglang.kernels.triton.score import Scratch, Voters, attention_scores, recorders_of
from kara_sglang.kernels.triton.select import select
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder

RULE = KaraSelector.from_config(KaraConfig()).rule
CHUNKS = ChunkRule(budget=0.1)
KARA, KEYS = KaraSelector(chunks=CHUNKS, rule=RULE), KeysSelector.from_config(KaraConfig())
PAGE = 16
BATCH = 64  # tokens of a decode step
RING_DTYPES = {4: FP4, 8: FP8, 16: torch.bfloat16}


class Case:
    """One model's pool, ring and windows, filled with random numbers."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        num_jobs: int,
        layers: int,
        key_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.model = dataclasses.replace(model, layers=layers)
        self.settings = settings
        self.num_jobs = num_jobs
        heads, dim = model.kv_heads, model.head_dim
        width, self.voices = settings.window, 1 if settings.mean else model.group
        slots = num_jobs * width * 2  # half of the pool belongs to others
        ring_dtype = RING_DTYPES[settings.query_bits]
        shape = AttentionShape(layers, model.query_heads, heads, dim, torch.bfloat16, DEVICE)
        count = width + settings.delay
        of_page = reference_record.PAGE * shape.entry_bytes(ring_dtype)
        num_pages = num_jobs * self.voices * reference_record.most_blocks(count)
        self.recorder = QueryRecorder(shape, width, settings.delay, num_pages * of_page, ring_dtype)
        self.recorder.allocate_tables(1 + BATCH)
        self.starts = [16 + 1003 * job for job in range(num_jobs)]
        self.owners = []
        for job, start in enumerate(self.starts):
            owner = self.recorder.acquire(1 + job, self.voices, start, step=0)
            for position in range(start, start + count):
                require(self.recorder.extend(owner, position), "pages for each token of a window")
            self.owners.append(owner)
        self.recorder.flush()

        def normal(rows: int) -> torch.Tensor:
            return torch.randn(rows, heads, dim, device=DEVICE, dtype=torch.bfloat16)

        angles = width * 1e4 ** -torch.arange(0, 1, 2 / dim, device=DEVICE)  # as of RoPE
        self.pool = LayerPool(
            keys=[normal(slots).to(key_dtype) for _ in range(layers)],
            values=[normal(slots).to(key_dtype) for _ in range(layers)],
            rings=self.recorder.rings,
            scales=[dim**-0.5] * layers,
            rope_shift=RopeShift.of(
                [RopeShift.of_layer(angles.cos(), angles.sin(), dim, halves=True)] * layers
            ),
        )
        for ring in self.recorder.rings:
            filled = Ring.of(normal(len(ring.queries)), ring_dtype)
            for part, full in zip(ring.parts, filled.parts, strict=True):
                part.copy_(full)
        pages = torch.randperm(slots // PAGE, device=DEVICE)[: num_jobs * width // PAGE]
        self.slots = (pages[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).int()
        self.slots = self.slots.view(num_jobs, width)
        self.tables = PoolTables.of(self.pool)
        self.voters = Voters(recorders_of(self.jobs()).to(DEVICE), self.voices, 0, width)
        self.scores = torch.empty(layers, num_jobs, heads, width, device=DEVICE)
        regions = Scratch.regions(
            (layers, num_jobs, heads), width, dim, self.voters.rows, self.tables.dot
        )
        self.scratch = Scratch(
            *(torch.empty(shape, dtype=dtype, device=DEVICE) for shape, dtype in regions)
        )
        self.kept = torch.empty(
            layers, num_jobs, heads, settings.kept, dtype=torch.int32, device=DEVICE
        )
        self.rows = 1 + torch.randperm(BATCH, device=DEVICE)  # most of them have no recorder
        self.positions = torch.randint(0, 40_000, (BATCH,), device=DEVICE)
        for job, start in enumerate(self.starts):  # only there the recorders have pages
            self.positions[self.rows == 1 + job] = start + int(torch.randint(count, ()))
        # As the query part of a QKV projection.
        projected = torch.randn(
            layers, BATCH, model.query_heads + 2 * heads, dim, device=DEVICE, dtype=torch.bfloat16
        )
        self.queries = projected.flatten(2)[..., : model.query_heads * dim]
        self.recording = TritonKernels()

    def record(self) -> None:
        for layer, queries in enumerate(self.queries):
            self.recorder.record(self.recording, layer, queries, self.rows, self.positions)

    def record_in_a_model(self) -> None:
        """The same, but each layer's queries are made and dropped, and other tensors then come to lie
        in the memory that is free."""
        for layer, stored in enumerate(self.queries):
            queries = stored.clone()
            self.recorder.record(self.recording, layer, queries, self.rows, self.positions)
            del queries
            torch.full_like(stored, torch.nan)

    def expected_rings(self) -> Ring:
        """The ring as the reference leaves it after a step."""
        ring = Ring(*(part.clone() for part in self.recorder.ring.parts))
        step = Step(self.positions, self.rows, self.recorder.pages)
        reference_record.record(ring, step, list(self.queries))
        return ring

    def require_recorded(self, expected: Ring, what: str) -> None:
        """Raise where the ring is not ``expected``, the entry that nobody reads left out."""
        for ours, theirs in zip(self.recorder.ring.parts, expected.parts, strict=True):
            same = torch.equal(ours[:, :-1].view(torch.uint8), theirs[:, :-1].view(torch.uint8))
            require(same, what)

    def score(self, rule: AttentionRule = RULE) -> None:
        for launch in attention_scores(
            self.tables,
            range(self.model.layers),
            self.slots,
            self.voters,
            rule=rule,
            scratch=self.scratch,
            out=self.scores,
        ):
            launch()

    def weights(self) -> None:
        layers = range(self.model.layers)
        weight_scores(self.tables, layers, self.slots, rule=KEYS.rule, out=self.scores)()

    def select(self) -> None:
        select(self.scores, self.settings.kept, CHUNKS, self.kept, neighbours=RULE.neighbours)()

    def compact(self) -> None:
        for launch in compact(self.tables, self.slots, self.kept):
            launch()

    def mix(self) -> None:
        """Give all slots other tokens: compacted windows become alike, and then nothing has to move."""
        for buffer in (*self.pool.keys, *self.pool.values):
            buffer.copy_(buffer[torch.randperm(len(buffer), device=DEVICE)])

    def kernels(self) -> TritonKernels:
        """The server's kernels, with the scratch that it would reserve."""
        settings = self.settings
        kernels = TritonKernels()
        kernels.reserve(
            DEVICE,
            WindowShape(
                num_layers=self.model.layers,
                num_kv_heads=self.model.kv_heads,
                head_dim=self.model.head_dim,
                dtype=self.tables.dot,
                width=settings.window,
                kept=settings.window,
                voices=self.voices,
                query_count=settings.window + settings.delay,
            ),
        )
        return kernels

    def pages(self, job: int) -> tuple[tuple[int, ...], ...]:
        """Where a window's queries lie."""
        count = self.settings.window + self.settings.delay
        return self.recorder.pages_of(self.owners[job], self.starts[job], count)

    def jobs(self, selector: Selector = KARA) -> list[WindowJob]:
        return [
            WindowJob(
                slots=self.slots[job],
                kept=self.settings.kept,
                selector=selector,
                seed=0,
                query_start=self.starts[job],
                query_count=self.settings.window + self.settings.delay,
                pages=self.pages(job) if selector.needs_queries else None,
            )
            for job in range(self.num_jobs)
        ]


def require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(f"wrong result: {what}")
