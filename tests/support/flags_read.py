"""Reading flags, for tests."""

from __future__ import annotations

import pytest


def failed_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that ``flags.fail`` prints."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("kv-compress: error: ")
    return captured.err
