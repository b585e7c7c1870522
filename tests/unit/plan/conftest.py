"""Fixtures of this room."""

from __future__ import annotations

import json

import pytest
from models import GEMMA_3, GPT_OSS, QWEN3_8B


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


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Likewise, of one whose sliding-window layers have a KV pool of their own."""
    folder = tmp_path_factory.mktemp("gpt-oss-20b")
    (folder / "config.json").write_text(json.dumps(GPT_OSS))
    return str(folder)
