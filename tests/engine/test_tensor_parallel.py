"""``sglang.Engine`` with tensor parallelism 2: configure(), ranks that agree, checked options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exactness import PROMPTS
from places import ROOT
from server import Server, run

from kara_sglang.trace.format import file_name, load, merge

NGRAM = {
    "speculative_algorithm": "NGRAM",
    "speculative_num_draft_tokens": 4,
    "speculative_ngram_max_bfs_breadth": 1,
}


@pytest.mark.parametrize(
    "drafts", [{}, pytest.param(NGRAM, marks=pytest.mark.slow)], ids=["plain", "drafts"]
)
def test_engine_with_two_ranks(
    stock: Server, tiny_model: Path, logs: Path, tmp_path: Path, drafts: dict[str, object]
) -> None:
    """Identity and opted-out requests give stock's tokens. With `debug_checks` the ranks compare which
    windows they took at each pass, and SGLang's checker compares each match and insertion of the prefix
    cache; a difference ends the engine."""
    log = logs / "tp2.log"
    program = ROOT / "tests" / "support" / "tp2_engine.py"
    arguments = (str(program), str(tiny_model), str(tmp_path), json.dumps(drafts))
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1"}
    with run(arguments, log, env) as process:
        process.wait(timeout=400)
    lines = [line for line in log.read_text().splitlines() if line.startswith("RESULT ")]
    assert lines, log.read_text()[-4000:]
    result = json.loads(lines[-1][7:])

    answers = result["answers"]
    reports = [answer["meta_info"]["kv_compress"] for answer in answers]
    assert [report["windows"] for report in reports] == [4, 4, 4, 0]
    assert [report["tokens_removed"] for report in reports] == [128, 0, 192, 0]
    stock.flush()
    expected = stock.generate(PROMPTS)
    for index in (1, 3):
        assert result["answers"][index]["output_ids"] == expected[index]["output_ids"]
        assert ("spec_accept_length" in result["answers"][index]["meta_info"]) == bool(drafts)
    assert all(len(answer["output_ids"]) == 300 for answer in result["answers"])
    # 5 + 299 tokens: four windows of 64 from 16 on, then whole pages.
    reused = result["follow_up"]["meta_info"]
    assert reused["cached_tokens"] == 304
    report = reused["kv_compress"]
    assert (report["reused_tokens"], report["reused_slots"]) == (304 - 16, 304 - 16 - 128)
    assert "kv_compress.retain" in result["error"]

    # Forged keys: refused by the launcher, and without effect where they get past it.
    assert "input_ids" in result["refusal"]
    assert result["cached"] == [0, 0]
    (first, honest), (again, attacked) = result["stories"]
    assert first == again
    assert attacked["output_ids"] == honest["output_ids"]
    for name in ("cached_tokens", "kv_compress"):
        assert attacked["meta_info"][name] == honest["meta_info"][name]
    assert honest["meta_info"]["kv_compress"]["reused_tokens"] == 304 - 16
    for state in result["states"]:
        assert (state["windows"], state["slots_freed"]) == (20, 576)
        assert state["settings"]["kept"] == pytest.approx(32)

    # Each rank wrote what its own heads kept.
    assert len(list(tmp_path.iterdir())) == 2 * (3 + 2)  # and two of the forgery's
    for index, selector in ((0, "kara"), (1, "identity"), (2, "random")):
        answer = result["answers"][index]
        rid = answer["meta_info"]["id"]
        trace = merge([load(tmp_path / file_name(rid, rank, 2)) for rank in (1, 0)])
        assert (trace.about.selector, trace.about.heads) == (selector, [0, 1, 2, 3])
        assert trace.output_ids.tolist() == answer["output_ids"]
        removed = trace.windows[:, 2].sum() - trace.keeps().sum(axis=(0, 3))
        assert (removed == answer["meta_info"]["kv_compress"]["tokens_removed"]).all()
