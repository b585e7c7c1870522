"""Fixtures of this room."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def base(tiny_config: Path) -> list[str]:
    return ["--model-path", str(tiny_config), "--device", "cpu", "--attention-backend", "torch_native"]
