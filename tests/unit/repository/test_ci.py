"""``.ci/run``: the browser is installed where it is missing, and nothing is skipped in silence."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

TOOLS = ("bash", "cat", "dirname", "env", "grep", "id", "mktemp", "rm", "sed", "tail", "tee")


def stub(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder of commands that stands for the whole machine; no browser is among them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    calls = tmp_path / "calls"
    stub(folder, "apt-get", f'echo "apt-get $*" >> {calls}')
    stub(folder, "sudo", '"$@"')
    stub(folder, "make", f'echo "make $* skips=$KARA_TESTS_NO_SKIPS" >> {calls}; echo 7 passed')
    return folder


def run(tools: Path, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    done = subprocess.run(
        [ROOT / ".ci" / "run"], env={"PATH": str(tools)} | environment, capture_output=True, text=True
    )
    return done, (tools.parent / "calls").read_text().splitlines()


def test_the_browser_is_installed_where_there_is_none(tools: Path) -> None:
    done, calls = run(tools)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "7 passed"
    assert calls[0] == "apt-get update -qq"
    assert calls[1].startswith("apt-get install") and calls[1].endswith(" chromium")
    assert calls[2:] == ["make test skips=1"]


@pytest.mark.parametrize("name", ["chromium", "google-chrome"])
def test_a_browser_that_is_there_will_do(name: str, tools: Path) -> None:
    stub(tools, name, "")
    assert run(tools)[1] == ["make test skips=1"]


def test_the_core_on_another_sglang_needs_no_browser(tools: Path) -> None:
    assert run(tools, SGLANG="0.5.22")[1] == ["make test-sglang VERSION=0.5.22 skips=1"]


def test_without_a_browser_the_tests_run_and_fail(tools: Path) -> None:
    """That is for pytest to say, with the tests' names; the exit code is its own."""
    stub(tools, "apt-get", "exit 100")
    error = "make: *** [Makefile:63: test] Error 1"
    stub(
        tools,
        "make",
        f'echo "make" >> {tools.parent / "calls"}; echo "1 failed"; echo "{error}"; exit 2',
    )
    done, calls = run(tools)
    assert calls == ["make"] and done.returncode == 1
    assert done.stdout.splitlines()[-1] == "1 failed"


@pytest.mark.parametrize("strict", [False, True])
def test_a_skipped_test_fails_where_it_must_not(strict: bool, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_tool(): pytest.importorskip('no_such_module', reason='pip install it')\n"
        "@pytest.mark.skipif(True, reason='no browser')\n"
        "def test_browser(): pass\n"
        "@pytest.mark.xfail\n"
        "def test_expected(): assert False\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "KARA_TESTS_NO_SKIPS"}
    if strict:
        environment["KARA_TESTS_NO_SKIPS"] = "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        tmp_path,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    counts = "1 failed, 1 passed, 1 xfailed, 1 error" if strict else "1 passed, 2 skipped, 1 xfailed"
    assert counts in done.stdout, done.stdout
    assert done.returncode == int(strict)
    if strict:
        assert "the test was not run: Skipped: no browser" in done.stdout


@pytest.mark.parametrize(
    ("target", "packages"),
    [("sglang-0", "sglang==0"), ("triton-0", "triton==0 'numpy<2.4'")],
)
def test_another_release_comes_into_an_environment_of_its_own(target: str, packages: str) -> None:
    ready = f".venv/{target}/ready"
    done = subprocess.run(["make", "-n", ready], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f'own=$(.venv/{target}/bin/python -c "$purelib")' in done.stdout
    assert f'--no-deps --target "$own" {packages} ' in done.stdout


def test_the_core_for_another_sglang_is_collected_in_its_order() -> None:
    """Folders of tests have modules of one name (conftest): which comes first must not matter."""
    made = subprocess.run(
        ["make", "-n", "test-sglang", "VERSION=0"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    core = made.stdout.split(" -m pytest ")[1].split()
    command = [sys.executable, "-m", "pytest", "-qq", "--collect-only", *core]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_files_that_are_said_to_share_no_server_share_none() -> None:
    """Two workers would start a shared server each."""
    engine = ROOT / "tests" / "engine"
    shared = re.findall(
        r"^def (\w+)\(.*\) -> Iterator\[Server\]:", (engine / "conftest.py").read_text(), re.M
    )
    assert set(shared) >= {"stock", "kara", "compressed", "smollm2"}
    named = re.search(
        r"OWN_SERVERS = \((.*?)^\)", (ROOT / "tests" / "conftest.py").read_text(), re.S | re.M
    )
    files = re.findall(r'"(\w+)"', named[1])
    assert len(files) == 17
    for file in files:
        text = (engine / f"{file}.py").read_text()
        assert not re.search(rf"\b({'|'.join(shared)}): Server", text), file
