"""What is said of versions of SGLang, and what ``python -m kara_sglang.compat`` reads in a wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from places import ROOT

from kara_sglang import hooks
from kara_sglang.compat import command, report, surface, versions
from kara_sglang.compat.source import Source
from kara_sglang.compat.surface import Used
from kara_sglang.config import KaraConfig
from kara_sglang.hooks import Hook
from kara_sglang.scheduler import runtime

ALLOWED = KaraConfig(untested_sglang=True)


# -- versions --------------------------------------------------------------------------------------


def test_the_installed_sglang_is_a_tested_one() -> None:
    """The tests run against a version that the plugin names."""
    assert versions.of_version(KaraConfig()) == []


@pytest.mark.parametrize("installed", [*versions.TESTED, "0.5.23+cu130"])
def test_a_tested_version_is_served(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda _name: installed)
    assert versions.of_version(KaraConfig()) == versions.of_version(ALLOWED) == []


@pytest.mark.parametrize("installed", ["0.5.21", "0.5.9", "0.5.22rc1", "0.4.10.post2"])
def test_an_older_version_is_refused_whatever_is_allowed(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "version", lambda _name: installed)
    [line] = versions.of_version(KaraConfig())
    assert line == (
        f"SGLang {installed} is installed, --kv-compress was tested with 0.5.22 and 0.5.23: "
        "pip install sglang==0.5.23"
    )
    assert versions.of_version(ALLOWED) == [line]


@pytest.mark.parametrize("installed", ["0.5.24", "0.5.100", "0.5.23.post1", "0.6", "0.5.24.dev3+gabc"])
def test_a_newer_version_is_served_behind_a_key(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "version", lambda _name: installed)
    [line] = versions.of_version(KaraConfig())
    assert f"python -m kara_sglang.compat {installed}" in line
    assert line.endswith("start with --kv-compress-config '{\"untested_sglang\": true}'")
    assert versions.of_version(ALLOWED) == []


def test_the_package_names_the_same_versions() -> None:
    """The extra that installs SGLang, and the CPU engine's list."""
    oldest, newest = versions.TESTED[0], versions.NEWEST
    assert f'sglang = ["sglang>={oldest},<={newest}"]' in (ROOT / "pyproject.toml").read_text()
    listed = (ROOT / "kara_sglang/cpu_engine/requirements-nodeps.txt").read_text()
    assert f"\nsglang=={newest}\n" in listed


# -- where releases differ -------------------------------------------------------------------------


class Batch:
    """What a pass sees of SGLang's running batch."""

    def __init__(self, finished: list[bool]) -> None:
        self.reqs = finished
        self.batch_is_full = True
        self.looks = 0

    def batch_size(self) -> int:
        return len(self.reqs)

    def filter_batch(self) -> None:
        self.looks += 1
        self.reqs = [finished for finished in self.reqs if not finished]


@pytest.mark.parametrize("coordinator", [True, False])
@pytest.mark.parametrize("finished, left", [([False, False], 2), ([True, False], 1), ([True, True], 0)])
def test_a_pass_sees_no_finished_request(
    finished: list[bool], left: int, coordinator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows may belong to others by now. Who waits for their place is let in; without compression
    the batch is SGLang's own affair. A step in which nobody has left looks at nobody."""
    passes = []
    seen = types.SimpleNamespace(
        before_decode=lambda batch: passes.append(len(batch.reqs)), row_freed=lambda _req: None
    )
    monkeypatch.setattr(runtime, "runtime", runtime.Runtime(coordinator=seen if coordinator else None))
    batch = Batch(finished)
    for req in filter(None, finished):
        runtime.before_free_row(None, req)
    runtime.before_update_running_batch(None, batch)
    runtime.before_update_running_batch(None, batch)
    if coordinator:
        assert passes == ([left, left] if left else [])
        assert batch.batch_is_full == (left == len(finished))
        assert batch.looks == any(finished)
    else:
        assert passes == [] and batch.reqs == finished and batch.batch_is_full


# -- a wheel ---------------------------------------------------------------------------------------


FLAGS = "launcher.flags:from_cli_args"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small tables in place of the real ones."""
    one = Hook("things.Thing.hooked", "after", ("self", "one"), FLAGS, "why", "gone")
    old = Hook("things.aside", "after", ("one",), FLAGS, "why", "gone")
    new = Hook("things.Thing.fresh", "after", ("self",), FLAGS, "why", "gone", (old,))
    shared = Hook("things.Thing.shared", "after", ("self",), FLAGS, "why", "gone")
    monkeypatch.setattr(hooks, "CLI_HOOKS", (one,))
    monkeypatch.setattr(hooks, "LAUNCHER_HOOKS", ())
    monkeypatch.setattr(hooks, "SCHEDULER_HOOKS", (new,))
    monkeypatch.setattr(hooks, "SHARING_HOOKS", (shared,))
    monkeypatch.setattr(hooks, "ALL_HOOKS", (one, new, shared))
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


CODE = '''\
class Thing:
    size: int = 0
    def hooked(self, one):
        """Says what it is."""
        a = one
        b = a
        return b
    def called(self, *, key):
        return key
    def shared(self): ...
    def fresh(self): ...
'''
# The same code with comments, a docstring of other words and another layout.
SAME = (
    CODE.replace('"""Says what it is."""', '"""Says it\n        better."""')
    .replace("        b = a\n", "        b = (  # why\n            a\n        )\n")
    .replace("def shared(self): ...", "def shared(self):\n        ...")
)
OTHER = CODE.replace("        b = a\n", "        b = a + 1\n        print(b)\n")
OLD = CODE.replace("    def fresh(self): ...\n", "") + "def aside(one): ...\n"
WITHOUT = CODE.replace("    size: int = 0\n", "")
UNSHARED = CODE.replace("    def shared(self): ...\n", "")


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
def test_code_that_changed_is_counted_in_lines(wheel: Callable[..., Path]) -> None:
    """Comments, docstrings and layout are no changes."""
    base = Source.wheel(wheel("0.5.20", CODE))
    same = report.compare(Source.wheel(wheel("0.5.24", SAME)), base)
    assert same.hooks.changes == same.uses.changes == []
    other = report.compare(Source.wheel(wheel("0.5.25", OTHER)), base)
    assert other.hooks.changes == [report.Change("things.Thing.hooked", 2)]
    assert "changed  hook  things.Thing.hooked: 2 lines" in str(other).splitlines()
    key = CODE.replace("return key", "return [key]")
    called = report.compare(Source.wheel(wheel("0.5.26", key)), base)
    assert called.uses.changes == [report.Change("things.Thing.called", 1)]
    assert called.hooks.changes == []


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
        "| 0.5.25 | 1 | 0 | 1 | 0 | likely | broken |",
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


def test_the_installed_sglang_against_itself() -> None:
    """Both tables fit as they do when a server starts, and no code differs."""
    made = report.compare(Source.installed(), Source.installed())
    assert made.verdict == made.exact == report.SUPPORTED
    assert made.hooks.changed == made.uses.changed == "0"
    assert made.hooks.unfit == hooks.problems() == []


def test_the_documents_table_is_of_these_tables() -> None:
    """A row per release, as the command's `--markdown` has it: tested ones lack nothing."""
    text = (ROOT / "docs" / "upgrading-sglang.md").read_text()
    rows = re.findall(r"^\| (0\.5\.\d+) \| (.*) \|$", text, re.MULTILINE)
    numbers = [number for number, _ in rows]
    assert numbers == sorted(numbers) and set(versions.TESTED) <= set(numbers)
    cells = {number: [cell.strip() for cell in rest.split("|")] for number, rest in rows}
    for number, row in cells.items():
        tested = number in versions.TESTED
        assert (row[0] == row[2] == "0") == tested, number
        assert row[4] == row[5] == (report.SUPPORTED if tested else report.BROKEN), number
    header = re.search(r"^\| SGLang \|.*\n\|.*\n", text, re.MULTILINE)
    assert header is not None and header[0] == report.markdown([])
