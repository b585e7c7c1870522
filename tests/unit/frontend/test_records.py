"""``frontend.records``: what a step cost, and what all of them did."""

from __future__ import annotations

import json

from steps import meta_info, step

from kara_sglang.frontend.records import Ledger, Step


def test_a_step_of_each_kind_of_server() -> None:
    stock = step()
    assert (stock.slots_held, stock.logical_length, stock.windows) == (150, 150, 0)
    exact = step(windows=1, tokens_removed=32, kv_slots_held=118, logical_length=150)
    assert (exact.slots_held, exact.logical_length, exact.reused_tokens) == (118, 150, 0)
    compressed = step(reused_tokens=64, reused_slots=32, kv_slots_held=118, logical_length=150)
    assert (compressed.reused_tokens, compressed.reused_slots) == (64, 32)
    workers = meta_info() | {"kv_compress": [{"windows": 1, "tokens_removed": 32}]}
    ids = {"prompt_ids": (1, 2), "output_ids": (3,)}
    assert Step.of("gen", "plan", "s", workers, seconds=2.0, **ids).windows == 1
    assert "prompt_ids" not in compressed.numbers()
    assert json.loads(json.dumps(compressed.numbers()))["name"] == "plan"


def test_the_ledger_sums_up() -> None:
    ledger = Ledger()
    with ledger.request("plan"):
        assert [name for name, _ in ledger.running] == ["plan"]
    ledger.add(step())
    ledger.add(step(windows=1, tokens_removed=32, kv_slots_held=118, logical_length=150))
    totals = ledger.totals
    assert ledger.running == []
    assert (totals.steps, totals.prefilled_tokens, totals.output_tokens) == (2, 8, 102)
    assert (totals.slots_held, totals.logical_length, totals.seconds) == (268, 300, 4.0)
