"""The programme of the GPU kit: order, resuming, what is left out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from places import ROOT

from kara_sglang.benchmarks.gpu import run_all, throughput


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the programme on steps that are a line of Python each; returns its exit code and status."""

    def programme(
        *lines: tuple[str, str, float],
        words: tuple[str, ...] = (),
        more: bool = False,
        goes_on: bool = False,
    ) -> tuple[int, dict]:
        made = [
            run_all.Step(name, name, minutes, "none", (line,), more=more, goes_on=goes_on)
            for name, line, minutes in lines
        ]
        monkeypatch.setattr(run_all, "STEPS", made)
        monkeypatch.setattr(
            run_all,
            "command",
            lambda step, out, *_: [sys.executable, "-c", step.arguments[0], str(step.result(out))],
        )
        monkeypatch.setattr(sys, "argv", ["run_all", "--out", str(tmp_path / "out"), *words])
        code = run_all.main()
        return code, json.loads((tmp_path / "out" / "status.json").read_text())["steps"]

    return programme


WRITES = "import sys; open(sys.argv[1], 'a').write('1')"

FAILS = f"{WRITES}; raise SystemExit(3)"


def test_a_step_that_is_cut_off_keeps_what_it_has(steps, tmp_path: Path):
    begun = f"{WRITES}; import time; time.sleep(600)"
    code, found = steps(("slow", begun, 0.05), ("next", WRITES, 1), ("bad", FAILS, 1))
    assert code == 1
    assert found["slow"]["ended"] == "its time was over" and not found["slow"]["good"]
    assert (tmp_path / "out" / "slow" / "slow.json").read_text() == "1"
    assert found["next"]["good"] and found["bad"]["ended"] == "exit code 3"


def test_flashinfer_is_found_by_the_steps_that_ask_for_it_only(steps, tmp_path: Path):
    looks = "import os, sys; open(sys.argv[1], 'w').write(os.environ.get('PYTHONPATH', ''))"
    names = ("identity", "paged_decode", "scarce")
    code, _ = steps(*((name, looks, 1) for name in names), words=("--flashinfer", "/where/it/lies"))
    assert code == 0
    said = [(tmp_path / "out" / name / f"{name}.json").read_text() for name in names]
    assert ["/where/it/lies" in path.split(os.pathsep) for path in said] == [True, True, False]


def test_what_has_ended_well_is_not_run_again(steps, tmp_path: Path):
    assert steps(("one", WRITES, 1))[0] == 0
    code, found = steps(("one", FAILS, 1))
    assert code == 0 and found["one"]["good"]
    code, found = steps(("one", WRITES, 1), words=("--again",))
    assert code == 0 and found["one"]["good"]
    assert (tmp_path / "out" / "one.1" / "one.json").read_text() == "1"
    assert (tmp_path / "out" / "one" / "one.json").read_text() == "1"


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_has_not_ended_well_is_run_again(steps, tmp_path: Path, goes_on: bool):
    """Its first result is kept, or gone on with."""
    assert steps(("one", FAILS, 1), goes_on=goes_on)[0] == 1
    code, found = steps(("one", WRITES, 1), goes_on=goes_on)
    assert code == 0 and found["one"]["good"]
    result = tmp_path / "out" / "one" / "one.json"
    assert result.read_text() == ("11" if goes_on else "1")
    assert (tmp_path / "out" / "one.1" / "one.json").exists() is not goes_on


def test_the_status_remembers_former_calls(steps):
    """Also of a step that this call does not choose, or has no time for."""
    lines = (("one", WRITES, 1), ("two", FAILS, 1))
    assert steps(*lines, words=("--only", "one"))[0] == 0
    code, found = steps(*lines, words=("--only", "two"))
    assert code == 1 and found["one"]["good"] and found["two"]["ended"] == "exit code 3"
    code, found = steps(*lines, words=("--seconds", "30"))
    assert code == 1 and found["one"]["good"]
    assert found["two"]["ended"] == "exit code 3"
    assert found["two"]["not_run"] == "0.5 minutes are left, and it may take 1"


def test_a_programme_that_is_killed_leaves_no_step_that_ended_well(steps, monkeypatch, tmp_path: Path):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_all, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        steps(("one", WRITES, 1))
    found = json.loads((tmp_path / "out" / "status.json").read_text())["steps"]
    assert found["one"] == {"ended": "the programme was cut off", "good": False}


def test_more_steps_are_run_only_where_they_are_named(steps):
    assert steps(("one", WRITES, 1), more=True) == (0, {})
    assert steps(("one", WRITES, 1), more=True, words=("--only", "one"))[1]["one"]["good"]


def test_a_step_that_is_named_and_cannot_be_run_is_a_failure(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(run_all, "NEEDS", run_all.NEEDS | {"gpu": lambda _: "there is no CUDA GPU"})
    words = ["run_all", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert run_all.main() == 0  # nothing of it can be run here
    monkeypatch.setattr(sys, "argv", [*words, "--only", "kernels"])
    assert run_all.main() == 1


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(run_all, "NEEDS", run_all.NEEDS | {"gpu": lambda _: None})
    by_name = {step.name: step for step in run_all.STEPS}
    assert run_all.missing(by_name["gsm8k"], {}, False) == "--coder names no folder"
    assert run_all.missing(by_name["gsm8k"], {"coder": "/models/coder"}, False) is None
    assert run_all.missing(by_name["paged_decode"], {"flashinfer": "/fi"}, False) is None


@pytest.mark.parametrize("given", [{}, {"coder": "/models/coder"}], ids=["the kit", "the coder model"])
def test_identity_runs_with_what_the_kit_carries(monkeypatch, given):
    """SmolLM2, and the attention backends that are there; a larger model where it is given."""
    monkeypatch.setattr(run_all, "NEEDS", run_all.NEEDS | {"gpu": lambda _: None})
    [step] = (step for step in run_all.STEPS if step.name == "identity")
    assert run_all.missing(step, given, False) is None
    words = run_all.command(step, Path("out"), given, False)
    assert words[words.index("--model") + 1] == given.get("coder", "smollm2")
    assert "--backends" not in words
    assert words[-2:] == ["--output", str(Path("out") / "identity" / "identity.json")]


def test_the_programme_fits_half_an_hour_and_each_step_one_call():
    assert sum(step.minutes for step in run_all.STEPS if not step.more) <= 30
    assert max(step.minutes for step in run_all.STEPS) <= 9


@pytest.mark.parametrize(
    "step", [step for step in run_all.STEPS if step.module == "gpu.throughput"], ids=lambda s: s.name
)
def test_throughput_steps_fit_their_minutes(step):
    """Rows times repetitions times seconds, and the starts and profiles besides."""
    options = throughput.parse([*step.arguments, "--output", "x.json"])
    assert 0.6 * step.minutes < throughput.expected_seconds(options) / 60 < step.minutes


def test_the_seconds_of_throughput_by_hand():
    words = "--output x --groups kvllm --repetitions 2 --ramp 10 --measured 20 --profiled stock"
    runs = 2 * (2 + 2)  # two rows at both points
    seconds = throughput.START_SECONDS + throughput.PROFILE_SECONDS
    seconds += runs * (30 + throughput.TURN_SECONDS)
    assert throughput.expected_seconds(throughput.parse(words.split())) == seconds


class IdleServer:
    """Counts how often servers are started."""

    started: ClassVar[list[str]] = []

    def __init__(self, peer, row, setup, log) -> None:
        self.url = "http://none"
        self.started.append(row.name)

    def wait(self) -> None:
        pass

    def stop(self) -> None:
        pass


def test_throughput_goes_on_where_it_was_cut_off(monkeypatch, tmp_path: Path):
    measured: list[str] = []

    def measure(server, clients, count, ramp, seconds):
        if seconds == 2:  # the warm-up
            return {}
        if len(measured) == 3:
            measured.append("cut off")
            raise KeyboardInterrupt
        measured.append(clients._row.name)
        counters = {"held": 1.0, "mean_running": 1.0, "peak_running": 1, "retractions": 0}
        return {
            "output_tokens_per_s": 1.0,
            "parts": [1.0],
            "counters": counters,
            "itl_ms": {"median": 1.0, "p99": 1.0},
            "retained": 1.0,
        }

    def profile_row(*_):
        assert not measured, "profiles come first"
        return {"steps": 1}

    monkeypatch.setattr(throughput, "start", IdleServer)
    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr(throughput, "profile_row", profile_row)
    monkeypatch.setattr(throughput, "end_on_sigterm", lambda: None)
    words = ["--output", str(tmp_path / "x.json"), "--model", "tiny", "--groups", "kvllm"]
    words += ["--points", "scarce", "--repetitions", "2", "--profiled", "stock"]
    words += ["--folder", str(tmp_path), "--query-mem-gb", "0.0003"]
    with pytest.raises(KeyboardInterrupt):
        throughput.main(words)
    assert throughput.main(words) == 0
    assert measured == ["stock", "kvllm", "kvllm", "cut off", "stock"]
    report = json.loads((tmp_path / "x.json").read_text())
    assert len(report["runs"]) == 4 and len(report["profiles"]) == 1
    started = len(IdleServer.started)
    assert throughput.main(words) == 0 and len(IdleServer.started) == started
    with pytest.raises(SystemExit, match="holds another run; name another file"):
        throughput.main([*words, "--tokens", "100"])


def test_the_steps_are_documented():
    assert run_all.tables() in (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
