"""Which requests to look at in which decode step, so that a step costs what happens in it.

A step adds at most one token to a running request, or as many as it verifies. So whoever has n tokens
to go until something can happen need not be looked at for a while, however many requests run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kara_sglang.kernels.record import PAGE
from kara_sglang.radix_integration.row import Geometry, RequestState
from kara_sglang.scheduler.lengths import Lengths

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Calendar:
    """Dates of the running requests of one scheduler, one each; counted in decode steps.

    Parameters
    ----------
    geometry : Geometry
    lengths : Lengths
    """

    def __init__(self, geometry: Geometry, lengths: Lengths) -> None:
        self.geometry = geometry
        self.lengths = lengths
        self.step = 0
        self._dates: dict[int, dict[int, tuple[Req, RequestState]]] = {}  # by step, by order

    def next_step(self) -> list[tuple[Req, RequestState]]:
        """Go on by a step; returns those that have a date in it, and forgets the dates."""
        self.step += 1
        due = list(self._dates.pop(self.step, {}).values())
        for _, state in due:
            state.look_at = 0
        return due

    def make_date(self, req: Req, state: RequestState, ready_at: int, looks_in: int = 0) -> None:
        """Look again when a window is due, when one begins that wants a recorder, when a recorder
        needs another page, or when an answer comes near its cap.

        Parameters
        ----------
        req, state
        ready_at : int
            KV length from which on the request's next window may be taken. Who is that long needs no
            date for it: one is made when the window has been taken.
        looks_in : int
            Tokens to come before the answer may have to be let go on (``longer.py``); 0: never.
        """
        dates = [ready_at - req.kv.kv_committed_len, looks_in]
        if state.recorder is not None:
            dates.append(PAGE - self.lengths.reaches(req, state) % PAGE)
        elif state.selector.needs_queries:
            asks_in = self.asks_in(req, state)
            dates.append(asks_in if asks_in > 0 else asks_in + self.geometry.window)
        dates = [tokens for tokens in dates if tokens > 0]
        if dates:
            self.look_in(self.lengths.pace.steps(min(dates)), req, state)

    def asks_in(self, req: Req, state: RequestState) -> int:
        """Tokens to come before the request must ask for a recorder: a window begins with the next
        step's queries, or might begin before those of the step behind it."""
        start = self.lengths.begins_at(req, state) - state.removed
        return state.next_window(start, self.geometry) - self.lengths.pace.tokens + 1

    def look_in(self, steps: int, req: Req, state: RequestState) -> None:
        """Make the request's date so many steps from now, instead of any that it has."""
        if steps <= 0:
            raise ValueError(f"kv-compress: a date {steps} steps from now")
        self.forget(state)
        state.look_at = self.step + steps
        self._dates.setdefault(state.look_at, {})[state.order] = req, state

    def forget(self, state: RequestState) -> None:
        """The request has no date any more."""
        if state.look_at:
            same_step = self._dates[state.look_at]
            del same_step[state.order]
            if not same_step:
                del self._dates[state.look_at]
            state.look_at = 0
