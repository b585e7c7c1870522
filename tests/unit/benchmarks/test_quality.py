"""Figures and tables of the quality benchmark."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from places import ROOT
from quality import fill

from kara_sglang.benchmarks.quality import estimates, report, rows
from kara_sglang.benchmarks.research import search


def test_means_have_standard_errors():
    assert estimates.mean([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 3 / 4)))
    assert math.isnan(estimates.mean([1.0]).error) and estimates.known(math.nan) is None
    with pytest.raises(ValueError):
        estimates.mean([])


def test_a_ratio_is_exact_for_proportional_pairs_and_uncertain_for_others():
    assert estimates.ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == pytest.approx((0.5, 0.0))
    rng = np.random.default_rng(0)
    spread = []
    for _ in range(400):
        b = rng.uniform(1, 2, 40)
        a = b * rng.uniform(0.4, 0.8, 40)
        spread.append(estimates.ratio(a.tolist(), b.tolist()))
    observed = np.std([e.value for e in spread])
    assert np.mean([e.error for e in spread]) == pytest.approx(observed, rel=0.1)


def test_wilsons_interval():
    assert estimates.share_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = estimates.share_interval(0, 20)
    assert low == 0 and high == pytest.approx(0.1611, abs=1e-4)
    assert estimates.share_interval(20, 20)[1] == 1
    with pytest.raises(ValueError):
        estimates.share_interval(0, 0)


def test_ranks_share_ties():
    assert estimates.ranks({"a": 0.2, "b": 0.1, "c": 0.2}) == {"a": 2.5, "b": 1.0, "c": 2.5}


def test_figures_come_from_the_cells(small_part, tmp_path: Path):
    part, scripts = small_part
    kl = {"full": 0, "kara": 0.05, "paper": 0.1, "random": 0.4, "recent": 0.3, "snapkv": 0.2}
    fill(tmp_path, part, scripts, kl)
    records = {r["row"]: r for r in report.figures(part, scripts, tmp_path)}
    kara = records["kara"]
    # Text scripts are the first and the third: their KL is 1 and 3 times the row's.
    assert kara["kl_text"] == pytest.approx(0.1) and kara["kl_text_se"] == pytest.approx(0.05)
    assert kara["recall"] == 1.0 and records["paper"]["recall"] == 0.0
    assert kara["recall_back_1"] == 1.0
    assert kara["recall_by_kind"] == {"pair": [4, 4]}
    assert records["paper"]["recall_by_kind"] == {"pair": [0, 4]}
    places = {f"{p.back}/{p.offset:g}" for s in scripts for p in s.probes if p.offset is not None}
    assert len(places) > 1 and set(kara["recall_by_place"]) == places
    assert sum(asked for _, asked in kara["recall_by_place"].values()) == 4
    assert all(right == asked for right, asked in kara["recall_by_place"].values())
    assert all(right == 0 for right, _ in records["paper"]["recall_by_place"].values())
    assert "| paper | 0.5 | 0 of 4 |" in report.kinds_table(list(records.values()), "small", "0.5")
    assert records["paper"]["recall_below_full"] == 1.0
    assert kara["perplexity"] == pytest.approx(math.exp(1.05))
    assert kara["nll_over_full"] == pytest.approx(0.05)
    assert records["full"]["kl_text"] == 0
    goals = report.goals(part, scripts, tmp_path)
    assert goals["0.5"]["kl_text_over_paper"] == pytest.approx(0.5)
    assert goals["0.5"]["recall_over_paper"] == 1.0
    # Only the fact before the newest window counts.
    assert goals["0.5"]["recall_below_full_by_offset"] == {"0.5": (0.0, 0.0)}
    kl["kara"] = 0.2
    fill(tmp_path, part, scripts, kl)
    lost = report.goals(part, scripts, tmp_path)["0.5"]["recall_below_full_by_offset"]
    assert lost == {"0.5": (1.0, 0.0)}
    assert "| 0.5 | 1.000 ± 0.000 |" in report.goal_table(report.goals(part, scripts, tmp_path))
    assert goals["mean_rank"] == {"kara": 1, "paper": 2, "snapkv": 3, "recent": 4, "random": 5}


def test_tables_are_put_between_their_marks(small_part, tmp_path: Path):
    part, scripts = small_part
    fill(tmp_path, part, scripts, dict.fromkeys((r.name for r in part.rows), 0.2))
    result = {
        "results": report.figures(part, scripts, tmp_path),
        "goals": report.goals(part, scripts, tmp_path),
    }
    (tmp_path / "here.json").write_text(json.dumps(result))
    mark = "<!-- quality:{0} -->\nold\n<!-- end of quality -->\n"

    def put(document: str) -> str:
        return report.put_into(document, tmp_path)

    document = "above\n" + mark.format("here small/selectors") + "between\n" + mark.format("gone x/y")
    new = put(document)
    assert "old" not in new.split("between")[0] and "old" in new.split("between")[1]
    assert new.startswith("above\n") and "| kara | 0.5 | 0.4000 ± 0.2000 |" in new
    assert put(new) == new
    one = put(mark.format("here small/selectors@0.5"))
    assert "| full | 1 |" in one and "| kara | 0.5 |" in one
    assert "| selector | mean rank |" in put(mark.format("here small/goals"))
    assert "| kara |" not in put(mark.format("here small/selectors@0.25"))
    for unknown in ("other/goals", "other/selectors", "small/ablations"):
        with pytest.raises(ValueError, match=f"here.json has no {unknown}"):
            put(mark.format(f"here {unknown}"))


def test_a_run_can_be_of_some_rows_only():
    def keys(*arguments) -> list[list[str]]:
        return [[row.key for row in part.rows] for part in rows.only(*arguments)]

    assert keys(rows.quick(), ["kara", "paper"], [0.5]) == [["full", "kara@0.5", "paper@0.5"]]
    everything = [[row.key for row in part.rows] for part in rows.full()]
    assert keys(rows.full(), None, None) == everything
    assert keys(rows.full(), ["kara"], [0.2]) == [["full", "kara@0.2"]]
    assert keys(rows.full(), ["window 512"], None) == [["full", "window-512@0.5", "window-512@0.25"]]
    with pytest.raises(ValueError, match="--rows kvllm: there is full, kara, keys, random, recent"):
        rows.only(rows.quick(), ["kara", "kvllm"], None)
    with pytest.raises(ValueError, match=r"--shares 0.4: there is 1.0, 0.5, 0.25"):
        rows.only(rows.quick(), None, [0.4])


def test_the_documents_tables_are_the_committed_results():
    """Rendered by ``search --into`` and ``report --into``; a figure edited by hand is found here."""
    root = ROOT
    document, readme = ((root / name).read_text() for name in ("docs/quality.md", "README.md"))
    results = root / "benchmarks" / "results" / "quality"
    searches = (results / "README.md").read_text()
    assert "<!-- search:search-5 -->\n| row |" in searches
    assert search.put_into(searches, results) == searches
    assert "<!-- search:held-out-keys-128 -->\n| row |" in searches
    assert "<!-- search:search-12" in searches
    windows = json.loads((results / "windows.json").read_text())["results"]
    places = {r["row"]: r["recall_by_place"] for r in windows if r["retain"] in (0.5, 1)}
    assert places["full"] == places["window 512"] == places["window 1024"]  # as docs/quality.md says
    for name in (
        "quick",
        "coder",
        "coder-keys",
        "coder-paged",
        "full",
        "full-keys",
        "gemma",
        "half",
        "windows",
        "ring",
        "kv",
        "kv-keys",
    ):
        result = json.loads((results / f"{name}.json").read_text())
        assert (results / f"{name}.md").read_text() == report.markdown(result)
    marks = (
        (document, "quick quick/selectors"),
        (document, "regimes-coder"),
        (searches, "regimes"),
        (searches, "regimes-search"),
        (searches, "regimes-delay"),
        (readme, "gsm8k-h100 @0.5"),
    )
    for text, shown in marks:
        assert f"<!-- quality:{shown} -->\n| row |" in text
        assert report.put_into(text) == text
