"""``python -m kara_sglang.trace show FILE [--with FILE]``: a page of which tokens windows kept."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path

from kara_sglang.trace import tokens, viewer
from kara_sglang.trace.format import Trace, TraceError, load, merge
from kara_sglang.trace.pair import pair


def text_of(trace: Trace, tokenizer: str | None) -> tuple[list[str], str]:
    """The text of each token, and a line where it could not be had and ids stand in for it.

    Raises
    ------
    ValueError
        Where the ``tokenizer`` that the user asked for cannot be loaded.
    """
    ids = [*trace.prompt_ids.tolist(), *trace.output_ids.tolist()]
    try:
        return tokens.pieces(tokens.load_tokenizer(tokenizer or trace.about.tokenizer), ids), ""
    except ValueError as error:
        if tokenizer is not None:
            raise ValueError(f"--tokenizer: {error}") from None
        return tokens.numbers(ids), f"{error}; token ids are shown, name a tokenizer with --tokenizer"


def show(files: list[Path], others: list[Path], out: Path, tokenizer: str | None) -> None:
    """Write the page of a request's trace to ``out``, with that of ``others`` beside it if given."""
    trace = merge([load(file) for file in files])
    both = pair(trace, merge([load(file) for file in others])) if others else None
    texts, notice = text_of(both.common[0] if both else trace, tokenizer)
    if notice:
        print(f"kara_sglang.trace: {notice}", file=sys.stderr)
    html = viewer.render_pair(both, texts, notice) if both else viewer.render(trace, texts, notice)
    try:
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise TraceError(f"{out}: cannot be written ({error.strerror or error})") from None


def main(argv: list[str] | None = None) -> int:
    """0, or 2 and one line where no page could be made."""
    parser = argparse.ArgumentParser(
        prog="python -m kara_sglang.trace", description="Looks at the files of --kv-compress-trace."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="show", help="the command")
    command = commands.add_parser("show", help="make an HTML page of a request's trace")
    command.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        type=Path,
        help="a request's file; with tensor parallelism, the files of its ranks",
    )
    command.add_argument(
        "--with",
        dest="others",
        metavar="FILE",
        nargs="+",
        type=Path,
        default=[],
        help="another request's file, or those of its ranks: compare as far as both texts are the same",
    )
    command.add_argument("--out", type=Path, metavar="PAGE", help="default: FILE with the ending .html")
    command.add_argument(
        "--tokenizer", metavar="PATH", help="folder or hub name; default: the one that the server used"
    )
    command.add_argument("--open", action="store_true", help="open the page in a browser")
    options = parser.parse_args(argv)
    out = options.out or options.files[0].with_suffix(".html")
    try:
        show(options.files, options.others, out, options.tokenizer)
    except ValueError as error:
        print(f"kara_sglang.trace: error: {error}", file=sys.stderr)
        return 2
    print(out)
    if options.open:
        webbrowser.open(out.resolve().as_uri())
    return 0
