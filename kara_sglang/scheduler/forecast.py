"""How many KV slots a request will come to hold, as windows are compressed.

Over a window's W tokens a request grows by R slots, whoever chooses them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kara_sglang.radix_integration.row import Geometry

if TYPE_CHECKING:
    from kara_sglang.scheduler.pace import Pace
    from kara_sglang.scheduler.policy import Policy


LAST = 3
"""Tokens at an answer's end in which no window is compressed: no pass takes a request whose last token
is on its way, and that one never has any KV."""


def growth(geometry: Geometry, tokens: float, uncompressed: int, kept: int) -> float:
    """Most KV slots by which a request grows while it generates ``tokens``.

    Parameters
    ----------
    geometry : Geometry
    tokens : float
        Tokens to come.
    uncompressed : int
        Tokens from the next window's start on, so far; negative in front of the first one.
    kept : int
        R of this request.
    """
    window, delay = geometry.window, geometry.delay
    ahead = uncompressed + tokens
    taken = max(0, int((ahead - LAST - delay) // window))
    at_the_end = ahead - taken * (window - kept)
    # Right before its last compression it holds a whole window and its delay.
    before_last = (taken - 1) * kept + window + delay if taken else 0
    # A window that is overdue will give slots back, but memory that is not free yet is no reserve.
    return max(0.0, min(max(at_the_end, before_last) - uncompressed, tokens))


def longest(geometry: Geometry, room: int, uncompressed: int, kept: int) -> int:
    """Most tokens that a request can still generate where each of its windows is compressed as it falls
    due; 0 where there is no room for a window with its delay.

    Parameters
    ----------
    geometry : Geometry
    room : int
        KV slots that it may hold from its next window's start on, at most.
    uncompressed : int
        Tokens from there on, so far; negative in front of the first window.
    kept : int
        R of this request.
    """
    due_at = geometry.window + geometry.delay + LAST
    if room < due_at:
        return 0
    windows = (room - due_at) // kept + 1
    return max(0, room + windows * (geometry.window - kept) - uncompressed)


class Forecast:
    """What the requests of a server come to hold.

    Parameters
    ----------
    policy : Policy
    geometry : Geometry
    pace : Pace

    Attributes
    ----------
    latest : Geometry
        With the tokens in the delay that a window may wait for its pass, and those that drafts take.
    """

    def __init__(self, policy: Policy, geometry: Geometry, pace: Pace) -> None:
        self.policy = policy
        wait = policy.wait * pace.tokens + pace.reserve
        self.latest = dataclasses.replace(geometry, delay=geometry.delay + wait)
        self._steps = pace.steps(geometry.window)

    def in_time(self, running: int) -> float:
        """Share of the windows of so many running requests that passes take as they fall due."""
        return self.policy.in_time(running, self._steps)

    def reserve(self, tokens: float, held: int, base: int, kept: int, running: int) -> float:
        """KV slots that a request takes for ``tokens`` still to come, at most.

        Parameters
        ----------
        tokens : float
        held : int
            KV slots that it holds.
        base : int
            KV index at which its next window starts.
        kept : int
            R of this request.
        running : int
            Requests that run at once.
        """
        grown = growth(self.latest, tokens, held - base, kept)
        grown = max(grown, min(tokens, self.policy.floor - held))
        # Where passes fall behind, what they leave is held as in stock SGLang.
        return tokens - self.in_time(running) * (tokens - grown)
