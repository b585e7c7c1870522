"""The benchmark of prefix reuse without servers: its report, its plot, what documents quote of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
from places import ROOT

from kara_sglang.benchmarks.reuse import chats, match, measure, modes
from kara_sglang.benchmarks.reuse.measure import ROWS, Sizes
from kara_sglang.benchmarks.reuse.report import draw, markdown, over_repetitions
from kara_sglang.benchmarks.serving.setup import Setup

RESULTS = ROOT / "benchmarks" / "results" / "serving"
RESULT = RESULTS / "reuse.json"
NAMES = ["stock", "exact", "compressed"]


@pytest.fixture(scope="module")
def result() -> dict:
    return json.loads(RESULT.read_text())


@pytest.fixture(scope="module")
def sizes(result: dict) -> Sizes:
    return Sizes(**result["sizes"])


def computed(runs: list, step: int) -> float:
    """Prompt tokens that no cache had."""
    prompt, cached = (over_repetitions(runs, step, f"{name}_tokens") for name in ("prompt", "cached"))
    return prompt - cached


def test_the_committed_report_is_that_of_the_committed_figures(result: dict, sizes: Sizes) -> None:
    head = f"`{result['command']}` on a {result['machine']['kind']}\n\n"
    assert RESULT.with_suffix(".md").read_text() == head + markdown(result, sizes)
    assert [row.name for row in ROWS] == NAMES == list(result["forks"])
    assert list(result["steps"]) == ["ample", "scarce"]


def test_medians_are_taken_over_repetitions() -> None:
    runs = [[{"ttft_ms": first}, {"ttft_ms": second}] for first, second in ((1, 9), (3, 7), (8, 8))]
    assert [over_repetitions(runs, step, "ttft_ms") for step in range(2)] == [3, 8]


def test_pools_hold_what_they_are_named_after() -> None:
    """Whole pages: all programs four times, half of them, and a chain with six forks."""
    sizes = Sizes(
        page_size=16, programs=3, steps=2, prompt=10, more=5, answer=20, chain=100, fork_answer=40
    )
    assert sizes.program == 10 + 20 + 5 + 20
    assert sizes.ample == 4 * 3 * 55
    assert sizes.scarce == 80 and 80 <= 3 * 55 / 2 < 96
    assert sizes.fork_pool == 528 and 528 <= 10 + 100 + 6 * (40 + 32) < 544


def test_the_plot_shows_what_was_computed(
    result: dict, sizes: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **options: drawn.append(self) or save(self, *a, **options)
    )
    draw(result, sizes, tmp_path / "reuse.png")
    assert (tmp_path / "reuse.png").read_bytes().startswith(b"\x89PNG")
    [figure] = drawn
    for panel, (pool, rows) in zip(figure.axes, result["steps"].items(), strict=True):
        assert panel.get_title() == f"{pool} pool"
        lines = {line.get_label(): line.get_ydata().tolist() for line in panel.lines}
        expected = {name: [computed(rows[name], step) for step in range(4)] for name in NAMES}
        assert lines == expected


def test_what_the_documents_quote(result: dict, sizes: Sizes) -> None:
    section = (ROOT / "docs" / "throughput.md").read_text().partition("\n## Prefix reuse\n")[2]
    section = " ".join(section.partition("\n## ")[0].split())
    for pool, rows in result["steps"].items():
        for step in (1, 2, 3):
            tokens = {name: f"{computed(rows[name], step):.0f}" for name in NAMES}
            tokens["stock"] += f" of {over_repetitions(rows['stock'], step, 'prompt_tokens'):.0f}"
            times = {name: over_repetitions(rows[name], step, "ttft_ms") for name in NAMES}
            cells = (f"{tokens[name]}, {times[name]:,.0f} ms" for name in NAMES)
            first = f"{pool} ({getattr(sizes, pool):,} slots)" if step == 1 else ""
            assert " ".join(f"| {first} | {step + 1} | {' | '.join(cells)} |".split()) in section
    stock, exact, ours = (result["forks"][name] for name in NAMES)
    peaks, steps = (
        [row[key] for row in (stock, exact, ours)] for key in ("peak_running", "decode_steps")
    )
    for sentence in (
        f"{sizes.forks} forks of a chain of {sizes.chain:,} tokens, each of which writes "
        f"{sizes.fork_answer:,} more, in {sizes.fork_pool:,} slots: stock runs {peaks[0]} at once, "
        f"`exact` {peaks[1]}, `compressed` {peaks[2]}.",
        f"They take {steps[0]:,}, {steps[1]:,} and {steps[2]:,} decode steps.",
    ):
        assert sentence in section
    assert ours["peak_running"] / stock["peak_running"] == result["forks_ratio"] >= 1.8


def test_a_server_is_up_before_it_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = SimpleNamespace(wait=lambda: "ready")
    monkeypatch.setattr(measure, "start", lambda *_arguments: started)
    setup = Setup("m", "float32", 64, 16, 0.25, 16, cpu=True)
    assert measure.start_row(ROWS[0], setup, 3408, tmp_path) == "ready"


# -- both modes on one server --------------------------------------------------------------------------


def test_a_turn_in_both_modes() -> None:
    def step(*output: int) -> SimpleNamespace:
        return SimpleNamespace(output_ids=output, prompt_tokens=90, reused_tokens=64, reused_slots=32)

    one = modes._difference(1, step(4, 5, 6, 7), step(4, 5, 9, 7, 8))
    assert (one.turn, one.tokens, one.alike, one.equal) == (2, 4, 2, 3)
    assert modes._difference(0, step(4, 5), step(4, 5)).alike == 2
    assert modes.markdown([("tea", one)]).splitlines()[-1] == (
        "| tea | 2 | 90 | 64 in 32 slots | 4 | 2 | 75% |"
    )


def test_modes_needs_a_server_with_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert modes.main(["tea", "--endpoint", "http://127.0.0.1:9"]) == 2
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err
    for settings in (None, {"prefix_reuse": "exact"}):
        monkeypatch.setattr(modes, "KaraEndpoint", lambda _url, s=settings: SimpleNamespace(settings=s))
        assert modes.main(["tea"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "start it with --kv-compress-prefix-reuse compressed" in error


def test_modes_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = modes.Difference(2, 90, 64, 32, 4, 2, 3)
    endpoint = SimpleNamespace(settings={"prefix_reuse": "compressed"})
    monkeypatch.setattr(modes, "KaraEndpoint", lambda _url: endpoint)
    monkeypatch.setattr(modes, "compare", lambda *_arguments: [one])
    assert modes.main(["tea", "bees", "--out", str(tmp_path / "modes.json")]) == 0
    kept = json.loads((tmp_path / "modes.json").read_text())
    assert kept["command"].endswith("modes tea bees --out modes.json")
    assert modes.of_json(kept["turns"]) == [("tea", one), ("bees", one)]


def test_the_documents_talks_are_the_committed_ones() -> None:
    kept = json.loads((RESULTS / "modes.json").read_text())
    assert modes.markdown(modes.of_json(kept["turns"])) in (ROOT / "docs" / "frontend.md").read_text()


def test_a_match_is_measured_on_the_real_cache() -> None:
    """The whole text where its row is there, as much as is there exactly where it is not."""
    text = array("q", (2 + index % 99_991 for index in range(match.TEXT)))
    found = {}
    for case in itertools.islice(match.cases(), 2):
        one = dataclasses.replace(case, remembered=case.remembered[:8])
        result = match.measure(one, text, repetitions=1)
        found[case.name] = result["found"]
        assert all(result[f"{name}_ms"] > 0 for name in ("hash", "stock", "first", "again"))
    assert found == {"honest": [match.TEXT - 1] * 2, "gone": [2000] * 2}


# -- chats ---------------------------------------------------------------------------------------------


def test_a_turn_of_a_chat_is_a_cell() -> None:
    exact, compressed = chats.Turn(1400, 400, 0, 812.4), chats.Turn(1400, 1390, 1024, 99.6)
    text = chats.markdown({"kept": {"exact": [exact], "compressed": [compressed]}})
    assert text.splitlines()[-1] == (
        "| 1 | 1,000 of 1,400, 812 ms | 10 of 1,400 (1,024 compressed), 100 ms |"
    )


def test_the_talks_are_as_said() -> None:
    """Five turns each; the tool's results are parts of one real text, one behind the other."""
    kept, removed, agent = chats.talks()
    for talk in (kept, removed, agent):
        assert len(talk.asked) == len(talk.answers) == 5
    assert (kept.sent_back, removed.sent_back, agent.sent_back) == (1.0, 0.25, 1.0)
    parts = [content for role, content in agent.asked if role == "tool"]
    assert len(parts) == 4 and len("".join(parts)) == 4 * chats.TOOL_CHARACTERS
    assert "".join(parts) in (ROOT / "benchmarks/quality/data/development/doc-pdb.txt").read_text()


def test_the_committed_chats() -> None:
    """Where answers are sent back, `exact` computes them again, `compressed` finds nearly what stock
    finds, and `auto` does the one below its mark and the other above it."""
    result = json.loads((RESULTS / "chats.json").read_text())
    found = chats.of_json(result)
    head = f"`{result['command']}` on a {result['machine']['kind']}\n\n"
    assert (RESULTS / "chats.md").read_text() == head + chats.markdown(found)
    page = chats.PAGE
    for name, answers in result["answers"].items():
        stock, exact, auto, compressed = (found[name][row.name] for row in chats.CHAT_ROWS)
        for turn, before in zip(range(1, 5), answers, strict=False):
            again = exact[turn].computed - stock[turn].computed
            assert abs(compressed[turn].computed - stock[turn].computed) <= page
            took = auto[turn].reused_tokens > 0
            assert abs(auto[turn].computed - (compressed if took else exact)[turn].computed) <= page
            if name == "removed":
                assert again <= page
            else:
                compressed_any = before >= result["window"] + result["delay"]
                assert again >= before - page if compressed_any else again == 0
                assert took == (before > result["least"])
