"""Traces: bit sets, files, text of tokens, and the page; what a user gets for a bad trace_format."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kara_sglang.config import KaraConfig
from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.radix_integration.row import VOTERS, RequestState, TracedWindow, Window
from kara_sglang.scheduler.tracer import Tracer, bit_sets
from kara_sglang.trace import format as trace_format
from kara_sglang.trace import tokens, viewer
from kara_sglang.trace.__main__ import main
from kara_sglang.trace.format import About, Trace, TraceError
from kara_sglang.trace.pair import pair

LAYERS, HEADS, WIDTH, KEPT = 3, 2, 20, 8


def some_trace(prompt: int = 5, output: int = 60, seed: int = 0, **about: Any) -> Trace:
    """Two windows of 20 tokens with a gap of 4 before the second, 8 kept at random."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros((2, LAYERS, HEADS, WIDTH), dtype=np.uint8)
    chosen[..., :KEPT] = 1
    chosen = rng.permuted(chosen, axis=-1)
    described = {
        "rid": "a-request",
        "finish": "length",
        "retractions": 0,
        "selector": "kara",
        "kept": KEPT,
        "settings": dataclasses.asdict(KaraConfig(window=WIDTH, delay=0)),
        "model": "/models/a-model",
        "tokenizer": "/models/nowhere",
        "tp_rank": 0,
        "tp_size": 1,
        "heads": list(range(HEADS)),
        "num_kv_heads": HEADS,
    }
    return Trace(
        About(**described | about),
        np.arange(prompt),
        np.arange(100, 100 + output),
        np.array([[8, 8, WIDTH, KEPT, 2], [32, 20, WIDTH, KEPT, 0]]),
        np.packbits(chosen, axis=-1, bitorder="little"),
    )


def assert_same(one: Trace, other: Trace) -> None:
    assert one.about == other.about
    for name in ("prompt_ids", "output_ids", "windows", "bits"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


# -- collecting ----------------------------------------------------------------------------------------


@given(st.data())
def test_bit_sets(data: st.DataObject) -> None:
    """Each position is its bit and nothing else is, for widths that are no multiple of 8 as well."""
    width = data.draw(st.integers(1, 40))
    kept = data.draw(st.integers(1, width))
    order = st.permutations(range(width))
    rows = [[sorted(data.draw(order)[:kept]) for _ in range(2)] for _ in range(3)]
    packed = bit_sets(torch.tensor(rows), width)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, -(-width // 8))
    for layer in range(3):
        for head in range(2):
            whole = int.from_bytes(bytes(packed[layer, head].tolist()), "little")
            assert [j for j in range(width + 8) if whole >> j & 1] == rows[layer][head]


def test_a_tracer_knows_its_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks in order; more ranks than heads share one."""

    def heads(rank: int, ranks: int, total: int) -> list[int]:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda _group: rank)
        pool = SimpleNamespace(k_buffer=[torch.empty(4, max(1, total // ranks), 2)])
        scheduler = SimpleNamespace(
            server_args=SimpleNamespace(model_path="m", tokenizer_path="t"),
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
            tp_size=ranks,
            tp_cpu_group="the ranks",
            model_config=SimpleNamespace(get_total_num_kv_heads=lambda: total),
        )
        tracer = Tracer(scheduler, KaraConfig(trace="x"))
        assert (tracer.tp_rank, tracer.model, tracer.tokenizer) == (rank if ranks > 1 else 0, "m", "t")
        return tracer.heads

    assert heads(0, 1, 3) == [0, 1, 2]
    assert [heads(rank, 2, 8) for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [heads(rank, 4, 2) for rank in range(4)] == [[0], [0], [1], [1]]


def test_a_full_disk_is_an_error_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The server goes on, and says which request has no file and where it should have been."""
    pool = SimpleNamespace(k_buffer=[torch.empty(4, 1, 2)])
    scheduler = SimpleNamespace(
        server_args=SimpleNamespace(model_path="m", tokenizer_path=None),
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        tp_size=1,
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: 1),
    )
    tracer = Tracer(scheduler, KaraConfig(trace=str(tmp_path / "gone")))
    state = RequestState(selector=REGISTRY["recent"](), kept=4, seed=0, base=4)
    traced = TracedWindow(Window(0, 0, 8, 4), torch.full((1, 1, 1), 0xF0).byte(), None)
    state.traced.append(traced)
    req = SimpleNamespace(
        rid="r",
        finished=lambda: True,
        finished_reason=SimpleNamespace(to_json=lambda: {"type": "stop"}),
        retraction_count=0,
        origin_input_ids=[1, 2],
        output_ids=list(range(10)),
    )
    with caplog.at_level(logging.ERROR):
        tracer.end(req, state)
    [record] = caplog.records
    text = record.getMessage()
    assert "request r " in text and "--kv-compress-trace" in text and "No such file" in text
    (tmp_path / "gone").mkdir()
    assert state.traced == []
    state.traced.append(traced)
    tracer.end(req, state)
    assert trace_format.load(tmp_path / "gone" / trace_format.file_name("r")).keeps().tolist() == [
        [[[0] * 4 + [1] * 4]]
    ]
    # A session keeps the request and its state for as long as it is open.
    assert state.traced == []


# -- files ---------------------------------------------------------------------------------------------


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


def split(trace: Trace, heads: list[list[int]]) -> list[Trace]:
    """What tensor-parallel ranks that hold these heads would have written."""
    return [
        dataclasses.replace(
            trace,
            about=dataclasses.replace(trace.about, tp_rank=rank, tp_size=len(heads), heads=mine),
            bits=trace.bits[:, :, mine],
        )
        for rank, mine in enumerate(heads)
    ]


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


# -- the folder ----------------------------------------------------------------------------------------


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


# -- text ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer whose token n is the byte n, 256 is a special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # GPT-2's printable stand-ins, in the order of the bytes that they stand for.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable}
    stand_in |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    model = Tokenizer(models.BPE({stand_in[byte]: byte for byte in range(256)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<|end|>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>").save_pretrained(folder)
    return folder


TEXT = "def f(x):\n    return x < 1 && '&amp;' </script> {{title}} 日本語 🙂!"


def test_pieces_are_the_text(byte_tokenizer: Path) -> None:
    """Together they are the text; a character of several tokens stands with its last one."""
    tokenizer = tokens.load_tokenizer(str(byte_tokenizer))
    ids = [*TEXT.encode(), 256]
    parts = tokens.pieces(tokenizer, ids)
    assert len(parts) == len(ids) and "".join(parts) == TEXT + "<|end|>"
    sun = TEXT.encode().index("日".encode())
    assert parts[sun : sun + 3] == ["", "", "日"]


def test_bytes_that_are_no_text_end(byte_tokenizer: Path) -> None:
    """Neither a run of broken bytes nor a character that is cut off swallows what is around it."""
    tokenizer = tokens.load_tokenizer(str(byte_tokenizer))
    ids = [*b"ab", *[0x80] * 50, *b"cd", *"日".encode()[:2]]
    text = "".join(tokens.pieces(tokenizer, ids))
    assert text.startswith("ab") and "cd" in text and text.endswith("\N{REPLACEMENT CHARACTER}")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be loaded") as caught:
        tokens.load_tokenizer(str(tmp_path / "absent"))
    assert "\n" not in str(caught.value)


# -- the page ------------------------------------------------------------------------------------------


def marks(html: str) -> list[list[tuple[int, str]]]:
    """Level and text of each token of each window."""
    windows = re.findall(r"<section class=window .*?</section>", html, re.DOTALL)
    spans = [re.findall(r"<span class=k(\d+)>(.*?)</span>", w, re.DOTALL) for w in windows]
    return [[(int(level), unescape(text)) for level, text in row] for row in spans]


def test_the_page_marks_the_mean() -> None:
    """Each token of a window at the level that its share of layers and heads gives."""
    trace = some_trace()
    texts = [f"<{i}>" for i in range(65)]
    html = viewer.render(trace, texts)
    bits = np.unpackbits(trace.bits, axis=-1, bitorder="little")[..., :WIDTH]
    share = bits.sum(axis=(1, 2)) / (LAYERS * HEADS)  # in sixths
    for row, expected, start in zip(marks(html), share, (8, 32), strict=True):
        assert [level for level, _ in row] == [int(10 * s + 0.5001) for s in expected]
        assert [text for _, text in row] == texts[start : start + WIDTH]
    assert len({level for row in marks(html) for level, _ in row}) > 3


def test_the_page_holds_all_text_once_and_in_order() -> None:
    """Prompt, gap, window, gap, window, rest."""
    html = viewer.render(some_trace(), [f"[{i}]" for i in range(65)])
    article = html.split("<article>")[1].split("</article>")[0]
    assert re.findall(r"\[(\d+)\]", article) == [str(i) for i in range(65)]
    heads = re.findall(r"<h2>([a-z 0-9]+)<small>tokens (\d+)\W(\d+)</small>", article)
    assert heads == [
        ("prompt", "0", "4"),
        ("not compressed", "5", "7"),
        ("window 1", "8", "27"),
        ("not compressed", "28", "31"),
        ("window 2", "32", "51"),
        ("not compressed", "52", "64"),
    ]


def test_the_page_says_who_chose() -> None:
    """Window by window."""
    html = viewer.render(some_trace(), [f"[{i}]" for i in range(65)])
    said = re.findall(r"8 of 20 kept</small><small>([a-z ]+)</small></h2>", html)
    assert said == ["all query heads vote", "no queries recorded"]
    assert set(viewer.VOTES) == set(VOTERS)


def test_nothing_that_a_user_wrote_becomes_markup() -> None:
    """In text, id, model and notice; what looks like one of the template's slots stays as it is."""
    evil = '</script></p><img src=x onerror=alert(1)>{{data}}\0"'
    trace = some_trace(rid=evil, model="/m/" + evil, finish=evil)
    html = viewer.render(trace, [evil] * 65, notice=evil)
    assert "<img" not in html and html.count("</script>") == 2
    assert html.count("{{data}}") == 65 + 5  # texts, title, request, model, reason, notice
    assert "\\u003c" not in html.split("id=data>")[1].split("</script>")[0]  # ids and bits only


def test_the_page_is_on_its_own() -> None:
    """No address of anything but itself, and a policy that forbids to load any."""
    html = viewer.render(some_trace(), ["x"] * 65)
    assert not re.search(r"https?:|//\w+\.|\bsrc=|\bhref=|@import|url\(", html)
    assert "default-src 'none'" in html


def test_the_pages_data_is_the_trace() -> None:
    trace = some_trace()
    html = viewer.render(trace, ["x"] * 65)
    data = json.loads(re.search(r"id=data>(.*?)</script>", html, re.DOTALL)[1])
    assert (data["layers"], data["heads"]) == (LAYERS, [0, 1])
    [shown] = data["traces"]
    assert [w["start"] for w in shown["windows"]] == [8, 32]
    assert data["ids"] == [*range(5), *range(100, 160)]
    assert base64.b64decode(shown["bits"]) == trace.bits.tobytes()


def test_the_page_says_what_is_missing() -> None:
    part = split(some_trace(), [[0], [1]])[1]
    html = viewer.render(part, ["x"] * 65)
    assert "1 to 1 of 2; give show the files of all 2 ranks" in html
    assert "retracted" not in html
    again = viewer.render(some_trace(retractions=3), ["x"] * 65)
    assert "3 times; what was compressed before is forgotten" in again


# -- two traces ----------------------------------------------------------------------------------------


def cut(trace: Trace, parts_at: int) -> Trace:
    """The same request with other tokens from position ``parts_at`` on."""
    output = trace.output_ids.copy()
    output[parts_at - len(trace.prompt_ids) :] += 1000
    return dataclasses.replace(trace, output_ids=output)


def test_a_pair_of_one_text_is_compared_to_its_end() -> None:
    left, right = some_trace(), some_trace(seed=1, selector="recent")
    both = pair(left, right)
    assert (both.end, both.note, both.whole) == (65, "", (left, right))
    for common, whole in zip(both.common, both.whole, strict=True):
        assert_same(common, whole)


@pytest.mark.parametrize(
    ("parts_at", "windows", "end"), [(64, 2, 64), (52, 2, 52), (51, 1, 32), (33, 1, 32), (30, 1, 30)]
)
def test_a_pair_is_compared_up_to_where_its_texts_part(parts_at: int, windows: int, end: int) -> None:
    """Behind it the page has no text; a window that is not common to both in full is left out."""
    both = pair(some_trace(), cut(some_trace(seed=1), parts_at))
    assert both.end == end
    for common, whole in zip(both.common, both.whole, strict=True):
        assert len(common.prompt_ids) + len(common.output_ids) == parts_at
        assert np.array_equal(common.windows, whole.windows[:windows])
        assert np.array_equal(common.bits, whole.bits[:windows])
    assert f"up to token {parts_at}, where they part" in both.note
    assert ("not compared" in both.note) == (end < parts_at)
    html = viewer.render_pair(both, [f"[{i}]" for i in range(parts_at)])
    assert both.note in html
    for side in (0, 1):
        sections = re.findall(rf"<section class=\S+ data-side={side}>.*?</section>", html, re.DOTALL)
        shown = re.findall(r"\[(\d+)\]", "".join(sections))
        assert shown == [str(i) for i in range(parts_at)]
        assert ("not compared" in sections[-1]) == (end < parts_at)


def test_a_pair_of_which_one_text_goes_on() -> None:
    left, right = some_trace(), some_trace(output=70)
    assert "up to token 65, where the left one ends" in pair(left, right).note
    assert "up to token 65, where the right one ends" in pair(right, left).note


def test_a_window_of_the_other_side_may_end_the_comparison() -> None:
    """Windows at other places: nothing is compared from where any cut window begins."""
    left, other = some_trace(), some_trace(seed=1)
    right = dataclasses.replace(other, windows=other.windows + np.array([3, 0, 0, 0, 0]))
    both = pair(left, cut(right, 53))
    # The text parts in the right side's second window, which began inside the left side's.
    assert both.end == 32 and [len(trace.windows) for trace in both.common] == [1, 1]


def test_pairs_that_cannot_be_compared() -> None:
    trace = some_trace()
    fewer_layers = dataclasses.replace(trace, bits=trace.bits[:, 1:])
    for other in (fewer_layers, split(trace, [[0], [1]])[0]):
        with pytest.raises(TraceError, match="--with compares requests of one model"):
            pair(trace, other)
    for parts_at in (5, 27):
        with pytest.raises(TraceError, match=f"part at token {parts_at}, before both have compressed"):
            pair(trace, cut(trace, parts_at))


def test_the_rows_of_a_pair_begin_where_both_sides_do() -> None:
    """Windows of other widths: what is side by side is the same text."""
    left = some_trace()
    windows = np.array([[8, 8, 10, 4, 2], [18, 12, 10, 4, 2], [30, 20, 10, 4, 0]])
    chosen = np.zeros((3, LAYERS, HEADS, 10), dtype=np.uint8)
    chosen[..., :4] = 1
    bits = np.packbits(chosen, axis=-1, bitorder="little")
    html = viewer.render_pair(
        pair(left, dataclasses.replace(left, windows=windows, bits=bits)), [f"[{i}]" for i in range(65)]
    )
    rows = html.split("<article>")[1].split("</article>")[0].split("<div class=pair>")[1:]
    seen = []
    for row in rows:
        sides = [re.findall(r"\[(\d+)\]", column) for column in row.split("<div>")[1:]]
        assert sides[0] == sides[1]
        seen += sides[0]
    assert seen == [str(i) for i in range(65)]
    assert [row.count("<section class=window") for row in rows] == [0, 0, 3, 2]


def test_a_pairs_page_says_what_differs_and_loads_nothing() -> None:
    both = pair(some_trace(rid="<a>"), cut(some_trace(rid="<b>", selector="recent"), 60))
    html = viewer.render_pair(both, ["x"] * 60, notice="no <text>")
    assert "<title>Kept tokens of &lt;a&gt; and &lt;b&gt;</title>" in html
    header = html.split("<header>")[1].split("</header>")[0]
    assert re.findall(r"<h2>(\w+)</h2>", header) == ["left", "right"]
    assert re.findall(r"<dt>selector</dt><dd>(\w+)</dd>", header) == ["kara", "recent"]
    assert header.count("60 generated") == 2, "the whole requests, not what is compared of them"
    assert "no &lt;text&gt;" in header
    assert not re.search(r"https?:|//\w+\.|\bsrc=|\bhref=|@import|url\(", html)


# -- the command ---------------------------------------------------------------------------------------


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
    """The files of all ranks on both sides; the page lies beside the first trace_format."""
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
