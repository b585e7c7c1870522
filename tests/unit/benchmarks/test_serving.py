"""The serving benchmark without servers: what it counts, compares, plans and projects."""

from __future__ import annotations

import csv
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from counted import result

from kara_sglang.benchmarks import machine
from kara_sglang.benchmarks.serving import hang_ups, longest, scenarios, tables
from kara_sglang.benchmarks.serving.counters import Counters
from kara_sglang.benchmarks.serving.load import Load, end_of_text, write_trace
from kara_sglang.benchmarks.serving.measure import CLIENT_METRICS, GROUP, Journal, schedule, start_of
from kara_sglang.benchmarks.serving.overhead import share
from kara_sglang.benchmarks.serving.peers import PEERS
from kara_sglang.benchmarks.serving.report import headline, markdown, ratios
from kara_sglang.benchmarks.serving.rows import rows
from kara_sglang.benchmarks.serving.setup import Setup
from kara_sglang.config import KaraConfig

LOG = """\
[t] Prefill batch, #new-seq: 1, #new-token: 48, #cached-token: 16, token usage: 0.08, #running-req: 0
[t] Decode batch, #running-req: 2, #token: 160, token usage: 0.28, kv-compress: 0.50 held (#window: 5, \
#without-queries: 2, #freed: 32), cpu graph: False, gen throughput (token/s): 397.46, #queue-req: 0
[t] KV cache pool is full. Retract requests. #retracted_reqs: 2, #new_tokens_gained: 64
[t] Decode batch, #running-req: 1, #token: 80, token usage: 0.14, kv-compress: 1.00 held (#window: 7, \
#without-queries: 2, #freed: 32)
[t] Decode batch, #running-req: 2, #token: 100, token usage: 0.14, kv-compress: 0.90 held (#window: 9, \
#without-queries: 3, #freed: 32)
"""


def test_counters_of_a_log() -> None:
    counted = Counters.of(LOG)
    assert counted.decode_steps == 3 and counted.peak_running == 2 and counted.retractions == 2
    assert counted.mean_running == pytest.approx(5 / 3)
    assert counted.hit_rate == 0.25
    assert counted.held == pytest.approx(0.8)
    assert counted.without_queries == 0.25, "of those since the first step of the run"
    first = LOG.splitlines(keepends=True)[:3]
    assert Counters.of("".join(first)).without_queries is None
    assert counted.without_graph == 1.0
    graphs = LOG.replace("#freed: 32)\n", "#freed: 32), cuda graph: True\n")
    assert Counters.of(graphs).without_graph == pytest.approx(1 / 3)
    assert Counters.of(LOG.replace(", cpu graph: False", "")).without_graph is None
    assert counted.schedule == {1: (1, 80), 2: (2, 260)}


def test_a_log_without_decoding_is_an_error() -> None:
    with pytest.raises(ValueError, match="Decode batch"):
        Counters.of("nothing")


def test_ratios_are_taken_within_a_repetition() -> None:
    """A slow hour hits both; a repetition without stock has no ratio."""
    found = {
        "stock": [result("stock", 0, 10.0), result("stock", 1, 5.0)],
        "kara-0.5": [result("kara-0.5", r, speed) for r, speed in enumerate((15.0, 10.0, 99.0))],
    }
    assert ratios(found, "kara-0.5", "output tok/s") == [1.5, 2.0]


def test_headline_names_what_was_measured_and_nothing_else() -> None:
    runs = [result("stock", 0, 10.0), result("kara-0.5", 0, 14.0)]
    found = headline(runs)
    assert found["ratio_scarce_kara_0.5"] == 1.4 and found["mean_running_ratio_kara_0.5"] == 1.0
    assert "ratio_scarce_kara_0.25" not in found and "hit_rate_delta" not in found
    ample = {"scenario": "ample"}
    runs += [
        result("stock", 0, 10.0, probe="a", **ample),
        result("off", 0, 10.0, probe="a", **ample),
        result("identity", 0, 10.0, probe="b", **ample),
        result("stock", 0, 10.0, scenario="prefix", point="shared prefix"),
        result("kara-0.5", 0, 9.0, scenario="prefix", point="shared prefix"),
    ]
    found = headline(runs)
    assert found["off_bit_exact"] is True and found["identity_bit_exact"] is False
    assert found["hit_rate_delta"] == 0 and found["ratio_plugin_off"] == 1.0
    assert "1.40 (1.40 to 1.40)" in markdown(runs, {"vllm": "not here"})


def test_every_row_is_accepted_by_the_configuration() -> None:
    """A row whose settings the server would refuse is found here, not after its start."""
    for row in rows(64).values():
        flags = row.compress_flags(64, 16, 0.25)
        if flags:
            given = dict(zip(flags[::2], flags[1::2], strict=True))
            settings = json.loads(given["--kv-compress-config"])
            config = KaraConfig.from_settings(
                settings
                | {
                    "selector": given["--kv-compress"],
                    "window": int(given["--kv-compress-window"]),
                    "retain": float(given["--kv-compress-retain"]),
                }
            )
            config.check_page_size(16)
    used = {c.row for make in scenarios.SCENARIOS.values() for c in make(scenarios.Scale())}
    assert used == set(rows(64)) and set(scenarios.ALL) < used


def test_a_journal_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    cell = next(scenarios.scarce(scenarios.Scale()))
    Journal(path).add({"key": cell.key, "repetition": 0})
    with path.open("a") as file:
        file.write('{"key": "scarce/equal wo')
    journal = Journal(path)
    assert journal.has(cell, 0) and not journal.has(cell, 1)


@pytest.mark.parametrize("resident", [1, 2, 4, 20])
def test_the_plan_runs_every_row_in_turn_with_stock(resident: int) -> None:
    """Each row as often as asked for, and stock in the same repetition, while its server is up."""
    cells = [c for make in scenarios.SCENARIOS.values() for c in make(scenarios.Scale())]
    plan = list(schedule(cells, 3, resident))
    assert len(plan) == len(set(plan))
    together: dict[tuple[str, str, int], list[str]] = {}
    for cell, repetition in plan:
        together.setdefault((cell.scenario, cell.point, repetition), []).append(cell.row)
    for cell in cells:
        of_cell = [(k, names) for k, names in together.items() if k[:2] == (cell.scenario, cell.point)]
        if cell.row != "stock":
            assert sum(cell.row in names for _, names in of_cell) == 3
        for (_, _, repetition), names in of_cell:
            assert "stock" in names and (resident == 1 or len(names) <= resident)
            assert (names[0] == "stock") is (repetition % GROUP % len(names) == 0)


def test_a_pool_holds_as_many_requests_as_it_says() -> None:
    """Stock reserves the whole answer, rounded up to a page: n fit and n + 1 do not."""
    scale = scenarios.Scale()
    need = -(-(scale.prompt + scale.output) // scale.page_size) * scale.page_size
    for requests in (2, 3, 12):
        assert requests * need < scale.pool(requests) < (requests + 1) * need


def test_a_trace_keeps_times_and_bounds_prompts(tmp_path: Path) -> None:
    write_trace(scenarios.TRACE, tmp_path / "trace.jsonl", 50, 512, 1024)
    with scenarios.TRACE.open() as file:
        lengths = [int(row["ContextTokens"]) for row in csv.DictReader(file)][:50]
    records = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert len(records) == 50 and records[0]["timestamp"] == 0
    assert [r["timestamp"] for r in records] == sorted(r["timestamp"] for r in records)
    assert {r["output_length"] for r in records} == {1024}
    ids = [block for r in records for block in r["hash_ids"]]
    assert len(ids) == len(set(ids)), "prompts must not share blocks"
    assert all(len(r["hash_ids"]) <= max(1, n // 128) for r, n in zip(records, lengths, strict=True))


def test_the_loads_are_words_that_sglang_knows(tmp_path: Path) -> None:
    words = Load(4, 64, 100, concurrency=2, ignore_eos=False).arguments(tmp_path)
    assert words[words.index("--random-output-len") + 1] == "100"
    assert "--disable-ignore-eos" in words and "--max-concurrency" in words
    shared = Load(8, 64, 100, kind="shared-prefix", groups=4).arguments(tmp_path)
    assert shared[shared.index("--gsp-prompts-per-group") + 1] == "2"


def test_a_small_ring_has_room_for_a_quarter(tmp_path: Path) -> None:
    """Whatever the model; other cells get the memory that they were given."""
    from kara_sglang.benchmarks.ring import ring_of
    from kara_sglang.benchmarks.tiny_model import make_tiny_llama

    model = str(make_tiny_llama(tmp_path / "tiny", layers=1))
    setup = Setup(model, "float32", 64, 16, 0.25, 16, None, (), {}, cpu=True)
    cells = {cell.row: cell for cell in scenarios.ring(scenarios.Scale())}
    small = start_of(cells["small-ring"], setup)[2]
    settings = {"window": 64, "delay": 16, "query_mem_gb": small.query_mem_gb}
    assert ring_of(model, settings).room(1) == 4
    assert cells["small-ring"].load.concurrency == 16
    assert start_of(cells["kara-0.5"], setup)[2].query_mem_gb == 0.25
    assert end_of_text(model) == [2]


class Endless(BaseHTTPRequestHandler):
    """SGLang's /generate: an answer without an end, or with one after 30 tokens."""

    heard: ClassVar[list[dict]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.heard.append(body)
        self.send_response(200)
        self.end_headers()
        try:
            for tokens in range(1, body["sampling_params"]["max_new_tokens"] + 1):
                line = json.dumps({"meta_info": {"completion_tokens": tokens}})
                self.wfile.write(f"data: {line}\n\n".encode())
                time.sleep(0.001)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            pass  # the client has left

    def log_message(self, *_: object) -> None:
        pass


def test_clients_hang_up_when_they_have_enough() -> None:
    """After their own number of tokens each; a server that ends an answer before is an error."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        wanted = hang_ups.lengths(4, 20, 50)
        assert sorted(wanted) == [20, 30, 40, 50]
        told = {"prompt": 7, "end_of_text": [2], "seed": 1}
        result = hang_ups.drive(url, most=10_000, leave_after=wanted, **told)
        assert (result["completed"], result["total_output_tokens"]) == (4, 140)
        assert result["total_input_tokens"] == 28 and set(CLIENT_METRICS) == set(result)
        assert all(result[name] > 0 for name in result)
        for body in Endless.heard:
            assert len(body["input_ids"]) == 7 and body["stream"]
            assert body["sampling_params"]["logit_bias"] == {"2": -100}
            assert "ignore_eos" not in body["sampling_params"], "nobody knows when it ends"
        with pytest.raises(RuntimeError, match="ended after 30 tokens, not 50"):
            hang_ups.drive(url, most=30, leave_after=[50], **told)
        server.shutdown()


def test_peers_say_why_they_cannot_run_here() -> None:
    setup = Setup("m", "float32", 64, 16, 0.25, 16, 100, cpu=True)
    assert PEERS["sglang"].missing(setup) is None
    assert "--peer vllm=" in PEERS["vllm"].missing(setup)
    stock = rows(64)["stock"]
    assert PEERS["sglang"].environment(stock, setup)["SGLANG_PLUGINS"] == "none"
    assert not any("kv-compress" in word for word in PEERS["sglang"].command(stock, setup, 1))


MARKED = """\
above
<!-- serving:here/pool short -->
old
<!-- end of serving -->
between
<!-- serving:elsewhere/pool -->
old
<!-- end of serving -->
<!-- serving:here/ample -->
<!-- end of serving -->
"""


def test_tables_are_put_between_their_marks(tmp_path: Path) -> None:
    runs = [result("stock", r, 10.0, scenario="ample") for r in range(2)]
    runs += [result("kara-0.5", r, 9.0 + r, scenario="ample") for r in range(2)]
    runs += [result("stock", 0, 1.0, scenario="pool", point=point) for point in ("2 fit", "3 fit")]
    runs.append(result("vllm", 0, 4.0, scenario="pool", point="3 fit", counters=None))
    (tmp_path / "here.json").write_text(json.dumps({"runs": runs}))
    document = tables.render(MARKED, tmp_path)
    mine, theirs = document.split("between\n")
    assert mine.startswith("above\n") and "old" not in mine and theirs.count("old") == 1
    assert "| 2 fit | stock | 100 | 2.0 | 1 | 1 |\n| 3 fit | stock |" in mine
    assert "| 3 fit | vllm | - | - | 4.00 | 1.00 |" in mine
    assert "| kara-0.5 | 0.95 (0.90 to 1.00) | 1.00 (1.00 to 1.00) | 100 (1.00 x) |" in theirs
    assert tables.render(document, tmp_path) == document
    for mark in ("here/scarce", "here/ample shorter"):
        with pytest.raises(ValueError, match="has no"):
            tables.render(f"<!-- serving:{mark} -->\n<!-- end of serving -->", tmp_path)


def test_every_scenario_is_drawn(tmp_path: Path) -> None:
    """Another engine's rate is no bar: it does not say how many steps it took."""
    pytest.importorskip("matplotlib", reason="pip install 'kara-sglang[benchmarks]'")
    from kara_sglang.benchmarks.serving import plots

    runs = []
    for make in scenarios.SCENARIOS.values():
        for cell in make(scenarios.Scale()):
            peer = rows(64)[cell.row].peer != "sglang"
            changes = {"scenario": cell.scenario, "point": cell.point, "pool": cell.pool}
            for repetition in range(2):
                run = result(cell.row, repetition, 10.0, **changes)
                if peer:
                    run["counters"] = run["counters"] | {"decode_steps": None}
                runs.append(run)
    drawn = plots.draw(runs, tmp_path / "out")
    assert [path.name for path in drawn] == [f"out-{name}.png" for name in scenarios.SCENARIOS]
    assert all(path.stat().st_size > 5000 for path in drawn)
    assert plots.draw([run for run in runs if run["row"] == "stock"], tmp_path / "alone") == []


def test_a_profile_is_charged_to_the_plugin_below_its_hooks() -> None:
    loop = "Scheduler.event_loop_overlap (/s/sglang/srt/managers/scheduler.py:1)"
    profile = "\n".join(
        [
            f"main (/m.py:1);{loop};forward (/s/sglang/srt/layers/a.py:2) 90",
            f"main (/m.py:1);{loop};record (PACKAGE/runtime.py:3);plan (kernels/record.py:4) 4",
            f"main (/m.py:1);{loop};before_attention (PACKAGE/runtime.py:3);stack (/t/torch.py:4) 2",
            f"main (/m.py:1);{loop};wrapper (/s/sglang/srt/plugins/hook_registry.py:5) 1",
            f"main (/m.py:1);{loop};get_prefill_adder_class (PACKAGE/a.py:3);stock (/s/b.py:4) 3",
            "main (/m.py:1);recv (/s/zmq.py:2) 500",
        ]
    )
    from kara_sglang.benchmarks.serving import overhead

    part, total, charged = share(
        profile.replace("PACKAGE", overhead._PACKAGE), {"get_prefill_adder_class"}
    )
    assert total == 100 and part == pytest.approx(0.07)
    assert charged == {"arithmetic of recording": 4, "before_attention": 2, "hook_registry": 1}


def test_a_pinned_run_says_how_many_cores_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _pid: {0, 1})
    assert machine.kind() == "2-core x86_64 CPU machine, no GPU"
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _pid: {1})
    assert machine.kind() == "1 of 2 cores of an x86_64 CPU machine, no GPU"


def test_a_results_command_says_nothing_of_this_machines_folders() -> None:
    arguments = ["--quick", "--dir", "/tmp/x", "--peer", "vllm=/opt/v/bin/python", "--out", "/a/b.json"]
    assert machine.command("m", ["--dir=/tmp/x", "--peer=vllm=/a", "--out=/a/b.json"]) == (
        "python -m m --peer vllm=PYTHON --out b.json"
    )
    assert machine.command("m", arguments) == "python -m m --quick --peer vllm=PYTHON --out b.json"
    assert machine.command("m", ["--model", "/models/Qwen3/"]) == "python -m m --model Qwen3/"
    arguments = [
        "--folder",
        "/tmp/x",
        "--server-args=--lora /opt/my/ada --tp 2",
        "--url",
        "http://h:1/v1",
    ]
    assert machine.command("m", arguments) == (
        "python -m m --server-args '--lora ada --tp 2' --url http://h:1/v1"
    )


RESULTS = Path(machine.__file__).parent / "results" / "serving"


@pytest.mark.parametrize("name", ["tiny", "smollm2", "plugin-off", "reuse", "steps", "match", "modes"])
def test_results_begin_with_their_command_and_machine(name: str) -> None:
    """Those that are committed as those that will be."""
    committed = json.loads((RESULTS / f"{name}.json").read_text())
    origin = machine.origin("m", ["--quick"])
    assert list(origin) == list(committed)[:2]
    assert origin["command"] == "python -m m --quick"
    assert list(origin["machine"]) == list(committed["machine"])
    if (tables := RESULTS / f"{name}.md").exists():
        assert tables.read_text().startswith(machine.heading(committed))


@pytest.mark.parametrize(("name", "asked"), [("tiny", 12_000), ("smollm2", 4_000)])
def test_the_answer_that_is_longer_than_the_pool(name: str, asked: int) -> None:
    """What was measured: stock ends it, and with the plugin it is whole, as are the others."""
    found = json.loads((tables.RESULTS / f"longest-{name}.json").read_text())
    stock, kara = found["rows"]["stock"], found["rows"]["kara"]
    assert stock["tokens"] < found["pool"] < found["asked"] == kara["tokens"] == asked
    assert kara["kv_slots_held"] < found["pool"] and kara["retractions"] == 0
    assert kara["others_whole"] == kara["others"] > 1
    text = longest.table(found)
    assert f"| kara | {asked:,} | length |" in text
    assert f"| stock | {stock['tokens']:,} | length | - |" in text
