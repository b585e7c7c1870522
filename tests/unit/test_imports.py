"""What the parts of the house import of each other, read off the source, types included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = "kara_sglang."


def imports(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, wherever in it; ``from kara_sglang import x`` is x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix(OURS) for name in names if name.startswith(OURS))


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("kernels", ("kernels.",)),
        # A row's state names the type of its recorder.
        ("radix_integration", ("radix_integration.", "kernels.", "recorder.Recorder")),
    ],
)
def test_what_a_folder_imports(folder: str, allowed: tuple[str, ...]) -> None:
    found = {(path.name, name) for path in (ROOT / folder).rglob("*.py") for name in imports(path)}
    assert found
    assert not sorted((path, name) for path, name in found if not name.startswith(allowed))
