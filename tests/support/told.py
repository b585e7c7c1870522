"""Commands that the documents tell to run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from places import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FORM = re.compile(
    r"(?:\w+=\S+ )*(?:python -m ([\w.]+)|(python -)(?= )|(make [\w-]+)"
    r"|(curl|docker|git|pip install|pytest|systemctl|twine)\b)"
)
"""How a command begins; one group is the program."""


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """Programs and whole lines: those of the page's blocks of shell, and code within its sentences."""
    block, language, within = [], None, []
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            language = None if language is not None else line.strip("`")
        elif language in ("", "bash"):
            block.append(line)
        elif language is None:
            within.append(line)
    blocks = "\n".join(block).replace("\\\n", " ").splitlines()
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", "\n".join(within)))
    for line in (*blocks, *spans):
        if found := FORM.match(line):
            yield next(filter(None, found.groups())), line


def words(line: str) -> list[str]:
    """What stands behind the program's name, without a comment or what the output is piped into."""
    return shlex.split(line.partition(" | ")[0], comments=True)[3:]
