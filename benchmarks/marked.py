"""Documents with tables of committed results in them, so that no figure is typed by hand.

A table stands between the lines ``<!-- KIND:NAME -->`` and ``<!-- end of KIND -->``; whoever owns the
kind says what the name means.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path


def fill(document: str, kind: str, body: Callable[[str], str | None]) -> str:
    """``document`` with the tables of one kind made anew.

    Parameters
    ----------
    document : str
    kind : str
    body : callable
        Returns the table that a name stands for, with its last line's end; None leaves it as it is.
    """

    def replace(match: re.Match[str]) -> str:
        made = body(match["name"])
        return match[0] if made is None else f"<!-- {kind}:{match['name']} -->\n{made}{end}"

    end = f"<!-- end of {kind} -->"
    return re.sub(rf"<!-- {kind}:(?P<name>[^\n]+?) -->\n.*?{end}", replace, document, flags=re.DOTALL)


def rewrite(
    documents: Iterable[Path], render: Callable[[str], str], parser: argparse.ArgumentParser
) -> None:
    """Render each document in place; what stands in the way ends the program in one line."""
    for path in documents:
        try:
            path.write_text(render(path.read_text()))
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
