"""Figures by regime."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quality import decode, encode

from kara_sglang.benchmarks import plots
from kara_sglang.benchmarks.quality import regimes, rows
from kara_sglang.benchmarks.quality.script import (
    Cell,
)
from kara_sglang.benchmarks.research import regimes as replayed
from kara_sglang.embedded_model import transformers_name


def test_facts_of_the_regimes_are_stated_once_and_asked_for_once():
    script = regimes.script_of(encode, 3, window=256, windows=4, facts=5)
    text = decode(script.forced)
    kinds = Counter(probe.kind for probe in script.probes)
    assert set(kinds) == {*regimes.RESTATED, *regimes.ONCE}
    first = -len(script.prompt) % 16
    for probe in script.probes:
        answer = text[probe.start : probe.stop].strip()
        start = text.rfind("\n", 0, probe.start) + 1
        line, before = text[start : probe.start], text[:start]
        assert first + 4 * 256 <= probe.start, "asked for before all windows are full"
        if probe.kind in regimes.RESTATED:
            assert probe.back is None and answer.isdigit() == (probe.kind == "total")
            continue
        if line.endswith(", which is"):  # of a chain's second half, or of a step
            item = re.split("price of |that of ", line.removesuffix(", which is"))[-1]
            stated = f"The price of {item} is "
        else:
            stated = line.replace("Recall: the", "The") + " "
            # What stands in front of an answer says which kind it is.
            assert stated.endswith(" equals that of " if probe.kind == "chain" else " is ")
        assert before.count(stated) == 1 and before.split(stated)[1].startswith(answer + ".")
        assert probe.back == (probe.start - before.index(stated)) // 256
        if probe.kind in ("name", "copy", "use"):
            item = stated.split()[3]
            assert len(re.findall(rf"\b{item}\b", before)) == 1


def test_the_running_total_is_right():
    text = decode(regimes.script_of(encode, 0, window=256, windows=3, facts=5).forced)
    prices = dict(re.findall(r"The price of (\w+) is (\d+)\.", text))
    pattern = r"Step \d+: (add|take away) (the price of \w+, which is )?(\d+)\. The total is (\d+)\."
    steps = re.findall(pattern, text)
    assert len(steps) == text.count("Step ") > 12
    total, rooms = None, re.findall(r"The key (goes to|is still in) the (\w+)\.", text)
    assert len(rooms) == len(steps) and rooms[0][0] == "goes to"
    for (_, before), (verb, now) in itertools.pairwise(rooms):
        assert (verb == "is still in") == (before == now)
    for verb, what, price, said in steps:
        if what:
            assert prices[what.split()[3].strip(",")] == price
        if total is not None:
            total += int(price) if verb == "add" else -int(price)
            assert int(said) == total and 100 <= total < 1000
        total = int(said)


def test_shares_of_the_regimes_are_paired_over_scripts(tmp_path: Path):
    """Every answer of the full cache is right; another row loses what was stated once, except one
    script's; the null row loses all of it."""
    scripts = [regimes.script_of(encode, n, window=256, windows=3, facts=5) for n in range(3)]
    compared = [rows.reference(256), *rows.selectors(["kara", "random"], 256, [0.5])]
    for row in compared:
        for number, script in enumerate(scripts):
            top = []
            for step in script.measured():
                (probe,) = (p for p in script.probes if p.start <= step < p.stop)
                lost = row.name == "random" or (row.name == "kara" and number)
                top.append(probe.back is None or not lost)
            none = [0.0] * len(top)
            Cell(none, top, [0] * len(top), []).save(tmp_path, row.key, script.name)
    full, kara, random = regimes.figures(scripts, tmp_path, compared)
    for kind in regimes.RESTATED:
        assert [r[kind]["share"][0] for r in (full, kara, random)] == [1, 1, 1]
        assert kara[kind]["over_full"] == pytest.approx([0, 0, 0])
    asked = sum(p.back is not None for p in scripts[0].probes)
    share = asked / full["once"]["asked"]
    assert kara["once"]["share"][0] == pytest.approx(share)
    assert kara["once"]["over_full"] == pytest.approx([share - 1, -1, 0])
    assert kara["once"]["over_random"] == pytest.approx([share, 0, 1])
    assert full["once"]["over_random"] is None
    assert full["once"]["asked"] == sum(full[kind]["asked"] for kind in regimes.ONCE)
    total = sum(found["asked"] for found in full["by_back"].values())
    assert total == full["facts"]["asked"] == sum(full[kind]["asked"] for kind in regimes.FACTS)
    nothing = "100.0 | +0.0 (+0.0 to +0.0) |"
    assert f"| kara | 0.5 | {nothing} {nothing}" in regimes.table([full, kara, random])


@pytest.mark.parametrize("delay", [0, 16, 64, 200])
def test_what_is_repeated_from_behind_the_delay_is_known(delay: int):
    """Counted pass by pass, as a server does them; a character is a token here, so steps are long."""
    script = regimes.script_of(encode, 3, window=256, windows=4, facts=5)
    start, text, behind = len(script.prompt), decode(script.forced), []
    for probe in script.probes:
        done = -(-start // 16) * 16
        while done + 256 + delay <= start + probe.start - 1:
            done += 256
        if probe.source is None:
            assert probe.kind in regimes.ONCE
            expected = False
        else:
            said = text[probe.source : probe.start]
            assert re.match(r" \d{3}\. The" if probe.kind == "total" else r" [a-z]+\.\n", said)
            expected = start + probe.source < done
        assert regimes.is_behind(script, probe, 256, delay) == expected
        behind.append(expected)
    assert (sum(behind) > 3) == (delay < 200)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--rows", "kara", "x"], "--rows x: there is kara, "),
        (["--rows", "kara:x=1"], "--rows: 'kara:x=1': unknown 'x'"),
        (["--windows", "9", "--facts", "5"], "--windows 9 --facts 5: 42 facts at most"),
    ],
)
@pytest.mark.parametrize("module", [regimes, replayed])
def test_what_is_not_there_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], module: Any, given: list[str], says: str
):
    (tmp_path / "config.json").touch()
    assert module.main(["--model", str(tmp_path), "--out", str(tmp_path / "o.json"), *given]) == 1
    assert says in capsys.readouterr().err


def test_nothing_is_asked_for_before_the_delay_is_over():
    script = regimes.script_of(encode, 0, window=256, windows=3, facts=5, settle=200)
    first = min(probe.start for probe in script.probes)
    assert first >= -len(script.prompt) % 16 + 3 * 256 + 200


def test_what_both_rows_miss_is_no_difference():
    """Scripts differ, rows do not: an interval that is not paired would be wide."""
    mine = regimes.Counted(np.array([0.0, 5.0, 5.0]), np.array([5.0, 5.0, 5.0]))
    assert mine.over(mine) == [0, 0, 0]
    assert mine.share() == pytest.approx([2 / 3, 0, 1])


def test_the_plot_has_a_line_per_row_and_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    few, many = ({"asked": n, "share": [0.5, 0.4, 0.6]} for n in (19, 20))
    rows_ = [("full", 1.0), ("kara", 0.5), ("random", 0.5), ("kara", 0.25)]
    by_back = {"1": few, "2": many, "3": many}
    regimes.plot([{"row": r, "retain": s, "by_back": by_back} for r, s in rows_], tmp_path / "x.png")
    half, quarter = drawn[0].axes
    assert [line.get_label() for line in half.lines] == ["full", "kara", "random"]
    assert [line.get_label() for line in quarter.lines] == ["full", "kara"]
    assert half.lines[1].get_xydata().tolist() == [[2, 50], [3, 50]]


@pytest.mark.parametrize(
    ("gguf", "name"),
    [
        ("blk.3.attn_q.bias", "model.layers.3.self_attn.q_proj.bias"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("output.weight", "lm_head.weight"),
    ],
)
def test_names_of_the_coder_models_tensors(gguf: str, name: str):
    assert transformers_name(gguf) == name
    with pytest.raises(ValueError, match="unknown tensor"):
        transformers_name("blk.0.attn_x.weight")
