"""The live view: what it reads of /server_info, its rates, and its one-line errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from kara_sglang import top
from kara_sglang.top import NoView, Sample, frame, look, main

KARA = {
    "settings": {
        **{"selector": "kara", "window": 512, "kept": 256, "delay": 64},
        **{"policy": "periodic", "prefix_reuse": "exact"},
    },
    "compression": "compression begins when a test says so; it has, 30 windows so far",
    "kernels": "triton",
    "passes": 10,
    "windows": 30,
    "without_queries": 3,
    "slots_freed": 7680,
    "pass_seconds": 0.5,
    "skipped": {"opt_out": 2},
    "recorders_in_use": 20,
    "recorder_pages_free": 70,
    "largest_decode_graph": 32,
    "running_requests": 40,
    "waiting_requests": 5,
    "running_held_tokens": 60_000,
    "running_logical_tokens": 100_000,
    "pool_tokens": 200_000,
    "pool_tokens_free": 120_000,
    "pool_tokens_evictable": 20_000,
}


def info(*states: dict[str, Any]) -> dict[str, Any]:
    return {"internal_states": [{"last_gen_throughput": 100.5, "kv_compress": s} for s in states]}


def line(lines: list[str], label: str) -> str:
    found = [text for text in lines if text.strip().startswith(label)]
    assert len(found) == 1, lines
    return found[0]


def test_what_a_frame_says() -> None:
    lines = frame("http://there", Sample.of(info(KARA), 5.0), None)
    assert "kara: 256 of 512 tokens kept, delay 64, policy periodic, prefix reuse exact" in lines
    assert lines[2] == KARA["compression"]
    requests = line(lines, "requests")
    assert "40 running, decode graphs up to 32 (larger batches run without one: slower)" in requests
    assert "5 waiting, 100 output tokens/s" in requests
    assert "[#######.................]  30%  60,000 of 200,000 slots in use" in line(lines, "KV pool")
    assert " 60%  60,000 slots for 100,000 tokens" in line(lines, "held")
    assert "20 requests recorded, 70 pages free" in line(lines, "query ring")
    assert line(lines, "windows").split() == ["windows", "30"]  # no rate without an earlier look
    assert line(lines, "left uncompressed") == "left uncompressed: opt_out 2"


def test_rates_are_over_the_time_between_two_looks() -> None:
    later = KARA | {"windows": 50, "pass_seconds": 0.6, "slots_freed": 12_800}
    lines = frame("u", Sample.of(info(later), 9.0), Sample.of(info(KARA), 5.0))
    assert line(lines, "windows").split() == ["windows", "5.0", "50"]
    assert line(lines, "slots freed").split() == ["slots", "freed", "1,280.0", "12,800"]
    assert line(lines, "passes").split() == ["passes", "0.0", "10"]
    assert line(lines, "pass time").split() == ["pass", "time", "2.5%", "0.60", "s"]
    # A server that was restarted counts from zero: no rate, and none below zero.
    lines = frame("u", Sample.of(info(KARA), 9.0), Sample.of(info(later), 5.0))
    assert line(lines, "windows").split() == ["windows", "30"]


def test_schedulers_are_added_up() -> None:
    other = KARA | {"windows": 0, "compression": "it has not", "skipped": {"opt_out": 1, "beam": 4}}
    both = Sample.of(info(other, KARA), 0.0)
    lines = frame("u", both, None)
    assert "2 schedulers" in lines[0] and lines[2] == KARA["compression"], "one of them has begun"
    # Graphs are per scheduler: 40 on each are too many, 20 are not.
    assert "80 running, decode graphs up to 32 (larger" in line(lines, "requests")
    assert "201 output tokens/s" in line(lines, "requests")
    assert "120,000 of 400,000" in line(lines, "KV pool")
    assert line(lines, "left uncompressed") == "left uncompressed: beam 4, opt_out 3"
    few = Sample.of(info(*[KARA | {"running_requests": 20}] * 2), 0.0)
    assert "40 running, decode graphs up to 32, 10 waiting" in line(frame("u", few, None), "requests")


def test_no_graphs_are_named_where_there_are_none() -> None:
    lines = frame("u", Sample.of(info(KARA | {"largest_decode_graph": 0}), 0.0), None)
    assert "40 running, 5 waiting" in line(lines, "requests")


def test_an_idle_server() -> None:
    idle = KARA | {"running_held_tokens": 0, "running_logical_tokens": 0, "skipped": {}}
    lines = frame("u", Sample.of(info(idle), 0.0), None)
    assert " 0%  0 slots for 0 tokens" in line(lines, "held")
    assert line(lines, "left uncompressed") == "left uncompressed: nobody"


# -- over HTTP -------------------------------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Callable[[Any, int], str]]:
    """Starts a server that gives one answer to whoever has the key `k`; returns its URL."""
    servers = []

    def start(body: Any, status: int = 200) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                allowed = self.headers.get("Authorization") == "Bearer k"
                found = self.path == "/server_info"
                self.send_response(status if allowed and found else 401)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_once(serve, capsys) -> None:
    url = serve(info(KARA))
    argv = ["--url", f"{url}/", "--api-key", "k", "--once", "--interval", "0.01"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert line(lines, "windows").split() == ["windows", "0.0", "30"]
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("body", "status", "key", "reason"),
    [
        ({"internal_states": [{"device": "cuda"}]}, 200, "k", "runs without compression"),
        ({}, 200, "other", "401 Unauthorized; give --api-key"),
        ({}, 500, "k", "500 Internal Server Error"),
        (b"<html>", 200, "k", "gives no answer"),
    ],
)
def test_one_line_says_why_there_is_nothing_to_see(serve, capsys, body, status, key, reason) -> None:
    assert main(["--url", serve(body, status), "--api-key", key]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("top: ") and reason in captured.err


def test_nobody_is_there(capsys) -> None:
    with pytest.raises(NoView, match=r"Connection refused.*say --url"):
        look("http://127.0.0.1:9", None)
    assert main(["--url", "not a url"]) == 2
    assert "gives no answer" in capsys.readouterr().err


def test_a_server_that_goes_away_is_waited_for(monkeypatch, capsys) -> None:
    """The last figures stay, marked as old, and the terminal is put back on Ctrl-C."""
    looks = iter([Sample.of(info(KARA), 0.0), NoView("gone"), Sample.of(info(KARA), 9.0)])

    def next_look(*_: Any) -> Sample:
        found = next(looks, KeyboardInterrupt())
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(top, "look", next_look)
    assert main(["--interval", "0.001"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(top.ENTER) and out.endswith(top.LEAVE)
    frames = out.split(top.HOME)[1:]
    assert [" old" in text for text in frames] == [False, True, False]
