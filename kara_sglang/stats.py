"""Counters of one scheduler process."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Totals:
    """What happened since the server started."""

    passes: int = 0
    windows: int = 0
    without_queries: int = 0  # windows whose selector asks for queries that were not recorded
    slots_freed: int = 0
    pass_seconds: float = 0.0
    skipped: Counter[str] = field(default_factory=Counter)

    def add_pass(self, windows: int, without_queries: int, slots_freed: int, seconds: float) -> None:
        self.passes += 1
        self.windows += windows
        self.without_queries += without_queries
        self.slots_freed += slots_freed
        self.pass_seconds += seconds

    def copy(self) -> Totals:
        return dataclasses.replace(self, skipped=self.skipped.copy())

    def skip(self, reason: str) -> None:
        """Count a request that is left uncompressed."""
        self.skipped[reason] += 1
