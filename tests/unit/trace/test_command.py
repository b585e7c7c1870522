"""The command that shows a trace."""

from __future__ import annotations

import dataclasses
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from traces import cut, marks, some_trace, split

from kara_sglang.trace import format as trace_format
from kara_sglang.trace import tokens, viewer
from kara_sglang.trace.command import main
from kara_sglang.trace.pair import pair


def test_show_writes_the_page_beside_the_file(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the text that the server's tokenizer gives, and nothing to complain about."""
    text = "The quick brown fox jumps over the lazy dog. " * 2
    trace = some_trace(tokenizer=str(byte_tokenizer))
    ids = np.frombuffer(text.encode(), dtype=np.uint8)[:65].astype(np.int64)
    path = trace_format.save(
        dataclasses.replace(trace, prompt_ids=ids[:5], output_ids=ids[5:]), tmp_path
    )
    assert main(["show", str(path)]) == 0
    said = capsys.readouterr()
    page = path.with_suffix(".html")
    assert page.parent == tmp_path and said.out == f"{page}\n" and said.err == ""
    html = page.read_text()
    shown = re.sub(r"<h2>.*?</h2>|<[^>]*>|\n", "", html.split("<article>")[1].split("</article>")[0])
    assert unescape(shown) == text[:65]


def test_show_without_the_tokenizer_says_so(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Token ids, one line in the terminal and on the page; --tokenizer is the way out."""
    path, out = trace_format.save(some_trace(), tmp_path), tmp_path / "other.html"
    assert main(["show", str(path), "--out", str(out)]) == 0
    said = capsys.readouterr()
    [line] = said.err.splitlines()
    assert "/models/nowhere cannot be loaded" in line and "--tokenizer" in line
    html = out.read_text()
    assert "token ids are shown" in html and marks(html)[0][0][1] == "103 "
    assert main(["show", str(path), "--tokenizer", str(byte_tokenizer)]) == 0
    assert capsys.readouterr().err == ""
    assert marks(path.with_suffix(".html").read_text())[0][0][1] == "g"


def test_show_does_not_replace_a_tokenizer_that_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trace_format.save(some_trace(), tmp_path)
    assert main(["show", str(path), "--tokenizer", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "error: --tokenizer: " in line
    assert not path.with_suffix(".html").exists()


def test_show_where_nothing_can_be_written(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trace_format.save(some_trace(tokenizer=str(byte_tokenizer)), tmp_path)
    assert main(["show", str(path), "--out", str(tmp_path / "absent" / "x.html")]) == 2
    assert "x.html: cannot be written (No such file" in capsys.readouterr().err


def test_show_opens_the_page(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    trace = some_trace(tokenizer=str(byte_tokenizer))
    paths = [str(trace_format.save(part, tmp_path)) for part in split(trace, [[0], [1]])]
    assert main(["show", *paths, "--open"]) == 0
    assert opened == [Path(paths[0]).with_suffix(".html").as_uri()]


def test_show_with_another_trace(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of all ranks on both sides; the page lies beside the first file."""
    left = some_trace(tokenizer=str(byte_tokenizer))
    right = cut(some_trace(seed=1, rid="b", selector="recent", tokenizer=str(byte_tokenizer)), 60)
    files = [
        [str(trace_format.save(part, tmp_path)) for part in split(t, [[0], [1]])] for t in (left, right)
    ]
    assert main(["show", *files[0], "--with", *files[1]]) == 0
    said = capsys.readouterr()
    assert said.out == f"{Path(files[0][0]).with_suffix('.html')}\n" and said.err == ""
    both = pair(left, right)
    texts = tokens.pieces(tokens.load_tokenizer(str(byte_tokenizer)), [*range(5), *range(100, 155)])
    assert Path(said.out.strip()).read_text() == viewer.render_pair(both, texts)


def test_show_with_a_trace_of_another_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, no page."""
    files = [trace_format.save(t, tmp_path) for t in (some_trace(), cut(some_trace(rid="b"), 9))]
    assert main(["show", str(files[0]), "--with", str(files[1])]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("kara_sglang.trace: error: the texts part at token 9, ")
    assert not files[0].with_suffix(".html").exists()
