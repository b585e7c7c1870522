"""What shows a running server to its owner, against a real one: the dashboard and the live view."""

from __future__ import annotations

import functools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import requests
from places import ROOT
from server import Server, environment

DASHBOARD = ROOT / "docs" / "deploy" / "grafana.json"


def body(tokens: int, **custom: object) -> dict[str, object]:
    params = {"max_new_tokens": tokens, "ignore_eos": True} | (
        {"custom_params": custom} if custom else {}
    )
    return {"text": "The sea is", "sampling_params": params}


# What Prometheus 2 and Prometheus 3 ask for; the first is answered with `_` in place of `:`.
ACCEPT = (
    "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8,text/plain;q=0.5",
    "text/plain",
)


@pytest.fixture(scope="module")
def used(smollm2: Server) -> Server:
    """It has compressed an answer, and left one alone."""
    smollm2.post("/generate", body(300)).raise_for_status()
    smollm2.post("/generate", body(20, kv_compress=False)).raise_for_status()
    return smollm2


@pytest.mark.parametrize("accept", ACCEPT)
def test_the_dashboards_metrics_are_exported(used: Server, accept: str) -> None:
    """Names, and the labels by which they are selected or summed."""
    answer = requests.get(used.url + "/metrics", headers={"Accept": accept}, timeout=60)
    exported: dict[str, set[str]] = {}
    for line in answer.text.splitlines():
        if found := re.match(r"(sglang[:_]\w+)\{(.*)\} ", line):
            exported.setdefault(found[1], set()).update(re.findall(r'(\w+)="', found[2]))
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(queries) > 12
    for query in queries:
        selectors = re.findall(r"\{(.*?)\}", query)
        assert selectors and query.count("sglang.") == len(selectors)
        for selector in selectors:
            wanted = re.fullmatch(r'__name__=~"(sglang\.\w+)",(.*)', selector)
            assert wanted is not None, query
            names = [name for name in exported if re.fullmatch(wanted[1], name)]
            assert len(names) == 1, f"{wanted[1]} of the dashboard is exported as {names}"
            # `instance` is added by Prometheus.
            labels = set(re.findall(r"(\w+)=", wanted[2])) | set(re.findall(r"by \((\w+)\)", query))
            assert labels - {"instance"} <= exported[names[0]], query


def test_the_live_view_of_a_running_request(smollm2: Server) -> None:
    """In a terminal: a request is seen to shrink while it runs, and Ctrl-C puts the terminal back."""
    writer = threading.Thread(target=smollm2.post, args=("/generate", body(400)))
    compressed = re.compile(
        r"requests +1 running, 0 waiting, .*\n"
        r"KV pool .* of 16,384 slots in use\S*\n"
        r"held .* [1-9]\d%  (\d+) slots for (\d+) tokens of running requests"
    )
    terminal, side = pty.openpty()
    command = (sys.executable, "-m", "kara_sglang.top", "--url", smollm2.url, "--interval", "0.5")
    env = environment({"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "COLUMNS": "120", "LINES": "40"})
    # A shell's background jobs ignore Ctrl-C, and hand that down.
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=side, stderr=side, env=env, preexec_fn=hears) as view:
        os.close(side)
        shown, found = "", None
        end = time.monotonic() + 200
        while found is None and time.monotonic() < end:
            shown += os.read(terminal, 65536).decode().replace("\r", "")
            if writer.ident is None and "\x1b[H" in shown:
                writer.start()
            found = compressed.search(shown)
        view.send_signal(signal.SIGINT)
        while not shown.endswith("\x1b[?25h\x1b[?1049l"):
            shown += os.read(terminal, 65536).decode().replace("\r", "")
        assert view.wait(timeout=30) == 0
    os.close(terminal)
    writer.join()
    assert found is not None, shown[-3000:]
    assert 0 < int(found[1]) < int(found[2])
