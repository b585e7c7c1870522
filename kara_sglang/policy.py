"""Who is compressed now, and who may record. Host arithmetic, the same on every rank.

Decisions depend on the order of the batch and on counters only, never on a clock, so that
tensor-parallel ranks agree without talking to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request as the policy sees it."""

    index: int  # position in the batch
    order: int  # age: smaller came first
    overdue: int  # tokens beyond its due length; negative: not due
    uncompressed: int  # tokens from its next window's start on


class Policy:
    """Compresses the due requests every ``period`` decode steps, at most ``limit`` at a time.

    Parameters
    ----------
    period : int
        Decode steps between two passes.
    limit : int
        Requests per pass. Requests that have waited ``patience`` tokens go anyway: their queries
        would be overwritten next.
    patience : int
        Tokens.
    """

    def __init__(self, period: int, limit: int, patience: int) -> None:
        self.period = period
        self.limit = limit
        self.patience = patience
        self.step = 0

    def due(self, candidates: Sequence[Candidate]) -> list[int]:
        """Batch indices to compress in this step, ascending. Counts the step."""
        self.step += 1
        ready = [c for c in candidates if c.overdue >= 0]
        urgent = [c for c in ready if c.overdue >= self.patience]
        if self.step % self.period:
            return [c.index for c in urgent]
        longest_first = sorted(ready, key=lambda c: (-c.overdue, c.order))
        chosen = {c.index for c in [*urgent, *longest_first[: self.limit]]}
        return sorted(chosen)

    @staticmethod
    def grants(
        waiting: Sequence[Candidate], free_units: int, group: int, heads: str
    ) -> list[tuple[int, int]]:
        """Hand out the ring's free units: ``(batch index, units)`` for each request that gets some.

        ``heads`` is the setting ``query_heads``. With ``auto`` everybody gets a rotating recorder
        first, the longest uncompressed first and the older on ties; what is then left upgrades them
        to all heads in the same order.
        """
        cheapest = group if heads == "all" else 1
        line = sorted(waiting, key=lambda c: (-c.uncompressed, c.order))
        served = line[: free_units // cheapest]
        left = free_units - cheapest * len(served)
        upgrades = left // (group - cheapest) if heads == "auto" and group > 1 else 0
        return [(c.index, group if i < upgrades else cheapest) for i, c in enumerate(served)]
