"""Trace files: what is written is read, and what is no trace is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import WIDTH, assert_same, some_trace, split

from kara_sglang.trace import format as trace_format
from kara_sglang.trace.command import main
from kara_sglang.trace.format import TraceError


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """All fields and arrays, and nothing else is left in the folder."""
    trace = some_trace(rid="π/1 <b>", finish="abort", retractions=2)
    path = trace_format.save(trace, tmp_path)
    assert_same(trace_format.load(path), trace)
    assert list(tmp_path.iterdir()) == [path]
    with np.load(path) as arrays:
        bits = np.unpackbits(trace.bits, axis=-1, bitorder="little")[..., :WIDTH]
        assert arrays["mean"] == pytest.approx(bits.mean(axis=(1, 2)))


def test_no_file_is_replaced(tmp_path: Path) -> None:
    """A request with an id that was used before, or that looks like another's file, has its own."""
    rids = ["a_b", "a/b", f"a_b-{trace_format.file_name('a_b')[4:-4]}", "a_b", "a_b"]
    traces = [some_trace(rid=rid, seed=seed) for seed, rid in enumerate(rids)]
    paths = [trace_format.save(trace, tmp_path) for trace in traces]
    assert sorted(tmp_path.iterdir()) == sorted(set(paths)) and len(set(paths)) == 5
    for path, trace in zip(paths, traces, strict=True):
        assert_same(trace_format.load(path), trace)
    assert [path.name.endswith(f"-{paths[0].name}") for path in paths] == [False] * 3 + [True] * 2


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    """Whoever else may write into the folder cannot make the server write elsewhere."""
    victim, folder = tmp_path / "victim", tmp_path / "traces"
    victim.write_text("precious")
    folder.mkdir()
    name = trace_format.file_name("r")
    for planted in (name, f".{name}.tmp"):
        (folder / planted).symlink_to(victim)
    path = trace_format.save(some_trace(rid="r"), folder)
    assert victim.read_text() == "precious" and (folder / name).is_symlink()
    assert_same(trace_format.load(path), some_trace(rid="r"))
    assert path.stat().st_mode & 0o077 == 0, "others may read it"


def test_a_reader_sees_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that breaks off changes nothing and leaves nothing behind."""
    old = some_trace()
    path = trace_format.save(old, tmp_path)

    def broken(out: Any, **_arrays: Any) -> None:
        out.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match="No space"):
        trace_format.save(some_trace(seed=1), tmp_path)
    assert_same(trace_format.load(path), old)
    assert list(tmp_path.iterdir()) == [path]


@given(st.text(max_size=300))
def test_file_names_are_safe(rid: str) -> None:
    """Whatever a client calls its request, the file lies in the folder, visible, with a short name."""
    name = trace_format.file_name(rid)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,100}-[0-9a-f]{16}\.npz", name)


def test_file_names_tell_requests_and_ranks_apart() -> None:
    rids = ["a/b", "a_b", "a b", "../a", "..", "x" * 100, "x" * 101, "x" * 102, ""]
    assert len({trace_format.file_name(rid) for rid in rids}) == len(rids)
    assert re.fullmatch(r"4fdd-98_X-[0-9a-f]{16}\.npz", trace_format.file_name("4fdd-98_X"))
    assert re.fullmatch(r"r-[0-9a-f]{16}\.tp1\.npz", trace_format.file_name("r", 1, 4))
    assert trace_format.file_name("r", 1, 4)[:18] == trace_format.file_name("r", 0, 4)[:18]


def change(path: Path, **arrays: Any) -> None:
    """Write the file anew with some arrays replaced; None leaves one out."""
    with np.load(path) as old:
        merged = dict(old.items()) | arrays
    np.savez(path, **{name: value for name, value in merged.items() if value is not None})


def change_about(path: Path, **fields: Any) -> None:
    with np.load(path) as old:
        about = json.loads(bytes(old["about"])) | fields
    change(path, about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8))


NO_TRACE = "not a trace of --kv-compress-trace"

BAD_FILES: dict[str, tuple[Any, str]] = {
    "absent": (Path.unlink, r"cannot be read \(No such file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), r"cannot be read \(Is a directory"),
    "empty": (lambda p: p.write_bytes(b""), NO_TRACE),
    "text": (lambda p: p.write_text("hello"), NO_TRACE),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-200]), NO_TRACE),
    "bits flipped": (
        lambda p: p.write_bytes(p.read_bytes().replace(b"a-request", b"b-request")),
        NO_TRACE,
    ),
    "one array": (lambda p: np.save(p.open("wb"), np.arange(3)), NO_TRACE),
    "other arrays": (lambda p: np.savez(p, x=np.arange(3)), NO_TRACE),
    "pickled": (lambda p: change(p, windows=np.array([None])), NO_TRACE),
    "no JSON": (lambda p: change(p, about=np.zeros(3, dtype=np.uint8)), NO_TRACE),
    "another format": (lambda p: change_about(p, format="x"), NO_TRACE),
    "a later version": (lambda p: change_about(p, version=3), "version 3; this kara-sglang reads 2"),
    "an earlier version": (lambda p: change_about(p, version=1), "version 1; this kara-sglang reads 2"),
    "an unknown field": (lambda p: change_about(p, colour="red"), NO_TRACE),
    "no bits": (lambda p: change(p, bits=None), NO_TRACE),
    "no windows": (lambda p: change(p, windows=np.empty((0, 5), dtype=int)), "five columns"),
    "unknown voters": (
        lambda p: change(p, windows=np.array([[8, 8, 20, 8, 2], [32, 20, 20, 8, 3]])),
        "nobody knows who chose",
    ),
    "float ids": (lambda p: change(p, output_ids=np.ones(60)), "no list of numbers"),
    "another head": (lambda p: change_about(p, heads=[0, 1, 2]), "do not fit 2 windows and 3 heads"),
    "unequal windows": (
        lambda p: change(p, windows=np.array([[8, 8, 20, 8, 2], [32, 20, 21, 8, 2]])),
        "not as wide",
    ),
    "overlap": (
        lambda p: change(p, windows=np.array([[8, 8, 20, 8, 2], [27, 20, 20, 8, 2]])),
        "overlap or reach",
    ),
    "short text": (lambda p: change(p, output_ids=np.arange(46)), "reach behind the text"),
    "a wrong R": (
        lambda p: change(p, windows=np.array([[8, 8, 20, 8, 2], [32, 20, 20, 9, 2]])),
        "more or fewer tokens",
    ),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_one_clear_line(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and no page."""
    spoil, message = BAD_FILES[what]
    path = trace_format.save(some_trace(), tmp_path)
    spoil(path)
    with pytest.raises(TraceError, match=message):
        trace_format.load(path)
    assert main(["show", str(path)]) == 2
    said = capsys.readouterr()
    [line] = said.err.splitlines()
    assert line.startswith(f"kara_sglang.trace: error: {path}: ") and said.out == ""
    assert not path.with_suffix(".html").exists()


@pytest.mark.parametrize("heads", [[[0], [1]], [[0], [0], [1], [1]]])
def test_ranks_are_put_together(heads: list[list[int]], tmp_path: Path) -> None:
    """In any order; a head that several ranks hold counts once."""
    whole = some_trace()
    parts = split(whole, heads)
    paths = [trace_format.save(part, tmp_path) for part in parts]
    assert len(set(paths)) == len(parts)
    merged = trace_format.merge([trace_format.load(path) for path in reversed(paths)])
    assert merged.about.heads == [0, 1]
    assert np.array_equal(merged.bits, whole.bits)
    assert trace_format.merge([whole]).about == whole.about


def test_ranks_of_different_requests_are_not_put_together() -> None:
    one, two = split(some_trace(), [[0], [1]])
    others = [
        dataclasses.replace(two, about=dataclasses.replace(two.about, rid="another")),
        dataclasses.replace(two, output_ids=two.output_ids + 1),
        dataclasses.replace(two, windows=two.windows + np.array([1, 0, 0, 0, 0])),
        dataclasses.replace(two, bits=two.bits[:, 1:]),
    ]
    for other in others:
        with pytest.raises(TraceError, match="not of one request"):
            trace_format.merge([one, other])


def test_the_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    trace_format.prepare_folder("~/new/folder")
    trace_format.prepare_folder(str(tmp_path / "new/folder"))
    assert list((tmp_path / "new/folder").iterdir()) == []


@pytest.mark.parametrize("name", ["a-file", "a-file/below", "/proc/kara-trace", "\0"])
def test_a_folder_that_cannot_be_used_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the flag."""
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    with pytest.raises(ValueError, match="--kv-compress-trace: cannot write to the folder") as caught:
        trace_format.prepare_folder(name)
    assert "\n" not in str(caught.value)
