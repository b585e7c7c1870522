"""``python -m kara_sglang.compat``: wheels, versions, its table, and its one-line errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from releases import CODE, OLD, OTHER, UNSHARED, WITHOUT

from kara_sglang.compat import command


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    "number, code, last, exact, compressed",
    [
        ("0.5.23", CODE, "supported", "supported", "supported"),
        ("0.5.24", CODE, "likely", "likely", "likely"),
        ("0.5.24", OTHER, "likely", "likely", "likely"),
        ("0.5.24", OLD, "likely", "likely", "likely"),
        ("0.5.24", WITHOUT, "broken", "broken", "broken"),
        ("0.5.24", UNSHARED, "broken", "likely", "broken"),
        ("0.5.22", UNSHARED, "broken", "supported", "broken"),
        ("0.5.24", "", "broken", "broken", "broken"),
    ],
)
def test_the_verdict_on_a_wheel(
    number: str,
    code: str,
    last: str,
    exact: str,
    compressed: str,
    wheel: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing of it is imported. Only what is broken is an exit code."""
    against = wheel("0.5.20", CODE)
    assert command.main([str(wheel(number, code)), "--against", str(against)]) == (last == "broken")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"SGLang {number}" and lines[-1].startswith(f"{last}: ")
    assert lines[-2] == f"exact prefixes: {exact}; compressed prefixes: {compressed}"


@pytest.mark.usefixtures("tables")
def test_several_releases_make_a_table(
    wheel: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = wheel("0.5.23", CODE)
    paths = [str(wheel("0.5.24", OTHER)), str(wheel("0.5.25", UNSHARED)), str(base)]
    assert command.main([*paths, "--against", str(base), "--markdown"]) == 1
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [
        "| 0.5.24 | 0 | 1 (2 lines) | 0 | 0 | likely | likely |",
        "| 0.5.25 | 0 | 0 | 1 | 0 | likely | broken |",
        "| 0.5.23 | 0 | 0 | 0 | 0 | supported | supported |",
    ]


def test_what_is_no_wheel_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = tmp_path / "torch-2.0-py3-none-any.whl"
    strange.write_bytes(b"PK")
    for path in (strange, tmp_path / "sglang-1.0-none.whl"):
        assert command.main([str(path)]) == 2
        assert capsys.readouterr().err == f"kara_sglang.compat: {path} is no wheel of SGLang\n"


def test_a_version_is_fetched_by_pip_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, wheel: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its dependencies; what pip says last is the reason where it fails."""
    commands = []

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(words[1:])
        if words[-1].endswith("9.9"):
            return subprocess.CompletedProcess(words, 1, "", "noise\nERROR: no such version\n\n")
        folder = Path(words[words.index("--dest") + 1])
        made = wheel("0.5.30", CODE)
        made.rename(folder / made.name)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(command.subprocess, "run", run)
    installed = version("sglang")
    # The tables are the real ones, and this wheel has nothing of them.
    assert command.main(["0.5.30", "latest", "--against", installed]) == 1
    assert [words[-1] for words in commands] == ["sglang==0.5.30", "sglang"]
    assert all("--no-deps" in words and "download" in words for words in commands)
    capsys.readouterr()
    assert command.main(["9.9", "--against", installed]) == 2
    error = capsys.readouterr().err
    assert error == "kara_sglang.compat: pip cannot fetch sglang==9.9: ERROR: no such version\n"


def test_a_machine_without_torch_and_sglang_can_ask() -> None:
    """A scheduled check installs this package only."""
    code = "import sys, kara_sglang.compat.__main__; print({'torch', 'sglang'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
