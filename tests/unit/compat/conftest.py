"""Fixtures of this room: wheels of SGLang with one module, and tables for them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kara_sglang import hooks
from kara_sglang.compat import surface
from kara_sglang.compat.surface import Used
from kara_sglang.hooks import Hook

FLAGS = "launcher.flags:from_cli_args"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small tables in place of the real ones."""
    one = Hook("things.Thing.hooked", "after", ("self", "one"), FLAGS, "why", "gone")
    old = Hook("things.aside", "after", ("one",), FLAGS, "why", "gone")
    new = Hook("things.Thing.fresh", "after", ("self",), FLAGS, "why", "gone", (old,))
    monkeypatch.setattr(hooks, "CLI_HOOKS", (one,))
    monkeypatch.setattr(hooks, "LAUNCHER_HOOKS", ())
    monkeypatch.setattr(hooks, "SCHEDULER_HOOKS", (new,))
    monkeypatch.setattr(hooks, "PREFILL_HOOKS", ())
    monkeypatch.setattr(hooks, "ALL_HOOKS", (one, new))
    uses = (
        Used("things.Thing", ("called(*, key)", "size")),
        Used("things.Thing", ("shared()",), sharing=True),
    )
    monkeypatch.setattr(surface, "SURFACE", uses)


@pytest.fixture
def wheel(tmp_path: Path) -> Callable[..., Path]:
    """Makes a wheel of SGLang with one module."""

    def make(number: str, code: str) -> Path:
        path = tmp_path / f"sglang-{number}-cp311-cp311-manylinux_2_34_x86_64.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("sglang/__init__.py", "raise RuntimeError('never imported')")
            archive.writestr("sglang/srt/things.py", code)
        return path

    return make
