"""What is said of a release of SGLang: which hooks and uses fit, and whose code has changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT
from releases import CODE, OTHER, SAME

from kara_sglang import hooks
from kara_sglang.compat import report, versions
from kara_sglang.compat.source import Source


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
