"""Dates of requests: each is looked at in the step of its last date and in no other."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from kara_sglang.benchmarks import steps
from kara_sglang.radix_integration.row import Geometry
from kara_sglang.scheduler.calendar import Calendar
from kara_sglang.scheduler.pace import PLAIN

GEOMETRY = Geometry(page_size=16, window=64, delay=8)
LENGTHS = SimpleNamespace(pace=PLAIN)


def test_everybody_is_seen_on_the_last_date_that_was_made() -> None:
    """Through dates that are put off, brought forward and dropped, against a dictionary."""
    random = Random(0)
    calendar, dates = Calendar(GEOMETRY, LENGTHS), {}
    states = [SimpleNamespace(order=n, look_at=0) for n in range(20)]
    seen = 0
    for step in range(1, 2000):
        due = [state.order for _, state in calendar.next_step()]
        assert calendar.step == step and len(due) == len(set(due))
        assert sorted(due) == sorted(n for n, date in dates.items() if date == step)
        seen += len(due)
        for number in due:
            del dates[number]
        for state in random.sample(states, random.randint(0, 3)):
            if random.random() < 0.1:
                calendar.forget(state)
                dates.pop(state.order, None)
            else:
                for _ in range(random.randint(1, 3)):
                    ahead = random.randint(1, 12)
                    calendar.look_in(ahead, None, state)
                    dates[state.order] = step + ahead
        held = [state.order for step in calendar._dates.values() for _, state in step.values()]
        assert sorted(held) == sorted(dates), "nobody is held who has no date"
    assert seen > 500


def test_a_date_lies_ahead() -> None:
    with pytest.raises(ValueError, match="0 steps from now"):
        Calendar(GEOMETRY, LENGTHS).look_in(0, None, SimpleNamespace(order=1, look_at=0))


def test_the_benchmark_of_steps_runs(tmp_path: Path) -> None:
    """Small, and with what it says about itself."""
    out = tmp_path / "steps.json"
    assert steps.main(["--requests", "3", "9", "--steps", "20", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["command"].startswith("python -m kara_sglang.benchmarks.steps --requests 3 9")
    assert [row["case"] for row in result["rows"]] == list(steps.CASES)
    assert all(0 < us < 1e6 for row in result["rows"] for us in row["us"])
