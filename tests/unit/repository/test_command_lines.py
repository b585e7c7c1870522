"""Each program says how it is called and what its options mean, and refuses a bad value in one line."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import told
from places import ROOT

ALONE = {"kara_sglang.benchmarks.gpu.kit.assemble"}
"""Run by its path, before anything is installed."""


def programs() -> Iterator[str]:
    """Modules that are run and read options."""
    for path in sorted((ROOT / "kara_sglang").rglob("*.py")) + [
        path
        for room in ("benchmarks", "frontend", "kernels", "radix_integration")
        for path in sorted((ROOT / room).rglob("*.py"))
    ]:
        text = path.read_text()
        if path.name == "__main__.py" and (beside := path.with_name("command.py")).exists():
            text += beside.read_text()
        parses = "ArgumentParser(" in text or "command_line.parser(" in text
        if parses and 'if __name__ == "__main__"' in text:
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if parts[0] == "kara_sglang" else ("kara_sglang", *parts))
            yield name.removesuffix(".__main__")


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """As ``python -m`` does, in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__")
    return ended.value.code


def unexplained(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Options without a word on them, those of sub-commands included."""
    for action in parser._actions:
        if not action.help:
            yield action.dest
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from unexplained(command)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", list(programs()))
def test_help_says_how_it_is_called_and_what_options_mean(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def remember(parser: argparse.ArgumentParser, file: object = None) -> None:
        shown.append(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", remember)
    assert run(name, ["--help"], monkeypatch) == 0
    (parser,) = shown
    assert name in ALONE or parser.prog == f"python -m {name}"
    assert parser.description
    assert not list(unexplained(parser))


SEARCH = "kara_sglang.benchmarks.research.search"
REGIMES = "kara_sglang.benchmarks.quality.regimes"
TABLES = "kara_sglang.benchmarks.research.tables"
PLAN = ("kara_sglang.plan", "--model M --gpu-memory 80 --prompt 9 --answer 9 --running 1")
BAD = (
    (*PLAN, "--prompt 0", "'0' is not a whole number above 0"),
    (*PLAN, "--tp 0", "'0' is not a whole number above 0"),
    (*PLAN, "--gpu-memory -5", "'-5' is not a number above 0"),
    (*PLAN, "--weights-gb x", "'x' is not a number above 0"),
    ("kara_sglang.benchmarks.steps", "", "--requests 0", "'0' is not a whole number, 1 or more"),
    ("kara_sglang.benchmarks.steps", "", "--steps 900", "'900' is not a whole number from 1 to 502"),
    ("kara_sglang.benchmarks.gpu.host", "", "--repeats x", "'x' is not a whole number"),
    ("kara_sglang.benchmarks.reuse.match", "", "--repetitions 0", "'0' is not a whole number"),
    ("kara_sglang.benchmarks.serving", "", "--model /not/there", "there is no model folder /not/there"),
    ("kara_sglang.benchmarks.serving", "", "--resident -1", "'-1' is not a whole number"),
    ("kara_sglang.benchmarks.serving", "", "--dtype x", "invalid choice: 'x'"),
    ("kara_sglang.benchmarks.serving", "", "--window 10", "--window 10 is no multiple of --page-size"),
    ("kara_sglang.benchmarks.serving", "", "--slowdown 0", "'0' is not a number above 0"),
    ("kara_sglang.benchmarks.serving", "", "--rows x", "--rows: x unknown"),
    ("kara_sglang.benchmarks.quality", "--out O", "--model /not/there", "is not a model's folder"),
    ("kara_sglang.benchmarks.quality", "--out O", "--shares 3", "'3' is not a share"),
    ("kara_sglang.benchmarks.quality", "--out O", "--texts 0", "'0' is not a whole number"),
    ("kara_sglang.benchmarks.quality", "--out O", "--rows x", "--rows x: there is full, "),
    (TABLES, "--out O", "--texts 2", "give --quick, --part main or --part windows"),
    (REGIMES, "--out O", "--first -1", "'-1' is not a whole number, 0 or more"),
    (SEARCH, "--out O", "x", "no row x; there are "),
    (SEARCH, "--out O", "kara:x=1", "unknown 'x'; known: power, "),
    (SEARCH, "--out O", "kara:chunks=x", "could not convert string to float: 'x'"),
    (SEARCH, "--out O", "--retain 3", "'3' is not a share"),
    (SEARCH, "--out O", "--window 10", "--window 10 is no multiple of 16"),
    (SEARCH, "--out O", "--model /not/there", "is not a model's folder"),
    (SEARCH, "", "--show /not/there", "there is no file /not/there"),
    (SEARCH, "", f"--show {ROOT / 'README.md'}", "is no file that --out has written"),
    (SEARCH, "", "--into /not/there", "there is no file /not/there"),
)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(("name", "given", "bad", "says"), BAD)
def test_a_bad_value_is_one_line(
    name: str,
    given: str,
    bad: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """And is refused before anything is written."""
    monkeypatch.chdir(tmp_path)
    assert run(name, [*given.split(), *bad.split()], monkeypatch) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


class Read(Exception):
    """A program has read its options."""


def ending(method: str) -> Callable[..., Any]:
    """This method of a parser, with which the program ends."""
    parse = getattr(argparse.ArgumentParser, method)

    def read(*args: Any) -> Any:
        options = parse(*args)
        if sys._getframe(1).f_globals["__name__"] == "argparse":
            return options  # a part of the whole
        raise Read

    return read


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    ("name", "line"),
    sorted(
        {(p, line) for page in told.PAGES for p, line in told.commands(page) if "kara_sglang." in p}
    ),
)
def test_programs_take_what_the_documents_say(
    name: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether a test runs them or not."""
    for folder in ("MODEL", "FOLDER", "Qwen2.5-Coder-1.5B-Instruct"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").touch()
    (tmp_path / "test.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *told.words(line)])
    for method in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, ending(method))
    with pytest.raises(Read):
        runpy.run_module(name, run_name="__main__")
