"""The trace's page in a real browser: its script, its keys, its histogram, and how it looks."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import browser
import numpy as np
import pytest
from PIL import Image
from places import ROOT

from kara_sglang.trace import viewer
from kara_sglang.trace.format import About, Trace
from kara_sglang.trace.pair import Pair, pair

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)

ARTEFACTS = ROOT / "build" / "artefacts"
LAYERS, HEADS, WIDTH, KEPT, WINDOWS, PROMPT, OUTPUT = 6, 3, 100, 40, 5, 30, 600
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "\n", "a", "<lazy>", "dog", "&", "hides")
TEXTS = [f" {WORDS[i % len(WORDS)]}" for i in range(PROMPT + OUTPUT)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    """One browser for all tests of this file."""
    with browser.chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def some_trace(seed: int, width: int, kept: int, start: int, selector: str) -> Trace:
    """Chunks of 1 to 30 tokens, each layer and head its own, so that no view looks like another."""
    rng = np.random.default_rng(seed)
    count = WINDOWS * WIDTH // width
    bits = np.zeros((count, LAYERS, HEADS, width), dtype=np.uint8)
    for row in bits.reshape(-1, width):
        while row.sum() < kept:
            at = rng.integers(width)
            row[at : at + min(kept - int(row.sum()), int(rng.integers(1, 31)))] = 1
    about = About(
        rid=f"a-request-{selector}",
        finish="length",
        retractions=0,
        selector=selector,
        kept=kept,
        settings={"window": width},
        model="/models/a-model",
        tokenizer="/models/a-model",
        tp_rank=0,
        tp_size=1,
        heads=[0, 1, 2],
        num_kv_heads=3,
    )
    windows = [(start + width * i, 0, width, kept, 1) for i in range(count)]
    packed = np.packbits(bits, axis=-1, bitorder="little")
    return Trace(about, np.arange(PROMPT), np.arange(OUTPUT), np.array(windows), packed)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return some_trace(0, WIDTH, KEPT, PROMPT + 10, "kara")


@pytest.fixture(scope="module")
def url(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "viewer.html"
    path.write_text(viewer.render(trace, TEXTS))
    return path.as_uri()


def in_the_page(shown: browser.Page, url: str) -> str:
    """What the page's script has made of it."""
    shown.open(url)
    return str(shown.run("document.documentElement.outerHTML"))


def levels(html: str) -> list[list[int]]:
    sections = re.findall(r'<section class="window".*?</section>', html, re.DOTALL)
    return [[int(k) for k in re.findall(r'<span class="k(\d+)', section)] for section in sections]


def chunk_sizes(kept: np.ndarray) -> Counter[int]:
    """Lengths of runs of ones along the last axis."""
    rows = kept.reshape(-1, kept.shape[-1])
    return Counter(len(run) for row in rows for run in "".join(map(str, row)).split("0") if run)


@pytest.mark.parametrize(
    ("address", "layers", "heads"),
    [
        ("", slice(None), slice(None)),
        ("#layer=4", slice(4, 5), slice(None)),
        ("#layer=0&head=2", slice(0, 1), slice(2, 3)),
        ("#head=1", slice(None), slice(1, 2)),
    ],
)
def test_each_view_is_what_its_heads_kept(
    address: str, layers: slice, heads: slice, trace: Trace, url: str, shown: browser.Page
) -> None:
    """The script's marks and chunks against numpy's, for the mean, a layer, a head, and a head of all
    layers."""
    html = in_the_page(shown, url + address)
    kept = trace.keeps()[:, layers, heads]
    sets = kept.shape[1] * kept.shape[2]
    expected = (2 * viewer.LEVELS * kept.sum(axis=(1, 2), dtype=int) + sets) // (2 * sets)
    assert levels(html) == expected.tolist()

    sizes = chunk_sizes(kept)
    shown = Counter[int]()
    for count, name in re.findall(r"<title>([\d,]+) chunks of (\S+),", html):
        first, *rest = map(int, re.split(r"\D", name))
        bounds = range(first, (rest or [first])[0] + 1)
        assert int(count.replace(",", "")) == sum(sizes[size] for size in bounds), name
        shown.update({size: sizes[size] for size in bounds})
    assert +shown == sizes
    average = sum(size * n for size, n in sizes.items()) / sizes.total()
    assert f"{sizes.total():,} chunks, {average:.1f} tokens on average" in html


def test_what_chance_would_give(url: str, shown: browser.Page) -> None:
    """The lines in the histogram against many random draws."""
    html = in_the_page(shown, url + "#layer=0")
    rng = np.random.default_rng(1)
    rows = np.zeros((20_000, WIDTH), dtype=np.uint8)
    rows[:, :KEPT] = 1
    drawn = chunk_sizes(rng.permuted(rows, axis=-1))
    per_view = WINDOWS * HEADS / len(rows)
    said = re.findall(r"chunks of (\d+), by chance ([\d,]+)<", html)
    assert [size for size, _ in said] == [str(size) for size in range(1, 9)]
    for size, count in said:
        assert int(count) == pytest.approx(drawn[int(size)] * per_view, abs=1.5, rel=0.02)


# -- two traces ----------------------------------------------------------------------------------------

OTHERS = {
    "another selector": some_trace(1, WIDTH, KEPT, PROMPT + 10, "recent"),
    "another share": some_trace(2, WIDTH, 70, PROMPT + 10, "kara"),
    "other windows": some_trace(3, 50, 20, PROMPT + 35, "kara"),
}


def write_pair(both: Pair, path: Path) -> str:
    length = len(both.common[0].prompt_ids) + len(both.common[0].output_ids)
    path.write_text(viewer.render_pair(both, TEXTS[:length]))
    return path.as_uri()


@pytest.fixture(scope="module")
def pair_url(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> str:
    both = pair(trace, OTHERS["another selector"])
    return write_pair(both, tmp_path_factory.mktemp("pair") / "pair.html")


def whole_text(trace: Trace) -> np.ndarray:
    """(layers, heads, tokens): what is in no window is kept."""
    kept = np.ones((LAYERS, HEADS, PROMPT + OUTPUT), dtype=int)
    for (start, _, width, *_), window in zip(trace.windows, trace.keeps(), strict=True):
        kept[:, :, start : start + width] = window
    return kept


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize(
    ("address", "layers", "heads"),
    [("", slice(None), slice(None)), ("#layer=2&head=1", slice(2, 3), slice(1, 2))],
)
def test_two_traces_against_numpy(
    what: str,
    address: str,
    layers: slice,
    heads: slice,
    trace: Trace,
    shown: browser.Page,
    tmp_path: Path,
) -> None:
    """Marks of each token and shares of each window, on both sides, for one head and for the mean."""
    traces = [trace, OTHERS[what]]
    shown.open(write_pair(pair(*traces), tmp_path / "pair.html") + address)
    kept = [whole_text(t)[layers, heads].reshape(-1, PROMPT + OUTPUT) for t in traces]
    shares = np.array([k.mean(axis=0) for k in kept])
    for side, (mine, other) in enumerate(((0, 1), (1, 0))):
        marks = shown.run(
            f"[...document.querySelectorAll('[data-side=\"{side}\"] p span')]"
            ".map(span => ['here', 'there'].filter(c => span.classList.contains(c)).join())"
        )
        more = shares[mine] - shares[other]
        assert marks == ["here" if m >= 0.25 else "there" if m <= -0.25 else "" for m in more]
        assert {"here", "there", ""} == set(marks)

        said = shown.run(
            f"[...document.querySelectorAll('[data-side=\"{side}\"] .shares')].map(s => s.textContent)"
        )
        windows = traces[side].windows[:, [0, 2]].tolist()
        assert len(said) == len(windows)
        for line, (start, width) in zip(said, windows, strict=True):
            left, right = (k[:, start : start + width] for k in kept)
            expected = [left & right, left & ~right & 1, ~left & right & 1, ~left & ~right & 1]
            words = re.findall(r"([a-z ]+?) ([\d.]+) %", line.replace(", ", ","))
            assert [word for word, _ in words] == ["both", "only left", "only right", "neither"]
            for (_, percent), share in zip(words, expected, strict=True):
                assert float(percent) == pytest.approx(100 * share.mean(), abs=0.51)


def test_marks_are_no_mere_colours(pair_url: str, shown: browser.Page) -> None:
    shown.open(pair_url + "#layer=2&head=1")
    style = "getComputedStyle(document.querySelector('section .{}')).textDecoration{}"
    lines = [shown.run(style.format(how, "Line")) for how in ("here", "there")]
    styles = [shown.run(style.format(how, "Style")) for how in ("here", "there")]
    assert lines == ["underline", "underline"] and styles == ["solid", "dotted"]


def boxes(shown: browser.Page, side: int) -> np.ndarray:
    """(tokens, 2): where the tokens of a side begin, in CSS pixels from the corner of the page."""
    shown.run(
        "document.body.append(Object.assign(document.createElement('style'), "
        "{textContent: 'section { content-visibility: visible !important }'}))"
    )
    corners = shown.run(
        f"[...document.querySelectorAll('[data-side=\"{side}\"] p span')].map(span => span"
        ".getClientRects()[0]).map(box => [box.x + scrollX, box.y + scrollY])"
    )
    return np.array(corners)


@pytest.mark.parametrize("width", [1280, 800])
def test_the_same_text_stays_side_by_side(width: int, pair_url: str, shown: browser.Page) -> None:
    """Token by token at the same height: the page scrolls both sides as one."""
    shown.open(pair_url, width)
    left, right = boxes(shown, 0), boxes(shown, 1)
    assert np.abs(left[:, 1] - right[:, 1]).max() < 1
    assert (right[:, 0] - left[:, 0]).min() > width / 4


@pytest.mark.parametrize("width", [360, 600])
def test_narrow_screens(width: int, pair_url: str, shown: browser.Page) -> None:
    """One side above the other, window by window, and nothing wider than the screen."""
    shown.open(pair_url, width, 800)
    left, right = boxes(shown, 0), boxes(shown, 1)
    assert np.abs(left[:, 0] - right[:, 0]).max() < 1
    for start in range(PROMPT + 10, PROMPT + 10 + WIDTH * WINDOWS, WIDTH):
        window = slice(start, start + WIDTH)
        assert left[window, 1].max() < right[window, 1].min()
        assert right[window, 1].max() < left[window.stop, 1]
    assert shown.run("document.documentElement.scrollWidth") == width


# -- search, links, keys -------------------------------------------------------------------------------


def focused(shown: browser.Page) -> int | None:
    """The token that has the focus."""
    return shown.run("place.get(document.activeElement) ?? null")


def found(shown: browser.Page, side: int = 0, how: str = "") -> list[int]:
    """The tokens of all matches, or only of that which the search is ``here`` at."""
    return shown.run(
        f"sides[{side}].spans.filter(span => span.dataset.found?.startsWith('{how}'))"
        ".map(span => place.get(span))"
    )


def is_in_sight(shown: browser.Page, token: int) -> bool:
    """On screen and behind nothing, after the frames that the page takes to scroll."""
    for _ in range(40):
        if shown.run(
            f"(span => {{ const box = span.getClientRects()[0]; return span === document"
            ".elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) })"
            f"(sides[0].spans[{token}])"
        ):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("width", [1280, 360])
def test_search(width: int, pair_url: str, shown: browser.Page) -> None:
    """`/`, the words, Enter, Shift+Enter, Escape; on both sides, whatever the case and the line."""
    shown.open(pair_url, width, 800)
    shown.press("/")
    assert shown.run("document.activeElement.id") == "find" and shown.run("$('find').value") == ""
    shown.press(*"OVER A <lazy>")
    starts = [i for i in range(len(TEXTS) - 3) if "".join(TEXTS[i : i + 4]) == " over \n a <lazy>"]
    assert len(starts) > 40
    every = [token for start in starts for token in range(start, start + 4)]
    assert found(shown) == found(shown, 1) == every

    first = next(i for i, start in enumerate(starts) if start >= PROMPT + 10)
    steps = [(0, ""), (1, "Enter"), (2, "Enter"), (1, "shift"), (0, "shift"), (-1, "shift")]
    for step, key in steps:
        if key:
            shown.press("Enter", shift=key == "shift")
        at = (first + step) % len(starts)
        assert shown.run("$('matches').textContent") == f"{at + 1} of {len(starts)}"
        assert found(shown, 0, "here") == list(range(starts[at], starts[at] + 4))
        assert is_in_sight(shown, starts[at])
    assert shown.run("document.activeElement.id") == "find"
    shown.click("$('next')")
    assert shown.run("$('matches').textContent") == f"{first + 1} of {len(starts)}"
    shown.click("$('previous')")
    shown.click("$('previous')")
    assert shown.run("$('matches').textContent") == f"{first - 1} of {len(starts)}"

    shown.press("/", "Escape")
    assert found(shown) == [] and shown.run("$('matches').textContent + $('find').value") == ""
    assert focused(shown) == starts[first - 2]
    shown.press("/", *"elephant")
    assert shown.run("$('matches').textContent") == "none" and found(shown) == []


def test_search_takes_what_is_typed_as_it_is(url: str, shown: browser.Page) -> None:
    """No signs of a pattern language."""
    shown.open(url)
    for query in ("f.x", "(", "[", "\\", "*", "^", "a|b", "$"):
        shown.run(f"($('find').value = {query!r}, search())")
        assert shown.run("$('matches').textContent") == "none", query
    shown.run("($('find').value = '<lazy>', search())")
    count = TEXTS.count(" <lazy>")
    assert shown.run("$('matches').textContent").endswith(f" of {count}")


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("side", [0, 1])
def test_a_click_links_to_a_token(side: int, width: int, pair_url: str, shown: browser.Page) -> None:
    """The address opens the page at the token, in the view that was chosen."""
    shown.open(pair_url + "#layer=2&head=1", width, 800)
    shown.run(f"sides[{side}].spans[300].scrollIntoView({{block: 'center'}})")
    time.sleep(0.3)
    shown.click(f"sides[{side}].spans[300]")
    assert shown.run("location.hash") == "#t300&layer=2&head=1"
    address = shown.run("location.href")

    shown.open(address, width, 800)
    assert is_in_sight(shown, 300)
    current = "[...document.querySelectorAll('[aria-current]')].map(span => place.get(span))"
    assert shown.run(current) == [300, 300]
    assert shown.run("[$('layer').value, $('head').value, location.hash]") == [
        "2",
        "1",
        "#t300&layer=2&head=1",
    ]
    assert shown.run("$('token').textContent").startswith("token 300, id 270: left kept by ")
    shown.click("sides[0].spans[300]")
    assert shown.run("location.hash") == "#layer=2&head=1" and shown.run(current) == []


@pytest.mark.parametrize("token", [0, 45, PROMPT + OUTPUT - 1])
def test_any_token_can_be_linked_to(token: int, url: str, shown: browser.Page) -> None:
    """Prompt, window, and what comes behind the windows."""
    shown.open(f"{url}#t{token}")
    assert is_in_sight(shown, token) and shown.run("location.hash") == f"#t{token}"


@pytest.mark.parametrize("width", [1280, 360])
def test_a_token_far_down_is_found(width: int, pair_url: str, shown: browser.Page) -> None:
    """The sections on the way have guessed heights, because they were never on screen."""
    for token in (250, 400, 520, 60):
        shown.open(f"{pair_url}#t{token}", width, 800)
        assert is_in_sight(shown, token)


def test_the_arrow_keys_do_not_go_behind_the_controls(pair_url: str, shown: browser.Page) -> None:
    """On a narrow screen the controls stay on top of the text."""
    shown.open(f"{pair_url}#t120", 360, 800)
    assert is_in_sight(shown, 120)
    shown.run("sides[0].spans[120].focus({preventScroll: true})")
    for token in range(119, 49, -1):
        shown.press("ArrowLeft")
        assert focused(shown) == token and is_in_sight(shown, token)


@pytest.mark.parametrize("address", [f"#t{PROMPT + OUTPUT}", "#t-1", "#tx", "#t", "#t1e3"])
def test_an_address_of_no_token(address: str, url: str, shown: browser.Page) -> None:
    shown.open(url + address)
    assert shown.run("location.hash") == "" and shown.run("linked") == -1


def test_the_keyboard_reaches_everything(pair_url: str, shown: browser.Page) -> None:
    """Tab by Tab, with the focus to be seen at each; then token by token and to a link."""
    shown.open(pair_url)
    stops = []
    for _ in range(7):
        shown.press("Tab")
        stops.append(shown.run("document.activeElement.id || place.get(document.activeElement)"))
        ring = shown.run("getComputedStyle(document.activeElement).outlineStyle")
        assert ring != "none", stops
    first = PROMPT + 10
    assert stops == ["layer", "head", "find", "previous", "next", first, first]
    assert shown.run("document.activeElement.closest('section').dataset.side") == "1"

    shown.press(*["ArrowRight"] * 3, "ArrowLeft")
    assert focused(shown) == first + 2 and is_in_sight(shown, first + 2)
    assert shown.run("document.activeElement.closest('section').dataset.side") == "1"
    assert f"token {first + 2}," in shown.run("$('token').textContent")
    assert shown.run("location.hash") == ""
    shown.press("Enter")
    assert shown.run("location.hash") == f"#t{first + 2}"
    shown.press(" ")
    assert shown.run("location.hash") == ""
    shown.press("ArrowRight", "Enter")
    shown.run("$('layer').focus()")
    shown.press("ArrowRight")
    assert shown.run("location.hash") == f"#t{first + 3}&layer=0"

    shown.open(f"{pair_url}#t0")
    shown.run("sides[0].spans[0].focus()")
    shown.press("ArrowLeft")
    assert focused(shown) == 0


# -- looks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "address", "size", "dark"),
    [
        ("wide-light", "", (1280, 900), False),
        ("wide-dark", "#layer=3", (1280, 900), True),
        ("narrow-light", "#layer=3&head=1", (500, 900), False),
        ("pair-wide-light", "#layer=3&head=1", (1280, 900), False),
        ("pair-narrow-dark", "#t70&layer=3&head=1", (400, 900), True),
    ],
)
def test_how_it_looks(
    name: str,
    address: str,
    size: tuple[int, int],
    dark: bool,
    url: str,
    pair_url: str,
    shown: browser.Page,
) -> None:
    """Pictures for people, in build/artefacts; here only that they are no blank or half-drawn ones."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    picture = ARTEFACTS / f"trace-{name}.png"
    picture.unlink(missing_ok=True)
    shown.prefer("dark" if dark else "light")
    shown.open((pair_url if name.startswith("pair") else url) + address, *size)
    if "#t" in address:
        assert is_in_sight(shown, 70)
    shown.picture(picture)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (size[1], size[0], 3)
    background = pixels[2, 2]
    assert (background.max() < 60) if dark else (background.min() > 230)
    # Ink of the text, the accent of slider and bars, and nothing that runs out of the window.
    brightness = pixels.mean(axis=2)
    assert (brightness > 200).sum() > 2000 if dark else (brightness < 60).sum() > 2000
    accent = np.array((240, 164, 92) if dark else (180, 83, 10))
    assert (np.abs(pixels - accent).max(axis=2) < 12).sum() > 500
    assert (pixels[:, -4:] == background).all()
