"""The running batch as a pass needs it: whoever has finished is out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


def drop_finished(batch: ScheduleBatch) -> None:
    """Let finished requests leave, in place; they have given their rows back.

    SGLang 0.5.23 does the same ahead of each step (``Scheduler.get_next_batch_to_run``), so there it
    changes nothing. 0.5.22 does it inside ``update_running_batch``, behind our hook. A finished request
    gives its row back at once, so a step is asked for this only when a row was. Gone with 0.5.22.
    """
    size = batch.batch_size()
    batch.filter_batch()
    if batch.batch_size() < size:
        batch.batch_is_full = False  # there is room for a waiting request
