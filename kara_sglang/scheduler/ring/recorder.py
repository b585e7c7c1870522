"""Keeping the queries of generated tokens until their window is scored.

One ring: a tensor of all layers with a view per layer, bounded by ``--kv-compress-query-mem-gb`` and
allocated right after the model's weights, so that SGLang's own sizing of the KV pool accounts for it.
Where a query lies is ``kernels/record.py``; who owns which page is here, on the host; the per-row
tables that the recording step reads live on the device and are written on the forward stream only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kara_sglang.kernels import record
from kara_sglang.kernels.backend import Kernels
from kara_sglang.kernels.record import PAGE, Recorder, Ring, Step, blocks_of, most_blocks
from kara_sglang.kernels.transfer import to_device
from kara_sglang.radix_integration.row import Voters
from kara_sglang.scheduler.pace import PLAIN, Pace
from kara_sglang.scheduler.ring.check import RingCheck
from kara_sglang.scheduler.ring.demand import Demand

LAG = 64
"""Least value of ``QueryRecorder.lag``."""


def cheapest(group: int, heads: str) -> int:
    """Heads that the smallest recorder keeps with the setting ``query_heads``."""
    return group if heads == "all" else 1


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Attention heads of one tensor-parallel rank, the same in every layer."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    def entry_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one head of each group of one token, all layers, stored as ``dtype``."""
        return self.num_layers * self.num_kv_heads * Ring.head_bytes(self.head_dim, dtype)


class QueryRecorder:
    """The rings, their pages, and the per-row tables.

    Parameters
    ----------
    shape : AttentionShape
    window, delay : int
        Tokens of a window, and behind it until its pass.
    budget_bytes : int
        For all layers together; with 0 nothing is ever recorded.
    dtype : torch.dtype
        Of what is stored: the model's, or ``FP8`` or ``FP4`` of ``kernels/record.py``.
    lag : int
        Steps that a due window may wait for its pass before its first queries are overwritten.
    checked : bool
        Whether to keep a :class:`RingCheck` beside the ring.
    why : str
        Why the budget is what it is, in words for people.
    pace : Pace
    """

    def __init__(
        self,
        shape: AttentionShape,
        window: int,
        delay: int,
        budget_bytes: int,
        dtype: torch.dtype,
        lag: int = LAG,
        checked: bool = False,
        why: str = "as set",
        pace: Pace = PLAIN,
    ) -> None:
        self.shape = shape
        self.pace = pace
        entry_bytes = shape.entry_bytes(dtype)
        self.page_bytes = PAGE * entry_bytes
        # Kernels reckon with 32 bits within a layer.
        most = 2**31 // (PAGE * shape.num_kv_heads * shape.head_dim) - 1
        wanted = budget_bytes // self.page_bytes
        self.num_pages = min(wanted, most)
        self.why = why if wanted <= most else f"{why}, but kernels reach no further"
        self.num_blocks = most_blocks(window + delay + lag * pace.tokens + pace.reserve)
        # Whole sixteens of entries, so that every layer's part is aligned like the first. The last one
        # takes what nobody keeps; kernels know it by its place.
        entries = self.num_pages * PAGE + 16
        self.trash = entries - 1
        self.ring = Ring.zeros(
            (shape.num_layers, entries, shape.num_kv_heads, shape.head_dim), dtype, shape.device
        )
        self.rings = [self.ring[layer] for layer in range(shape.num_layers)]
        self.check = RingCheck((shape.num_layers, entries), shape.device) if checked else None
        self.demand = Demand(self.num_pages, window, delay, pace)
        self._free = list(range(self.num_pages - 1, -1, -1))
        self.active: dict[int, Recorder] = {}  # by row
        self._changed: dict[int, tuple[int, ...]] = {}  # pages by block of a row, counted through
        self._new: list[int] = []  # pages that were given since the last flush
        self._held: list[torch.Tensor] = []  # queries of a step's newest layers, not stored yet

    def allocate_tables(self, num_rows: int) -> None:
        """Make the device tables for ``num_rows`` rows of ``req_to_token``, before graph capture."""
        size = (num_rows, self.num_blocks, self.shape.group)
        self.pages = torch.full(size, -1, dtype=torch.int32, device=self.shape.device)

    def request_bytes(self, heads: int) -> int:
        """Bytes that a request takes in the mean which records so many heads of each group, or 1 for
        the mean."""
        return self.demand.usual(heads) * self.page_bytes

    def most_bytes(self, heads: int) -> int:
        """Bytes that such a request takes at most."""
        return self.demand.most(heads) * self.page_bytes

    def serves(self, heads: int) -> bool:
        """Whether there is room for one request."""
        return self.num_bytes >= self.most_bytes(heads)

    def room(self, heads: int) -> int:
        """How many requests can record so many heads of each group at once, where their windows begin
        at any time."""
        return self.num_pages // self.demand.usual(heads)

    @property
    def num_bytes(self) -> int:
        """Of all pages."""
        return self.num_pages * self.page_bytes

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def stale(self) -> bool:
        """Whether the device tables lag behind; :meth:`flush` mends it."""
        return bool(self._changed)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Heads of each group that a recorder can have."""
        return tuple(sorted({1, self.shape.group})) if self.num_pages else ()

    @property
    def in_use(self) -> int:
        """Recorders handed out."""
        return len(self.active)

    def acquire(self, row: int, heads: int, since: int, step: int) -> Recorder:
        """Make a row's recorder, from the token at logical position ``since`` on, which is computed in
        the decode step that comes next and has this number. It has no pages yet (:meth:`extend`)."""
        if row in self.active:
            raise RuntimeError(f"kv-compress: row {row} already has a recorder")
        self.active[row] = recorder = Recorder(row, heads, since, (since, step))
        self.demand.add(since, step, heads)
        return recorder

    def extend(self, recorder: Recorder, position: int) -> bool:
        """Give a recorder pages up to the token at a logical position, unless it has them. Its oldest
        ones go where the table has no more room. False: too few are free."""
        newest = max(recorder.pages, default=recorder.since // PAGE - 1)
        for block in range(newest + 1, position // PAGE + 1):
            self.give_back(recorder, (block - self.num_blocks + 1) * PAGE)
            if recorder.heads > len(self._free):
                return False
            recorder.pages[block] = pages = tuple(self._free.pop() for _ in range(recorder.heads))
            self._new += pages
            self._write(recorder.row, block, pages)
        return True

    def give_back(self, recorder: Recorder, before: int) -> None:
        """Take the pages that hold nothing from logical position ``before`` on."""
        for block in [block for block in recorder.pages if (block + 1) * PAGE <= before]:
            self._free.extend(recorder.pages.pop(block))
            self._write(recorder.row, block, ())

    def release(self, recorder: Recorder) -> None:
        """Take a recorder back. Its row is told so before the next decode step (:meth:`flush`)."""
        if self.active.get(recorder.row) is not recorder:
            raise RuntimeError(f"kv-compress: recorder of row {recorder.row} released twice")
        del self.active[recorder.row]
        for block, pages in recorder.pages.items():
            self._free.extend(pages)
            self._write(recorder.row, block, ())
        recorder.pages.clear()
        self.demand.add(*recorder.granted, -recorder.heads)

    def voters(self, recorder: Recorder, start: int) -> Voters:
        """Whose queries can choose the window at logical position ``start``: nobody's unless all from
        there on are in the ring."""
        if start < recorder.first:
            return "none"
        return "all" if recorder.heads == self.shape.group else "mean"

    def pages_of(self, recorder: Recorder, start: int, count: int) -> tuple[tuple[int, ...], ...]:
        """Where the queries of so many tokens from logical position ``start`` on lie:
        :attr:`WindowJob.pages`."""
        return tuple(zip(*(recorder.pages[block] for block in blocks_of(start, count)), strict=True))

    def _write(self, row: int, block: int, pages: tuple[int, ...]) -> None:
        none = (-1,) * (self.shape.group - len(pages))
        self._changed[row * self.num_blocks + block % self.num_blocks] = pages + none

    def flush(self) -> None:
        """Write what changed into the device tables; the caller is on the forward stream."""
        rows = [(place, *pages) for place, pages in self._changed.items()]
        changed = to_device(torch.tensor(rows, dtype=torch.int32), self.shape.device)
        table = self.pages.view(-1, self.shape.group)
        table.index_copy_(0, changed[:, 0].long(), changed[:, 1:])
        if self.check is not None:
            self.check.forget(self._new)
        self._changed.clear()
        self._new.clear()

    def record(
        self,
        kernels: Kernels,
        layer: int,
        queries: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Store one decode step's queries of one layer (called from the model's forward).

        Parameters
        ----------
        kernels : Kernels
        layer : int
        queries : torch.Tensor
            As for :func:`~kara_sglang.kernels.record.record`.
        rows, positions : torch.Tensor
            As for :meth:`Step.of`.

        Layers wait for each other, so that one call stores several: ``kernels.layers_at_once``. What
        waits is only referred to. That keeps its memory from being given to anybody else, also while a
        CUDA graph is captured, whose replays find it there again; and no model writes into a layer's
        queries once its attention has read them.
        """
        if layer == 0:
            self._held = []  # a step that broke off may have left some
        self._held.append(queries)
        last = layer == self.shape.num_layers - 1
        if last or len(self._held) == kernels.layers_at_once:
            held, self._held = self._held, []
            layers = slice(layer + 1 - len(held), layer + 1)
            step = Step.of(positions, rows, self.pages)
            kernels.record(self.ring[layers], step, held)
            if self.check is not None:
                self.check.record(layers, step)

    def keep_accepted(self, first: torch.Tensor, rows: torch.Tensor, accepted: torch.Tensor) -> None:
        """Move the queries of accepted drafts to their places, behind the step that verified them.
        Those of a chain are there.

        Parameters
        ----------
        first, rows : torch.Tensor
            As for :func:`~kara_sglang.kernels.record.keep_accepted`.
        accepted : torch.Tensor
            Among all drafts of the step, shape ``(batch, most)``, int; negative behind the last.
        """
        if self.active and self.pace.branches:
            before = self.pace.tokens * torch.arange(len(rows), device=rows.device)[:, None]
            accepted = torch.where(accepted < 0, -1, accepted - before)
            record.keep_accepted(self.ring, first, rows, self.pages, accepted)

    def warm_up(self, kernels: Kernels) -> None:
        """Record row 0, which SGLang gives to nobody, so that no decode step waits for a compiler."""
        if not self.num_pages:
            return
        shape, device = self.shape, self.shape.device
        nobody = torch.zeros(1, dtype=torch.int64, device=device)
        queries = torch.zeros((1, shape.num_q_heads * shape.head_dim), dtype=shape.dtype, device=device)
        for layer in range(shape.num_layers):
            self.record(kernels, layer, queries, nobody, nobody)
