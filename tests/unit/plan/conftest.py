"""Fixtures of this room."""

from __future__ import annotations

import json

import pytest
from models import QWEN3_8B


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a config and no weights."""
    folder = tmp_path_factory.mktemp("qwen3-8b")
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return str(folder)
