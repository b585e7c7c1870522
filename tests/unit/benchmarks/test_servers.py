"""Servers and other engines of the serving benchmark."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from kara_sglang.benchmarks.serving import command as program
from kara_sglang.benchmarks.serving import residents
from kara_sglang.benchmarks.serving.counters import Counters
from kara_sglang.benchmarks.serving.peers import PEERS
from kara_sglang.benchmarks.serving.rows import rows
from kara_sglang.benchmarks.serving.setup import Setup


@pytest.mark.parametrize("cpu,block", [(True, 32), (False, 16)])
def test_vllm_gets_the_same_pool(cpu: bool, block: int) -> None:
    """In whole blocks, and one more, which it keeps for itself."""
    setup = Setup("m", "float32", 64, 16, 0.25, 16, 3376, (), {"vllm": Path("python")}, cpu=cpu)
    words = PEERS["vllm"].command(rows(64)["vllm"], setup, 1)
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert given["--block-size"] == str(block)
    slots = block * (int(given["--num-gpu-blocks-override"]) - 1)
    assert 3376 - block < slots <= 3376


def test_vllm_says_what_it_has_counted() -> None:
    """Only what came since the mark, summed over its engines; idle seconds are no running requests."""

    class Server:
        def __init__(self) -> None:
            self.log = "Running: 9 reqs, Waiting: 0 reqs\n"
            self.totals = {"num_preemptions": 1, "prefix_cache_hits": 10, "prefix_cache_queries": 100}

        def log_position(self) -> int:
            return len(self.log)

        def log_since(self, position: int) -> str:
            return self.log[position:]

        def get(self, path: str) -> SimpleNamespace:
            assert path == "/metrics"
            lines = []
            for name, value in self.totals.items():
                lines.append(f"# TYPE vllm:{name} counter")
                lines += [f'vllm:{name}_total{{engine="{e}"}} {value / 2}' for e in (0, 1)]
            return SimpleNamespace(text="\n".join(lines) + "\n")

    server, vllm = Server(), PEERS["vllm"]
    mark = vllm.mark(server)
    server.log += "".join(f"x Running: {n} reqs, Waiting: 1 reqs\n" for n in (2, 3, 3, 0))
    server.totals = {"num_preemptions": 4, "prefix_cache_hits": 30, "prefix_cache_queries": 180}
    counted = vllm.counters(server, mark)
    assert counted == Counters(None, 8 / 3, 3, 3, 60, 0.25, 1.0, None, None, {})
    still = vllm.counters(server, vllm.mark(server))
    assert (still.mean_running, still.peak_running, still.hit_rate) == (None, None, 0.0)
    del server.totals["prefix_cache_hits"]
    with pytest.raises(RuntimeError, match="no vllm:prefix_cache_hits_total"):
        vllm.mark(server)


def test_every_sglang_server_has_one_thread_on_a_cpu_unless_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ("model", "float32", 64, 16, 0.25, 16, None, (), {})
    of = PEERS["sglang"].environment
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("stock", "off", "kara-0.5"):
        row = rows(64)[name]
        assert of(row, Setup(*given, cpu=True))["OMP_NUM_THREADS"] == "1"
        assert "OMP_NUM_THREADS" not in of(row, Setup(*given, cpu=False))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert of(rows(64)["stock"], Setup(*given, cpu=True))["OMP_NUM_THREADS"] == "2"


def test_servers_end_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=10)  # a stop that waits for the other one

    def fake(_peer: str, _row: object, _setup: object, _log: Path) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda: None, stop=both.wait)

    monkeypatch.setattr(residents, "start", fake)
    starts = [("peer", SimpleNamespace(name=n), SimpleNamespace(pool=1, cpu=True)) for n in "ab"]
    with residents.Servers(2, tmp_path) as servers:
        servers.get(*starts[:1], starts[1:])
    assert not both.broken and both.n_waiting == 0


def test_servers_that_take_turns_start_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As many as may stay up, all of them ready before the first is measured; a failure is told when
    it is that server's turn."""
    events: list[str] = []

    class Fake:
        def __init__(self, peer: str, row: SimpleNamespace, setup: object, log: Path) -> None:
            self.name = row.name
            events.append(f"start {self.name}")

        def wait(self) -> None:
            if self.name == "broken":
                raise RuntimeError("broken")
            events.append(f"ready {self.name}")

        def stop(self) -> None:
            events.append(f"stop {self.name}")

    monkeypatch.setattr(residents, "start", Fake)
    a, b, c, broken = (
        ("peer", SimpleNamespace(name=name), SimpleNamespace(pool=1, cpu=True))
        for name in ("a", "b", "c", "broken")
    )
    with residents.Servers(2, tmp_path) as servers:
        assert servers.get(a, [b, a, c]).name == "a"
        assert events == ["start a", "start b", "ready b", "ready a"]
        assert servers.get(b, [a, c]).name == "b" and len(events) == 4
        assert servers.get(c, [b]).name == "c"  # b comes next, so a makes room
        assert events[4:] == ["stop a", "start c", "ready c"]
        assert servers.get(a, [broken]).name == "a"
        events.clear()
        with pytest.raises(RuntimeError):
            servers.get(broken)
        assert not events, "it was started again"
    assert sorted(events) == ["stop a"]
    on_gpu = ("peer", a[1], SimpleNamespace(pool=1, cpu=False))
    for resident, first in ((1, a), (2, on_gpu)):
        with residents.Servers(resident, tmp_path) as servers:
            events.clear()
            servers.get(first, [b])
            assert events == ["start a", "ready a"]


def test_a_row_that_cannot_run_says_how_to_have_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("datasets", reason="pip install 'kara-sglang[benchmarks]'")
    planned = {}

    def execute(cells, options, setup, scale, resident, folder, not_run, about) -> int:
        planned.update(cells=[cell.key for cell in cells], not_run=not_run, about=about)
        return 0

    monkeypatch.setattr(program, "execute", execute)
    words = ["--scenarios", "scarce/equal work", "--rows", "vllm", "--dir", str(tmp_path)]
    assert program.main([*words, "--model", "somewhere"]) == 0
    assert planned["cells"] == ["scarce/equal work/stock"] and list(planned["not_run"]) == ["vllm"]
    assert "'scarce/equal work'" in planned["about"]["command"]
    assert "vllm/bin/pip install vllm" in capsys.readouterr().err
