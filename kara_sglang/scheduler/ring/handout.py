"""Who records: recorders are handed out where windows begin and given back where one was compressed.

A window can be voted on when the queries of all its tokens were recorded: a token whose own query is
missing loses its strongest vote, and is lost. So a request asks for a recorder in the step before a
window's first query. Who finds none does not wait: that window will be chosen without queries, and
when the next one begins the request asks again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kara_sglang.radix_integration.row import RequestState
from kara_sglang.scheduler.lengths import Lengths
from kara_sglang.scheduler.ring.recorder import QueryRecorder, cheapest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

MOST_IN_A_ROW = 4
"""Windows that a request votes on before it must give its recorder to those who asked in vain. Whoever
gives one back goes without for the rest of a window, and the next owner begins with a whole one, so a
change can cost as much as a window."""


class Handout:
    """The recorders of one scheduler.

    Parameters
    ----------
    recorder : QueryRecorder
    heads : str
        The setting ``query_heads``.
    lengths : Lengths
    """

    def __init__(self, recorder: QueryRecorder, heads: str, lengths: Lengths) -> None:
        self.recorder = recorder
        self.lengths = lengths
        self.heads = heads
        self._least = cheapest(recorder.shape.group, heads)
        self._in_vain: Counter[int] = Counter()  # requests by RequestState.in_vain, where that is not 0

    def ask(self, asking: Sequence[tuple[Req, RequestState]], step: int) -> None:
        """Windows of these requests begin with the queries of the decode step of this number.

        Pages belong to those first that asked in vain more often in a row, also when their windows
        begin later; the older request comes first on ties. With ``query_heads`` at ``auto`` each gets a
        recorder of the mean; what is then left, also when all have come who asked in vain, upgrades
        them to all heads, the first ones first.
        """
        line = sorted(asking, key=lambda one: (-one[1].in_vain, one[1].order))
        for _, state in line:
            self._count(state, -1)
        served = 0
        for req, state in line:
            ahead = sum(count for times, count in self._in_vain.items() if times > state.in_vain)
            if not self._start(req, state, self._least, step, ahead):
                break
            served += 1
        waiting = len(line) - served + self._in_vain.total()
        for req, state in line[:served]:
            state.in_vain = state.voted = 0
            if self.heads == "auto":
                self._upgrade(req, state, step, waiting)
        for _, state in line[served:]:
            state.in_vain += 1
            self._count(state, 1)

    def _start(self, req: Req, state: RequestState, heads: int, step: int, others: int) -> bool:
        """Give a request a recorder of so many heads, if that leaves pages for ``others`` to come."""
        recorder = self.recorder
        since = self.lengths.begins_at(req, state)
        if not recorder.demand.fits(since, step, heads, self._pages_for(others)):
            return False
        state.recorder = recorder.acquire(req.kv.req_pool_idx, heads, since, step)
        if recorder.extend(state.recorder, self.lengths.reaches(req, state)):
            return True
        self._take(state)
        return False

    def _upgrade(self, req: Req, state: RequestState, step: int, others: int) -> None:
        group = self.recorder.shape.group
        if group > self._least:
            self._take(state)
            if not self._start(req, state, group, step, others):
                self._start(req, state, self._least, step, 0)

    def go_on(self, req: Req, state: RequestState) -> None:
        """A block may begin with the request's next query. Where no page is left its window does
        without queries, and the request asks again when the next one begins."""
        assert state.recorder is not None
        if not self.recorder.extend(state.recorder, self.lengths.reaches(req, state)):
            self._take(state)

    def pass_on(self, state: RequestState, *, useful: bool) -> None:
        """A window of the request was compressed: take the pages of its queries, and its recorder where
        it is of no more use, or where others asked in vain and it had its turn: one window for who
        records more than it must."""
        if state.recorder is None:
            return
        wanted = self._pages_for(self._in_vain.total()) > self.recorder.demand.spare
        most = MOST_IN_A_ROW if state.recorder.heads == self._least else 1
        if not useful or (wanted and state.voted >= most):
            self._take(state)
        else:
            self.recorder.give_back(state.recorder, state.base + state.removed)

    def _pages_for(self, requests: int) -> float:
        return requests * self._least * self.recorder.demand.mean

    def withdraw(self, state: RequestState) -> None:
        """The request asks no more."""
        self._count(state, -1)
        state.in_vain = 0

    def leave(self, state: RequestState) -> None:
        """The request gives its row back."""
        self.withdraw(state)
        if state.recorder is not None:
            self._take(state)

    def _count(self, state: RequestState, change: int) -> None:
        if state.in_vain:
            self._in_vain[state.in_vain] += change
            if not self._in_vain[state.in_vain]:
                del self._in_vain[state.in_vain]

    def _take(self, state: RequestState) -> None:
        assert state.recorder is not None
        self.recorder.release(state.recorder)
        state.recorder = None
