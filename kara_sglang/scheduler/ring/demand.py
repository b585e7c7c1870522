"""How many pages of the ring the present recorders will hold, in each step to come.

A request that decodes adds a token a step, and a pass takes its window when W + delay tokens are there.
So the pages that its recorder holds rise and fall with a period of W steps, known beforehand. A new
recorder is granted only where no step lacks a page, as long as passes are punctual. Requests whose
windows begin in the same step have their peaks together; those that begin apart share pages.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from kara_sglang.kernels.record import PAGE
from kara_sglang.scheduler.pace import PLAIN, Pace


class Demand:
    """Pages by decode step modulo W.

    With speculation nobody knows how far a step carries a request, so each recorder is counted with the
    most that it can hold, in all steps.

    Parameters
    ----------
    num_pages, window, delay : int
        Of the ring; tokens.
    pace : Pace
    """

    def __init__(self, num_pages: int, window: int, delay: int, pace: Pace = PLAIN) -> None:
        self.num_pages = num_pages
        self.window = window
        self.delay = delay
        self.pace = pace
        self._totals = np.zeros(window, dtype=np.int64)
        self._pattern = functools.cache(self._new_pattern)

    @property
    def spare(self) -> int:
        """Pages that are wanted in no step."""
        return self.num_pages - int(self._totals.max())

    @functools.cached_property
    def mean(self) -> float:
        """Pages of a recorder of the mean, over all steps and all places of a window in its pages."""
        if self.pace.speculates:
            return self.peak
        return float(np.mean([self._held(start) for start in range(PAGE)]))

    @property
    def peak(self) -> int:
        """Most pages that a recorder of the mean can hold."""
        return int(max(self._held(start).max() for start in range(PAGE)))

    def usual(self, heads: int) -> int:
        """Pages of a recorder of so many heads of each group, or 1 for their mean, over all steps."""
        return math.ceil(heads * self.mean)

    def most(self, heads: int) -> int:
        """Most pages that such a recorder can hold."""
        return heads * self.peak

    def fits(self, start: int, step: int, heads: int, kept_free: float) -> bool:
        """Whether there will be pages for a recorder of so many heads whose first window begins at
        logical position ``start`` in this step, and ``kept_free`` more."""
        most = (self._totals + heads * self._rolled(start, step)).max()
        return bool(most + kept_free <= self.num_pages)

    def add(self, start: int, step: int, heads: int) -> None:
        """Count a recorder in; with negative ``heads`` out again."""
        self._totals += heads * self._rolled(start, step)

    def _rolled(self, start: int, step: int) -> np.ndarray:
        return np.roll(self._pattern(start % PAGE), step % self.window)

    def _new_pattern(self, start: int) -> np.ndarray:
        if self.pace.speculates:
            return np.full(self.window, self.peak)
        # Windows begin elsewhere in a page, each time, where W is not in whole pages.
        apart = math.gcd(self.window, PAGE)
        return np.max([self._held(other) for other in range(start % apart, PAGE, apart)], axis=0)

    def _held(self, start: int) -> np.ndarray:
        """Pages by tokens since a window's beginning, ``(W,)``, where that lies so far in its page."""
        token = np.arange(self.window)
        # Of windows before it whose passes are still to come.
        before = np.maximum(0, -(-(self.delay - token) // self.window))
        newest = start + token + self.pace.reach
        return newest // PAGE - (start - before * self.window) // PAGE + 1
