"""The rows of ``quality.drafts`` whose draft model does not follow its target."""

from __future__ import annotations

import os
import subprocess
import sys

from kara_sglang.benchmarks.quality import drafts

LOADED = """
from importlib.metadata import entry_points
found = [one for one in entry_points(group="sglang.srt.plugins") if "left-alone" in one.name]
for one in found:
    one.load()()
from kara_sglang.scheduler.drafts import Drafts
print(len(found), Drafts.follow.__name__)
"""


def test_processes_that_are_started_meanwhile_leave_drafts_alone() -> None:
    """And no others: what SGLang would load in them is the environment's own again."""

    def said() -> str:
        command = [sys.executable, "-c", LOADED]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    before = dict(os.environ)
    with drafts.left_alone():
        assert said() == "1 <lambda>"
    assert dict(os.environ) == before
    assert said() == "0 follow"
