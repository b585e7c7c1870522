"""Documents with tables of committed results in them, so that no figure is typed by hand.

A table stands between the lines ``<!-- KIND:NAME -->`` and ``<!-- end of KIND -->``; whoever owns the
kind says what the name means. Of some kinds there is one table, without a name.
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
        Returns the table that a name stands for, "" where there is none, with its last line's end; None
        leaves it as it is.
    """

    def replace(match: re.Match[str]) -> str:
        made = body(match["name"] or "")
        return match[0] if made is None else f"{match['begin']}\n{made}{end}"

    end = f"<!-- end of {kind} -->"
    begin = rf"(?P<begin><!-- {kind}(?::(?P<name>[^\n]+?))? -->)"
    return re.sub(rf"{begin}\n.*?{end}", replace, document, flags=re.DOTALL)


def rewrite(
    documents: Iterable[Path], render: Callable[[str], str], parser: argparse.ArgumentParser
) -> None:
    """Render each document in place; what stands in the way ends the program in one line."""
    for path in documents:
        try:
            path.write_text(render(path.read_text()))
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
