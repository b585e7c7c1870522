"""``frontend.report``: the table of steps, and the line below it."""

from __future__ import annotations

import io

import pytest
from steps import step

from kara_sglang.frontend.records import Ledger


def test_the_table_shows_what_was_reused() -> None:
    pytest.importorskip("rich")
    from rich.console import Console

    from kara_sglang.frontend.report import steps_table, summary

    ledger = Ledger()
    ledger.add(step())
    ledger.add(step(reused_tokens=64, reused_slots=32, kv_slots_held=118, logical_length=150))
    console = Console(width=120, file=io.StringIO())
    console.print(steps_table(ledger.steps))
    lines = console.file.getvalue().splitlines()
    assert lines[1].split() == ["1", "plan", "100", "96", "51", "0", "150", "150", "2.0"]
    assert "96 (64 in 32 slots)" in lines[2]
    assert "268 with compression, 300 without (89%)" in summary(ledger, 4.0)
