"""The lengths that steps read on the device, and what a pass changes in them.

SGLang takes the slots to read and a token's RoPE position from one length, ``seq_lens``. A pass makes
the two differ: positions go on, slots do not. So ``seq_lens`` counts slots, and what a row lacks is
added to the positions of each step.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from kara_sglang.kernels.transfer import to_device
from kara_sglang.scheduler.pace import Pace
from kara_sglang.scheduler.streams import forward_stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from kara_sglang.radix_integration.row import RequestState


class Lengths:
    """Of one scheduler's rows.

    Parameters
    ----------
    scheduler : Scheduler
    pace : Pace

    Attributes
    ----------
    removed
        Tokens that each row of ``req_to_token`` lacks, shape ``(num_rows,)``, int64. Read and written
        on the forward stream only, so no pass changes the positions of a step in flight.
    """

    def __init__(self, scheduler: Scheduler, pace: Pace) -> None:
        rows = scheduler.req_to_token_pool.req_to_token
        self.scheduler = scheduler
        self.pace = pace
        self.removed = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
        self._known: dict[int, int] = {}  # what ``removed`` holds, where that is not 0
        self._of_step: torch.Tensor | None = None  # what the rows of the newest step lack
        self._ahead: dict[int, int] = {}  # slots that a pass freed and the step in flight still counts

    # -- what a row lacks --------------------------------------------------------------------------

    def lacks(self, changes: Iterable[tuple[int, int]]) -> None:
        """Rows, and how many tokens each lacks from the next step on."""
        new = {row: removed for row, removed in changes if self._known.get(row, 0) != removed}
        if not new:
            return
        self._known = {row: removed for row, removed in (self._known | new).items() if removed}
        pairs = torch.tensor(list(new.items()), dtype=torch.int64)
        with forward_stream(self.scheduler):
            pairs = to_device(pairs, self.removed.device)
            self.removed.index_copy_(0, pairs[:, 0], pairs[:, 1])

    def row_freed(self, row: int) -> None:
        """The row's next owner lacks nothing until it is told otherwise."""
        self._ahead.pop(row, None)
        self.lacks([(row, 0)])

    def removed_of(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Tokens that these rows lack; None where no row lacks any.

        Parameters
        ----------
        rows : torch.Tensor
            Shape ``(batch,)``: ``req_pool_indices`` of a batch, of whatever kind.

        Returns
        -------
        torch.Tensor or None
            Shape ``(batch,)``, int64, on the device.
        """
        return self.removed[rows] if self._known else None

    def logical(self, slots: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Lengths in slots of these rows, shape ``(batch,)``, in tokens."""
        removed = self.removed_of(rows)
        return slots if removed is None else slots + removed

    def shift_positions(self, step: ForwardBatch) -> None:
        """Give the tokens of a step their true positions; each request has as many of them."""
        self._of_step = removed = self.removed_of(step.req_pool_indices)
        if removed is None or not len(removed):
            return
        # Rebound, never written in place: workers keep the tensor for later steps.
        offsets = _of_tokens(removed, step.positions)
        step.positions = step.positions + offsets
        if step.mrope_positions is not None:
            step.mrope_positions = step.mrope_positions + offsets[None]

    @contextlib.contextmanager
    def positions_in_slots(self, step: ForwardBatch) -> Iterator[None]:
        """For a while a step has the positions again that :meth:`shift_positions` has shifted. Rows
        that pad a batch for a graph are nobody's and lack nothing."""
        true, removed = step.positions, self.removed_of(step.req_pool_indices)
        if removed is not None:
            step.positions = true - _of_tokens(removed, true)
        try:
            yield
        finally:
            step.positions = true

    def logical_of_step(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """Lengths in slots of the step whose positions were shifted last, in tokens."""
        return seq_lens if self._of_step is None else seq_lens + self._of_step

    # -- what a step publishes ---------------------------------------------------------------------

    @property
    def unknown(self) -> int:
        """By how many tokens KV lengths on the host may be short of what the next step begins with.
        Behind a prefill nothing is unknown: the decode step before it has been processed."""
        if not self.pace.behind:
            return 0
        last = self.scheduler.last_batch
        return self.pace.behind if last is not None and last.forward_mode.is_decode() else 0

    def begins_at(self, req: Req, state: RequestState) -> int:
        """The logical position with which the request's next step begins, at most."""
        return req.kv.kv_committed_len + state.removed + self.unknown

    def reaches(self, req: Req, state: RequestState) -> int:
        """The last logical position that the request's next step may compute."""
        return req.kv.kv_committed_len + state.removed + self.pace.reach

    def shorten(self, batch: ScheduleBatch, freed: dict[int, int]) -> None:
        """A pass has freed so many slots of these rows, by their places in the running batch."""
        if not self.pace.behind:
            _subtract(batch, [freed.get(place, 0) for place in range(len(batch.reqs))])
            return
        for place, slots in freed.items():
            row = batch.reqs[place].kv.req_pool_idx
            self._ahead[row] = self._ahead.get(row, 0) + slots

    def correct(self, batch: ScheduleBatch) -> None:
        """Take off a batch's lengths, just published by the step in flight, what passes have freed
        since that step began. With overlap scheduling speculation publishes them on the device
        (``managers/overlap_utils.py``)."""
        if not self._ahead:
            return
        less = [self._ahead.pop(req.kv.req_pool_idx, 0) for req in batch.reqs]
        if any(less):
            _subtract(batch, less)


def _of_tokens(of_rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """For each token what its row has; each row has as many tokens."""
    return of_rows.repeat_interleave(positions.shape[0] // len(of_rows))


def _subtract(batch: ScheduleBatch, slots: list[int]) -> None:
    # Rebound, never written in place: overlap scheduling keeps older batches in flight.
    less = torch.tensor(slots, dtype=torch.int64)
    batch.seq_lens = batch.seq_lens - to_device(less, batch.seq_lens.device)
    batch.seq_lens_sum = None
    if batch.seq_lens_cpu is not None:
        batch.seq_lens_cpu = batch.seq_lens_cpu - less
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
