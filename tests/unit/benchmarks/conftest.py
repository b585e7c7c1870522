"""Fixtures of this room."""

from __future__ import annotations

import pytest

from kara_sglang.benchmarks.quality import report
from kara_sglang.benchmarks.quality.instrument import REFERENCE_ROW
from kara_sglang.benchmarks.quality.rows import Part, Row
from kara_sglang.benchmarks.quality.script import (
    Probe,
    Script,
)
from kara_sglang.benchmarks.quality.tasks import Layout


@pytest.fixture
def small_part() -> tuple[Part, list[Script]]:
    rows_ = [
        Row(REFERENCE_ROW, "selectors", None, 1.0, {"window": 64}),
        *(Row(name, "selectors", name, 0.5, {"window": 64}) for name in ("kara", *report.BASELINES)),
        Row("paper", "selectors", "kara", 0.5, {"window": 64, "preset": "paper"}),
    ]
    layout = Layout(64, 1, tail=4)
    scripts = []
    for name in "ab":
        scripts.append(Script(f"t{name}", name, [1] * 32, [5] * 132, [Probe("text", 128, 132, True)]))
        facts = [Probe("pair", 130, 131, offset=0.5, back=b) for b in (1, 0)]
        scripts.append(Script(f"r{name}", name, [1] * 32, [5] * 132, facts))
    return Part("small", rows_, layout, layout, None), scripts
