"""The page of a trace, and of two."""

from __future__ import annotations

import base64
import dataclasses
import json
import re

import numpy as np
from traces import HEADS, LAYERS, WIDTH, cut, marks, some_trace, split

from kara_sglang.radix_integration.row import VOTERS
from kara_sglang.trace import viewer
from kara_sglang.trace.pair import pair


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
