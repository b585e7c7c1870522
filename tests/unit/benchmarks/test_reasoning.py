"""Grading of answers, and what is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from kara_sglang.benchmarks.quality import pace, reasoning, report, texts
from kara_sglang.benchmarks.quality.pace import Pace


def test_problems_are_read_in_the_forms_of_gsm8k_and_math(tmp_path: Path):
    (first, *rest) = reasoning.load(texts.DATA / "gsm8k.jsonl", 3)
    assert first.question.startswith("Janet") and first.answer == "18" and len(rest) == 2
    path = tmp_path / "math.jsonl"
    path.write_text(
        json.dumps({"problem": "p", "answer": "\\frac{1}{2}"})
        + "\n"
        + json.dumps({"Question": "q", "Answer": "#### 1,234"})
        + "\n"
    )
    assert [p.answer for p in reasoning.load(path, None)] == ["\\frac{1}{2}", "1234"]
    path.write_text('{"text": "?"}\n')
    with pytest.raises(reasoning.Failed, match="line 1: no question"):
        reasoning.load(path, None)


def test_answers_are_graded_by_value():
    pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]'")
    right = reasoning.grader()
    assert right("18", "So she makes 9 * 2 = \\boxed{18} dollars.")
    assert right("18", "The final answer is \\boxed{18.0}")
    assert not right("18", "9 * 2 = 18, minus 1 is \\boxed{17}")
    assert right("\\frac{1}{2}", "which is \\boxed{0.5}")
    assert right("1234", "\\boxed{1,234}")
    assert not right("18", "I do not know.")


def _answer(right: bool, tokens: int, windows: int, cut: bool = False) -> dict:
    kv_compress = {"windows": windows, "kv_slots_held": tokens - 32 * windows} if windows else None
    return {"right": right, "tokens": tokens, "cut": cut, "kv_compress": kv_compress}


def test_accuracy_is_paired_over_the_problems(tmp_path: Path):
    asked = reasoning.rows_of(["full", "random", "kara"], [0.25])
    assert [row.key for row in asked] == ["full", "random@0.25", "kara@0.25"]
    answers = {
        "full": {n: [_answer(n < 6, 100, 0)] for n in range(8)},
        "random@0.25": {n: [_answer(n < 2, 100, 1)] for n in range(8)},
        "kara@0.25": {n: [_answer(n < 5, 150, n % 2, cut=n == 7)] for n in range(8)},
    }
    full, random, kara = found = reasoning.figures(answers, asked, window=64)
    assert (full["accuracy"], full["retain"]) == (0.75, 1.0)
    assert full["over_full"] == [0, 0, 0] and full["over_random"] is None
    value, low, high = kara["over_full"]
    assert value == pytest.approx(-0.125) and low == pytest.approx(-0.375) and high == 0
    assert kara["over_random"][0] == pytest.approx(0.375) and kara["over_random"][1] > 0
    assert random["over_random"] is None
    assert kara["longer_than_full"] == pytest.approx([0.5, 0.5, 0.5])
    assert kara["accuracy_low"] < kara["accuracy"] < kara["accuracy_high"]
    assert (kara["output_tokens"], kara["truncated"], kara["windows"]) == (150, 0.125, 0.5)
    assert kara["requests_compressed"] == 0.5
    assert kara["tokens_compressed"] == pytest.approx(4 * 64 / 1200)
    assert kara["graded"] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert (full["kv_slots_at_end"], random["kv_slots_at_end"], kara["kv_slots_at_end"]) == (
        None,
        68,
        118,
    )
    assert "| kara | 0.25 | 62.5 (" in reasoning.table(found)
    (tmp_path / "some.json").write_text(json.dumps({"results": found}))
    document = report.put_into("<!-- quality:some -->\n<!-- end of quality -->", tmp_path)
    assert document == f"<!-- quality:some -->\n{reasoning.table(found)}<!-- end of quality -->"


def test_several_samples_count_by_their_mean():
    """The interval is over problems: samples of one are no new evidence."""
    asked = reasoning.rows_of(["full", "kara"], [0.5])
    answers = {
        "full": {n: [_answer(True, 100, 0)] * 4 for n in range(50)},
        "kara@0.5": {n: [_answer(n % 2 == 0, 80, 1)] * 3 + [_answer(True, 160, 1)] for n in range(50)},
    }
    full, kara = found = reasoning.figures(answers, asked, window=64)
    assert full["accuracy"] == 1.0 and kara["accuracy"] == (1 + 0.25) / 2
    assert (kara["samples"], kara["problems"], kara["graded"][:2]) == (4, 50, [4, 1])
    assert kara["accuracy_high"] - kara["accuracy_low"] == pytest.approx(0.21, abs=0.03)
    assert kara["output_tokens"] == 100 and kara["tokens_compressed"] == pytest.approx(0.64)
    assert kara["longer_than_full"][0] == pytest.approx(0)
    assert reasoning.table(found).splitlines()[-1].endswith(f"| {kara['kv_slots_at_end']:.0f} |")


def test_samples_need_a_temperature(capsys):
    with pytest.raises(SystemExit):
        reasoning.parse(["--out", "x.json", "--samples", "4"])
    assert "--samples: greedy answers are all alike" in capsys.readouterr().err
    found = reasoning.parse(["--out", "x.json", "--samples", "4", "--temperature", "0.6"])
    assert (found.samples, found.top_p) == (4, 0.95)


def test_the_bootstrap_is_paired_and_covers_the_mean():
    """Equal answers in the same places differ by nothing, whatever is drawn; a known share has the
    binomial's interval."""
    ours = np.array([1.0, 0.0] * 200)
    assert reasoning.difference(ours, ours) == [0, 0, 0]
    value, low, high = reasoning.difference(ours, np.zeros(400))
    assert (
        value == 0.5 and low == pytest.approx(0.45, abs=0.01) and high == pytest.approx(0.55, abs=0.01)
    )


def test_rows_have_their_servers_and_options():
    made = {
        row.key: row for row in reasoning.rows_of(["full", "again", "recent", "paper"], [0.5, 0.25])
    }
    assert list(made) == ["full", "again", "recent@0.5", "paper@0.5", "recent@0.25", "paper@0.25"]
    assert made["again"].options is False
    assert made["recent@0.25"].options == {"selector": "recent", "retain": 0.25}
    assert made["paper@0.5"].options == {"selector": "kara", "retain": 0.5}
    assert made["paper@0.5"].settings == {"preset": "paper"} and made["recent@0.5"].settings == {}


class _Asked:
    """Stands in for a server: remembers how it was started and what it was asked."""

    def __init__(self) -> None:
        self.settings: list[dict] = []
        self.stopped = 0

    def serve(self, _options, own: dict, _log) -> _Asked:
        self.settings.append(own)
        self.url = "http://nowhere"
        return self

    def stop(self) -> None:
        self.stopped += 1


def test_answers_are_collected_once_and_graded_later(tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]'")
    asked: list[tuple[int, str, int]] = []

    def ask(_url, problem, row, sample, _options):
        asked.append((problem.number, row.key, sample))
        text = "\\boxed{18}" if row.key != "paper@0.5" else "\\boxed{17}"
        return {"text": text, "tokens": 10, "cut": False, "seconds": 1.0, "kv_compress": None}

    servers = _Asked()
    monkeypatch.setattr(reasoning, "serve", servers.serve)
    monkeypatch.setattr(reasoning, "ask", ask)
    monkeypatch.setattr(reasoning, "fastest", lambda *_: Pace("bfloat16", 2, {"bfloat16/2": 1.0}))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 8, "intermediate_size": 16}')
    data = tmp_path / "problems.jsonl"
    data.write_text('{"question": "q", "answer": "#### 18"}\n' * 3)
    arguments = [
        *("--out", str(tmp_path / "out.json"), "--data", str(data)),
        *("--rows", "full", "random", "paper", "--model", str(model), "--temperature", "0.6"),
    ]
    assert reasoning.main([*arguments, "--collect"]) == 0
    assert not (tmp_path / "out.json").exists()
    assert servers.settings == [{}, {"preset": "paper"}] and servers.stopped == 2
    assert len(asked) == len(set(asked)) == 9
    assert reasoning.main(arguments) == 0
    assert len(asked) == 9, "what is there is not asked again"
    assert reasoning.main([*arguments, "--samples", "2"]) == 0
    assert len(asked) == len(set(asked)) == 18 and {sample for *_, sample in asked} == {0, 1}
    monkeypatch.setattr(reasoning, "fastest", lambda *_: Pace("float32", 2, {"float32/2": 1.0}))
    assert reasoning.main([*arguments, "--samples", "3"]) == 0
    kept = json.loads((tmp_path / "out.run" / "answered.json").read_text())
    assert kept["dtype"] == "bfloat16", "a run that goes on keeps its dtype"
    assert reasoning.main([*arguments, "--samples", "4", "--dtype", "float32"]) == 1
    assert "--dtype float32: " in (said := capsys.readouterr().err) and "in bfloat16" in said
    assert reasoning.main([*arguments, "--temperature", "0"]) == 1
    assert "holds another run (other temperature)" in capsys.readouterr().err
    result = json.loads((tmp_path / "out.json").read_text())
    assert [r["accuracy"] for r in result["results"]] == [1, 1, 0]
    assert "--collect" not in result["meta"]["command"]
    answered = json.loads((tmp_path / "out.run" / "answered.json").read_text())
    assert answered.items() <= result["meta"].items()
    assert (answered["dtype"], answered["threads"]) == ("bfloat16", "2")


def test_the_pace_is_what_was_measured_fastest(monkeypatch):
    took = {(torch.float32, 1): 4.0, (torch.bfloat16, 1): 3.0, (torch.float32, 2): 2.0}
    before = torch.get_num_threads()

    def time(hidden, inner, batch, dtype):
        assert (hidden, inner, batch) == (8, 16, 32)
        return took.get((dtype, torch.get_num_threads()), 5.0)

    monkeypatch.setattr(pace, "_time", time)
    monkeypatch.setattr(pace.os, "sched_getaffinity", lambda _: {0, 1})
    config = SimpleNamespace(hidden_size=8, intermediate_size=16)
    whole = SimpleNamespace(get_text_config=lambda: config)
    monkeypatch.setattr(AutoConfig, "from_pretrained", {"org/model": whole}.get)
    found = pace.fastest("org/model", 32)
    assert (found.dtype, found.threads) == ("float32", 2)
    assert found.milliseconds["bfloat16/1"] == 3000.0 and len(found.milliseconds) == 4
    assert torch.get_num_threads() == before
