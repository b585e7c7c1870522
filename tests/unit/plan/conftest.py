"""Fixtures of this room."""

from __future__ import annotations

import json

import pytest
from models import GEMMA_3, QWEN3_8B


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a config and no weights."""
    folder = tmp_path_factory.mktemp("qwen3-8b")
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return str(folder)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Likewise, of a model with sliding-window layers."""
    folder = tmp_path_factory.mktemp("gemma-3-12b")
    (folder / "config.json").write_text(json.dumps(GEMMA_3))
    return str(folder)
