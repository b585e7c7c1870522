"""``make serve``: SGLang's own server on a model, with compression on and a ``curl`` line to try.

Run ``python -m kara_sglang.serve [--port P] [--model M] [--] [options of sglang.launch_server]``.
This is a convenience: it fills in what the machine and the model call for, prints the command line
it arrived at, and then *becomes* that command, so that Ctrl-C, signals and the exit code are the
server's own. An option that the user passes is never set a second time here.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import select
import shlex
import signal
import socket
import sys
from pathlib import Path

from kara_sglang import cpu_engine, plugin
from kara_sglang.embedded_model import EmbeddedModelMissing, embedded_model_path

DEFAULT_PORT = 30000

# What SGLang can run without a GPU; the pool holds two full contexts of the embedded model.
CPU_OPTIONS = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--grammar-backend": "none",
    "--page-size": "16",
    "--max-total-tokens": "16384",
}
# Threads that spin while they wait slow each other down many times over once the cores are shared.
CPU_ENVIRONMENT = {cpu_engine.SWITCH: "1", "OMP_WAIT_POLICY": "passive"}
# One chat answer of the embedded model shows several compressed windows, though memory suffices.
EMBEDDED_OPTIONS = {
    "--kv-compress-window": "128",
    "--kv-compress-config": '{"policy": "periodic"}',
}

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Refusal(Exception):
    """Why no server can be started, in one line."""


def resolve_model(model: str) -> str:
    """Return the ``--model-path`` of the user's ``model``: a folder or a name on a model hub.

    Raises
    ------
    Refusal
        For a folder that does not exist or holds no model. A path of at most two plain parts that
        does not exist (``org/name``) is taken for a hub name.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise Refusal(f"the folder {model} holds no model: it has no config.json")
        return str(folder)
    if folder.exists() or not _HUB_NAME.fullmatch(model):
        raise Refusal(f"there is no model folder {model}; give a folder or a hub name like org/name")
    return model


def check_port(port: int) -> None:
    """Raise :class:`Refusal` unless a server could listen on ``port`` now."""
    with socket.socket() as probe:
        # As the server will do it: a port whose last owner has just gone is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise Refusal(
                f"port {port} is not free ({error}); choose another: make serve PORT=..."
            ) from error


def build_command(
    model_path: str, port: int, extra: list[str], *, embedded: bool, cpu: bool
) -> list[str]:
    """Put the server's command line together.

    Parameters
    ----------
    model_path : str
        Folder or hub name.
    port : int
        Where the server listens.
    extra : list[str]
        The user's own options, appended as they are; each of them displaces our default for it.
    embedded : bool
        Whether the model is the embedded one, whose answers are compressed in any case.
    cpu : bool
        Whether the server runs on the CPU engine.

    Returns
    -------
    list[str]
        Program and arguments.
    """
    given = {argument.partition("=")[0] for argument in extra if argument.startswith("--")}
    defaults = {"--model-path": model_path, "--port": str(port)}
    if cpu:
        defaults |= CPU_OPTIONS
    if "--kv-compress" not in given:
        defaults["--kv-compress"] = "kara"
    # A configuration may hold a window of its own; a server without compression has no use for one.
    if embedded and "--kv-compress-config" not in given and not _switched_off(extra):
        defaults |= EMBEDDED_OPTIONS
    options = [word for name, value in defaults.items() if name not in given for word in (name, value)]
    return [sys.executable, "-m", "sglang.launch_server", *options, *extra]


def _switched_off(extra: list[str]) -> bool:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kv-compress")
    return parser.parse_known_args(extra)[0].kv_compress == "none"


def curl_line(port: int) -> str:
    """Return a shell line that asks for an answer long enough to be compressed.

    The sampling keeps the small embedded model from repeating itself, which it does when greedy,
    with its full cache as well.
    """
    question = "Explain in detail how bread is made, step by step, and why each step matters."
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 600,
        "temperature": 0.4,
        "top_p": 0.9,
        "frequency_penalty": 0.3,
        "return_meta_info": True,
    }
    return (
        f"curl -s http://127.0.0.1:{port}/v1/chat/completions"
        f" -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )


def watch(server: int, port: int) -> None:
    """Print :func:`curl_line` once the server answers; return then, or when the server has ended.

    ``server`` is a process file descriptor: unlike a process id, it tells a server that has ended,
    but whose exit code nobody has fetched yet, from a living one.
    """
    while not select.select([server], [], [], 1)[0]:
        if _is_healthy(port):
            print(f"\nReady. Try in another terminal:\n\n{curl_line(port)}\n", flush=True)
            return


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def start_watcher(port: int) -> None:
    """Run :func:`watch` beside the present process, which is about to become the server."""
    server = os.pidfd_open(os.getpid())
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    # The watcher is a grandchild: a child would stay behind as a zombie of the server, which does
    # not know of it. It stays in the terminal's process group, so that Ctrl-C ends it as well.
    if os.fork() == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        watch(server, port)
    os._exit(0)


def main(argv: list[str] | None = None) -> int:
    """Check, print, and become the server; 2 and one line when that cannot be."""
    arguments = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--"]
    parser = argparse.ArgumentParser(
        prog="python -m kara_sglang.serve",
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
        epilog="All other options go to sglang.launch_server as they are.",
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="default: %(default)s")
    parser.add_argument(
        "--model",
        "--model-path",
        default="",
        help="folder or hub name; default: the embedded model",
    )
    options, extra = parser.parse_known_args(arguments)
    cpu = cpu_engine.is_installed()
    try:
        check_port(options.port)
        if lines := plugin.invisible():
            raise Refusal(lines[0])
        model_path = resolve_model(options.model) if options.model else str(embedded_model_path())
    except (Refusal, EmbeddedModelMissing) as refusal:
        print(f"make serve: {refusal}", file=sys.stderr)
        return 2
    command = build_command(model_path, options.port, extra, embedded=not options.model, cpu=cpu)
    environment = os.environ | (CPU_ENVIRONMENT if cpu else {})
    print("Starting the server (on a CPU it is ready after 35 to 50 seconds; Ctrl-C stops it):")
    variables = "".join(f"{name}={value} " for name, value in CPU_ENVIRONMENT.items()) if cpu else ""
    print(f"\n{variables}{shlex.join(command)}\n", flush=True)
    start_watcher(options.port)
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    raise SystemExit(main())
