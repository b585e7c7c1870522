"""The rows of ``quality.drafts`` whose draft model does not follow its target."""

from __future__ import annotations

import multiprocessing
import sys
from importlib.metadata import entry_points

from kara_sglang.benchmarks.quality import drafts


def loaded() -> tuple[int, str]:
    """In a process such as a scheduler: how many such plugins there are, and what follows."""
    found = [one for one in entry_points(group="sglang.srt.plugins") if "left-alone" in one.name]
    for one in found:
        one.load()()
    from kara_sglang.scheduler.drafts import Drafts

    return len(found), Drafts.follow.__name__


def said() -> tuple[int, str]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(loaded)


def test_processes_that_are_started_meanwhile_leave_drafts_alone() -> None:
    """And no others: what SGLang would load in them is as before."""
    before = list(sys.path)
    with drafts.left_alone():
        assert said() == (1, "<lambda>")
    assert sys.path == before
    assert said() == (0, "follow")
