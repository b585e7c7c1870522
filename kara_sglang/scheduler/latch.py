"""When SGLang looks at its queue again, because passes have freed slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

LOOK_EVERY = 8
"""Steps from one look at the queue to the next where each step has a pass: a look adds up what is
reserved for all running requests."""


class Latch:
    """Lets SGLang look at its queue again when passes have changed what is free.

    A request that finds no room sets ``ScheduleBatch.batch_is_full``, and SGLang clears it when a
    running request leaves (``managers/scheduler.py``, ``_get_new_batch_prefill_raw``). With long
    answers that can be thousands of steps, in which what passes free would stand empty. When it looks,
    SGLang checks all of its own limits anew.
    """

    def __init__(self) -> None:
        self._step = 0
        self._changed = False

    def step(self, running: ScheduleBatch, *, passed: bool) -> None:
        """Called in each decode step, with whether it has had a pass."""
        self._step += 1
        self._changed |= passed
        if self._changed and self._step % LOOK_EVERY == 0:
            running.batch_is_full = self._changed = False
