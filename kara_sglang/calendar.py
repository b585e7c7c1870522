"""Which requests to look at in which decode step, so that a step costs what happens in it.

A step adds at most one token to a running request. So whoever has n tokens to go until something can
happen need not be looked at before n steps from now, however many requests run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kara_sglang.state import RequestState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Calendar:
    """Dates of the running requests of one scheduler, one each; counted in decode steps."""

    def __init__(self) -> None:
        self.step = 0
        self._dates: dict[int, list[tuple[Req, RequestState]]] = {}

    def next_step(self) -> list[tuple[Req, RequestState]]:
        """Go on by a step; returns those that have a date in it."""
        self.step += 1
        due = []
        for req, state in self._dates.pop(self.step, ()):
            if state.look_at == self.step:  # else it has another date, or left
                state.look_at = 0
                due.append((req, state))
        return due

    def look_in(self, steps: int, req: Req, state: RequestState) -> None:
        """Make the request's date so many steps from now, instead of any that it has."""
        if steps <= 0:
            raise ValueError(f"kv-compress: a date {steps} steps from now")
        state.look_at = self.step + steps
        self._dates.setdefault(state.look_at, []).append((req, state))

    def forget(self, state: RequestState) -> None:
        """The request has left."""
        state.look_at = 0
