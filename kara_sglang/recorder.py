"""Keeping the queries of generated tokens until their window is scored.

One ring: a tensor of all layers with a view per layer, bounded by ``--kv-compress-query-mem-gb`` and
allocated right after the model's weights, so that SGLang's own sizing of the KV pool accounts for it.
Where a query lies is ``kernels/record.py``; who owns which unit is here, on the host; the per-row
tables that the recording step reads live on the device and are written on the forward stream only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kara_sglang.kernels.backend import Kernels
from kara_sglang.kernels.copies import to_device
from kara_sglang.kernels.record import Ring, Step
from kara_sglang.ring_check import RingCheck

if TYPE_CHECKING:
    from kara_sglang.radix_integration.row import Voters

LAG = 64
"""Least value of ``QueryRecorder.lag``."""


@dataclass(frozen=True, slots=True)
class Recorder:
    """A request's share of the ring."""

    row: int  # req_pool_idx
    units: tuple[int, ...]  # one per head of a GQA group, or a single one for their mean
    since: int  # logical position of the first recorded token


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
    """The rings, their units, and the per-row tables.

    Parameters
    ----------
    shape : AttentionShape
    window, delay : int
        Tokens; a unit holds ``window + delay + lag`` of them.
    budget_bytes : int
        For all layers together.
    dtype : torch.dtype
        Of what is stored: the model's, or ``FP8`` or ``FP4`` of ``kernels/record.py``.
    lag : int
        Tokens that a due window may wait for its pass before its first queries are overwritten.
    checked : bool
        Whether to keep a :class:`RingCheck` beside the ring.
    why : str
        Why the budget is what it is, in words for people.
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
    ) -> None:
        self.shape = shape
        self.why = why
        self.lag = lag
        self.ring_len = window + delay + lag
        self.unit_bytes = self.ring_len * shape.entry_bytes(dtype)
        self.num_units = budget_bytes // self.unit_bytes
        # Whole sixteens of entries, so that every layer's part is aligned like the first. The last one
        # takes what nobody keeps; kernels know it by its place.
        entries = (self.num_units * self.ring_len // 16 + 1) * 16
        self.trash = entries - 1
        self.ring = Ring.zeros(
            (shape.num_layers, entries, shape.num_kv_heads, shape.head_dim), dtype, shape.device
        )
        self.rings = [self.ring[layer] for layer in range(shape.num_layers)]
        self.check = (
            RingCheck((shape.num_layers, entries), self.ring_len, shape.device) if checked else None
        )
        self._free = list(range(self.num_units - 1, -1, -1))
        self.active: dict[int, Recorder] = {}  # by row
        self._dirty: set[int] = set()
        self._held: list[torch.Tensor] = []  # queries of a step's newest layers, not stored yet

    def allocate_tables(self, num_rows: int) -> None:
        """Make the device tables for ``num_rows`` rows of ``req_to_token``, before graph capture."""
        device = self.shape.device
        self.units = torch.full((num_rows, self.shape.group), -1, dtype=torch.int64, device=device)

    def request_bytes(self, heads: int) -> int:
        """Bytes that a request takes which records so many heads of each group, or 1 for the mean."""
        return heads * self.unit_bytes

    def room(self, heads: int) -> int:
        """How many requests can record so many heads of each group at once."""
        return self.num_units // heads

    @property
    def num_bytes(self) -> int:
        """Of all units."""
        return self.num_units * self.unit_bytes

    @property
    def free_units(self) -> int:
        return len(self._free)

    @property
    def stale(self) -> bool:
        """Whether the device tables lag behind; :meth:`flush` mends it."""
        return bool(self._dirty)

    @property
    def in_use(self) -> int:
        """Recorders handed out."""
        return len(self.active)

    def acquire(self, row: int, num_units: int, since: int) -> Recorder:
        """Hand ``num_units`` units (the group's size, or 1 for the mean) to a row."""
        if row in self.active:
            raise RuntimeError(f"kv-compress: row {row} already has a recorder")
        if num_units > len(self._free):
            raise RuntimeError(f"kv-compress: {num_units} ring units wanted, {len(self._free)} free")
        units = tuple(self._free.pop() for _ in range(num_units))
        recorder = Recorder(row, units, since)
        self.active[row] = recorder
        self._dirty.add(row)
        return recorder

    def release(self, recorder: Recorder) -> None:
        """Take a recorder back. Its row is told so before the next decode step (:meth:`flush`)."""
        if self.active.get(recorder.row) is not recorder:
            raise RuntimeError(f"kv-compress: recorder of row {recorder.row} released twice")
        del self.active[recorder.row]
        self._dirty.add(recorder.row)
        self._free.extend(recorder.units)

    def voters(self, recorder: Recorder, start: int, length: int) -> Voters:
        """Whose queries can choose the window at logical position ``start`` of a request whose logical
        length is ``length``: nobody's unless all from ``start`` on are in the ring."""
        if not recorder.since <= start or length - start > self.ring_len:
            return "none"
        return "all" if len(recorder.units) == self.shape.group else "mean"

    def flush(self) -> None:
        """Write what changed into the device tables; the caller is on the forward stream."""
        group, device = self.shape.group, self.shape.device
        rows = sorted(self._dirty)
        active = [self.active.get(row) for row in rows]
        none = (-1,) * group
        units = [((r.units if r is not None else ()) + none)[:group] for r in active]
        where = to_device(torch.tensor(rows), device)
        self.units.index_copy_(0, where, to_device(torch.tensor(units), device))
        if self.check is not None:
            self.check.forget(unit for r in active if r is not None for unit in r.units)
        self._dirty.clear()

    def record(
        self,
        kernels: Kernels,
        layer: int,
        queries: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Store one decode step's queries of one layer (called from the model's forward).

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
            step = Step(positions, rows, self.units, self.ring_len)
            kernels.record(self.ring[layers], step, held)
            if self.check is not None:
                self.check.record(layers, step)

    def warm_up(self, kernels: Kernels) -> None:
        """Record row 0, which SGLang gives to nobody, so that no decode step waits for a compiler."""
        shape, device = self.shape, self.shape.device
        nobody = torch.zeros(1, dtype=torch.int64, device=device)
        queries = torch.zeros((1, shape.num_q_heads * shape.head_dim), dtype=shape.dtype, device=device)
        for layer in range(shape.num_layers):
            self.record(kernels, layer, queries, nobody, nobody)
