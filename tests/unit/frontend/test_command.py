"""``python -m kara_sglang.frontend``: one line for what cannot be done."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from kara_sglang.frontend import answers, programs
from kara_sglang.frontend.command import NUMBERS, PROGRAM_NAMES, _print_report, main
from kara_sglang.frontend.records import Ledger

SERVER_INFO = {
    "skip_tokenizer_init": False,
    "incremental_streaming_output": False,
    "internal_states": [{}],
}


@pytest.fixture
def serve(tiny_tokenizer, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start an HTTP server with fixed answers, by path; returns its address."""
    tiny_tokenizer.save_pretrained(tmp_path)
    servers = []

    def start(server_info: dict | None = None, status: int = 200, **generated: object) -> str:
        said = {
            "/model_info": {"model_path": "m", "tokenizer_path": str(tmp_path)},
            "/server_info": server_info,
            "/generate": generated,
        }

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = json.dumps(said.get(self.path, {})).encode()
                self.send_response(status if self.path == "/generate" else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def refused(capsys: pytest.CaptureFixture, *arguments: str, code: int = 2) -> str:
    """The one line with which the command ends."""
    assert main(["solve", *arguments]) == code
    printed = capsys.readouterr()
    assert printed.out.strip() == ""
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("kara_sglang.frontend: error: ")
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "QUESTION is empty"),
        (["  \n"], "QUESTION is empty"),
        (["q", "--program", "guess"], "--program 'guess' is unknown; there are plan-and-solve, self-c"),
        (["q", "--depth", "3"], "--depth belongs to --program beam, not to self-consistency"),
        (["q", "--chains", "0"], "--chains must be at least 1, got 0"),
        (["q", "--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["q", "--temperature", "-1"], "--temperature must be 0 or more, got -1"),
        (["q", "--temperature", "nan"], "--temperature must be 0 or more, got nan"),
        (["q", "--kv-compress", "{retain: 1}"], "--kv-compress is no JSON"),
        (
            ["q", "--endpoint", "http://127.0.0.1:9"],
            "no server answers at http://127.0.0.1:9 ([Errno 111] Connection refused); start one",
        ),
        (
            ["q", "--endpoint", "127.0.0.1:30000"],
            "no server answers at 127.0.0.1:30000 (No connection ad",
        ),
        (["q", "--endpoint", "http://[::"], "no server answers at http://[:: ("),
    ],
)
def test_refusals_before_there_is_a_server(arguments, message, capsys) -> None:
    assert message in refused(capsys, *arguments, "--json")


def test_no_rich(capsys, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else find(name)
    )
    assert "pip install rich, or use --json" in refused(capsys, "q")
    assert "no server answers" in refused(capsys, "q", "--endpoint", "http://127.0.0.1:9", "--json")


def test_servers_that_will_not_do(serve, capsys) -> None:
    message = refused(capsys, "q", "--endpoint", serve())
    assert "does not answer like a server of SGLang 0.5.22 or 0.5.23" in message
    stock = serve(SERVER_INFO)
    message = refused(capsys, "q", "--endpoint", stock)
    assert "runs without compression; start it with --kv-compress kara" in message
    message = refused(capsys, "q", "--endpoint", stock, "--kv-compress", '{"retain": 0.25}')
    assert "runs without --kv-compress and would ignore it" in message


def with_plugin() -> dict:
    return SERVER_INFO | {"internal_states": [{"kv_compress": {"settings": {"window": 64}}}]}


def test_options_that_do_not_fit(serve, capsys, tmp_path) -> None:
    url = serve(with_plugin())
    message = refused(capsys, "q", "--endpoint", url, "--kv-compress", '{"retain": 7}')
    assert "kv_compress.retain must be a share" in message
    message = refused(capsys, "q", "--endpoint", url, "--chat-template", "best")
    assert "chat_template 'best' is unknown" in message
    message = refused(capsys, "q", "--endpoint", url, "--tokenizer", str(tmp_path / "none"))
    assert "tokenizer: nothing to load from" in message


@pytest.mark.parametrize("program", PROGRAM_NAMES)
def test_a_server_that_refuses_on_the_way(program: str, serve, capsys) -> None:
    """Also out of a fork's thread: one line, exit code 1, and no hanging."""
    url = serve(with_plugin(), status=400, error={"message": "too long"})
    message = refused(capsys, "q", "--endpoint", url, "--program", program, code=1)
    assert message.endswith("/generate: HTTP 400: too long\n")


def test_programs_and_their_numbers_are_those_of_the_library() -> None:
    assert tuple(programs.PROGRAMS) == PROGRAM_NAMES
    for name, program in NUMBERS.items():
        assert name in programs.PROGRAMS[program].__kwdefaults__


def test_votes_say_when_mathematics_is_missing(monkeypatch, capsys) -> None:
    pytest.importorskip("rich")
    chains = (programs.Chain("so 5", "5"),)
    result = programs.SelfConsistency("q", chains, votes=(("5", 1),), answer="5")
    endpoint = SimpleNamespace(ledger=Ledger())
    for installed, lines in ((True, 0), (False, 1)):
        monkeypatch.setattr(answers, "HAS_MATH_VERIFY", installed)
        _print_report(None, endpoint, result, 1.0)
        printed = capsys.readouterr().out
        assert printed.count("pip install math-verify") == lines
        assert "Votes: 5 (1)" in printed and printed.endswith("Answer: 5\n")


def test_a_server_that_wants_a_key(serve, capsys) -> None:
    url = serve(with_plugin(), status=401, error="Unauthorized")
    message = refused(capsys, "q", "--endpoint", url, code=1)
    assert "HTTP 401: Unauthorized; give the server's key as api_key" in message
