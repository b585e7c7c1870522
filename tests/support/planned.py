"""What the plan says, as its own JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kara_sglang.plan.command import main

LOAD = ("--prompt", "1000", "--answer", "8000", "--running", "128")


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code = main([*argv, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)
