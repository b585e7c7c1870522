"""Texts and scripts of the quality benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
from quality import decode, encode

from kara_sglang.benchmarks.quality import tasks, texts
from kara_sglang.benchmarks.quality.script import (
    Cell,
    Probe,
    Script,
)
from kara_sglang.benchmarks.quality.tasks import Layout


def test_the_splits_share_no_text_and_their_sources_are_named():
    development, held_out = (texts.load(split) for split in texts.SPLITS)
    assert len(development) >= 8 and len(held_out) >= 12
    assert not {t.content for t in development} & {t.content for t in held_out}
    sources = (texts.DATA / "SOURCES.md").read_text()
    for split, members in zip(texts.SPLITS, (development, held_out), strict=True):
        for text in members:
            stem = text.name.rsplit("-", 1)[0] if text.name[-1].isdigit() else text.name
            named = f"`{split}/{stem}-*`", f"`{split}/{stem}`", f"`*/{text.kind}-*`"
            assert any(name in sources for name in named), text.name


def test_the_first_texts_are_of_different_kinds():
    few = texts.load("held_out", 5)
    assert len({text.kind for text in few}) == 5


def test_words_can_be_told_apart():
    for words in (tasks.NAMES, tasks.WORDS):
        assert len(set(words)) == len(words)


@pytest.mark.parametrize("layout", [Layout(128, 1, tail=128, stride=2), Layout(64, 2, tail=40)])
def test_a_text_script_measures_its_tail(layout: Layout):
    text = texts.load("held_out", 1)[0]
    script = tasks.text_script(encode, text, layout)
    assert decode(script.prompt + script.forced) == text.content[: len(script.prompt + script.forced)]
    steps = script.measured()
    assert steps == list(range(layout.span, layout.span + layout.tail))
    assert script.compared() == steps[:: layout.stride]
    assert steps[-1] == len(script.forced) - 1
    begun = tasks.text_script(encode, text, layout, beginning=[7])
    assert begun.prompt == [7, *script.prompt[:-1]]
    assert begun.forced == [script.prompt[-1], *script.forced[:-1]]


def test_a_recall_script_states_each_fact_in_its_window_and_asks_for_it():
    layout = Layout(512, 3, facts=4)
    text = texts.load("held_out", 1)[0]
    script = tasks.recall_script(encode, text, layout, seed=3)
    said, asked = script.forced[: layout.span], script.forced[layout.span :]
    assert len(script.probes) == 12
    assert {probe.kind for probe in script.probes} == set(tasks.FACTS)
    for probe in script.probes:
        answer = decode(script.forced[probe.start : probe.stop])
        lead = decode(script.forced[: probe.start]).rsplit("\n", 1)[1]
        assert decode(said).count(f"\n{lead}{answer}.\n") == 1
        start = decode(said).index(f"\n{lead}{answer}.\n")
        centre = start + len(f"\n{lead}{answer}.\n") / 2
        window = layout.windows - 1 - probe.back
        assert abs(centre - (window + probe.offset) * layout.window) <= 1
        assert start >= window * layout.window
        assert start + len(f"\n{lead}{answer}.\n") <= (window + 1) * layout.window
    assert sorted({probe.offset for probe in script.probes}) == [0.125, 0.375, 0.625, 0.875]
    assert decode(asked).startswith("\n\nNow repeat")
    assert script == tasks.recall_script(encode, text, layout, seed=3)
    assert script != tasks.recall_script(encode, text, layout, seed=4)
    begun = tasks.recall_script(encode, text, layout, seed=3, beginning=[7])
    assert begun.prompt == [7, *script.prompt[:-1]] and begun.probes == script.probes


def test_too_much_is_refused_by_name():
    text = texts.load("held_out", 1)[0]
    with pytest.raises(ValueError, match="choose a smaller window"):
        tasks.text_script(encode, text, Layout(9216, 1, tail=512))
    with pytest.raises(ValueError, match="do not fit a window of 64"):
        tasks.recall_script(encode, text, Layout(64, 1, facts=4), seed=0)


@pytest.mark.parametrize("prompt", [16, 32, 37])
@pytest.mark.parametrize("delay", [0, 16, 64])
@pytest.mark.parametrize("forced", [65, 80, 130, 146, 147, 148, 200, 321])
def test_windows_done_counts_like_the_scheduler(prompt: int, delay: int, forced: int):
    """Step by step: a pass looks at the KV length before each decode step but the last."""
    window, page = 64, 16
    base, removed_windows = -(-prompt // page) * page, 0
    for step in range(1, forced):
        length = prompt + step - 1
        last = step == forced - 1
        if not last and length >= base + (removed_windows + 1) * window + delay:
            removed_windows += 1
    script = Script("s", "x", [1] * prompt, [1] * forced)
    assert tasks.windows_done(script, window, delay, page) == removed_windows


def test_scripts_and_cells_survive_their_files(tmp_path: Path):
    script = Script("s", "x", [1], [2, 3], [Probe("text", 0, 2, True)], 2)
    script.save(tmp_path)
    assert Script.load(tmp_path, "s") == script
    cell = Cell([-1.5], [True], [3], [0.25])
    cell.save(tmp_path, "row", "s")
    assert Cell.load(tmp_path, "row", "s") == cell
