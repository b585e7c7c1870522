"""The trace's page in a real browser: its script, its histogram, and how it looks."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kara_sglang.trace import page
from kara_sglang.trace.file import About, Trace

CHROMIUM = next(
    filter(
        None,
        map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")),
    ),
    None,
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)

ARTEFACTS = Path(__file__).resolve().parents[2] / "build" / "artefacts"
LAYERS, HEADS, WIDTH, KEPT, WINDOWS, PROMPT = 6, 3, 100, 40, 5, 30
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "\n", "a", "<lazy>", "dog", "&", "hides")


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Chunks of 1 to 30 tokens, each layer and head its own, so that no view looks like another."""
    rng = np.random.default_rng(0)
    kept = np.zeros((WINDOWS, LAYERS, HEADS, WIDTH), dtype=np.uint8)
    for row in kept.reshape(-1, WIDTH):
        while row.sum() < KEPT:
            start = rng.integers(WIDTH)
            row[start : start + min(KEPT - int(row.sum()), int(rng.integers(1, 31)))] = 1
    starts = PROMPT + 10 + WIDTH * np.arange(WINDOWS)
    windows = [(start, 0, WIDTH, KEPT, 1) for start in starts]
    about = About(
        rid="a-request",
        finish="length",
        retractions=0,
        selector="kara",
        kept=KEPT,
        settings={"window": WIDTH},
        model="/models/a-model",
        tokenizer="/models/a-model",
        tp_rank=0,
        tp_size=1,
        heads=[0, 1, 2],
        num_kv_heads=3,
    )
    bits = np.packbits(kept, axis=-1, bitorder="little")
    return Trace(about, np.arange(PROMPT), np.arange(600), np.array(windows), bits)


@pytest.fixture(scope="module")
def url(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    texts = [f" {WORDS[i % len(WORDS)]}" for i in range(PROMPT + 600)]
    path.write_text(page.render(trace, texts))
    return path.as_uri()


def chromium(tmp_path: Path, *arguments: str) -> str:
    """Run the browser without a window; its standard output. A fault of the page's script is ours."""
    command = [
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000", "--enable-logging=stderr"),
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    return done.stdout


def levels(html: str) -> list[list[int]]:
    sections = re.findall(r'<section class="window".*?</section>', html, re.DOTALL)
    return [[int(k) for k in re.findall(r'<span class="k(\d+)"', section)] for section in sections]


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
    address: str, layers: slice, heads: slice, trace: Trace, url: str, tmp_path: Path
) -> None:
    """The script's marks and chunks against numpy's, for the mean, a layer, a head, and a head of all
    layers."""
    html = chromium(tmp_path, "--dump-dom", url + address)
    kept = trace.keeps()[:, layers, heads]
    sets = kept.shape[1] * kept.shape[2]
    expected = (2 * page.LEVELS * kept.sum(axis=(1, 2), dtype=int) + sets) // (2 * sets)
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


def test_what_chance_would_give(trace: Trace, url: str, tmp_path: Path) -> None:
    """The lines in the histogram against many random draws."""
    html = chromium(tmp_path, "--dump-dom", url + "#layer=0")
    rng = np.random.default_rng(1)
    rows = np.zeros((20_000, WIDTH), dtype=np.uint8)
    rows[:, :KEPT] = 1
    drawn = chunk_sizes(rng.permuted(rows, axis=-1))
    per_view = WINDOWS * HEADS / len(rows)
    said = re.findall(r"chunks of (\d+), by chance ([\d,]+)<", html)
    assert [size for size, _ in said] == [str(size) for size in range(1, 9)]
    for size, count in said:
        assert int(count) == pytest.approx(drawn[int(size)] * per_view, abs=1.5, rel=0.02)


@pytest.mark.parametrize(
    ("name", "address", "size", "dark"),
    [
        ("wide-light", "", (1280, 900), False),
        ("wide-dark", "#layer=3", (1280, 900), True),
        ("narrow-light", "#layer=3&head=1", (500, 900), False),
    ],
)
def test_how_it_looks(
    name: str, address: str, size: tuple[int, int], dark: bool, url: str, tmp_path: Path
) -> None:
    """Pictures for people, in build/artefacts; here only that they are no blank or half-drawn ones."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    picture = ARTEFACTS / f"trace-{name}.png"
    picture.unlink(missing_ok=True)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    window = f"--window-size={size[0]},{size[1]}"
    chromium(tmp_path, scheme, window, f"--screenshot={picture}", url + address)
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
