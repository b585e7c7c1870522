"""The lines of the documents that start a server with flags, as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from places import ROOT
from server import Server, free_port, run, wait_until_ready

USAGE = (ROOT / "docs" / "usage.md").read_text()
LINES = re.findall(r'make serve ARGS="([^"]+)"', USAGE)


def test_the_documents_have_such_lines() -> None:
    assert {line.split()[0] for line in LINES} == {"--speculative-algorithm", "--kv-cache-dtype"}


@pytest.mark.slow
@pytest.mark.parametrize("flags", LINES)
def test_a_documented_line_serves_and_compresses(flags: str, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    words = ("-m", "kara_sglang.serve", "--port", str(port), "--", *shlex.split(flags))
    with run(words, log) as process:
        wait_until_ready(process, port, log, timeout=240)
        server = Server(process, port, log)
        body = {"text": "Write a long text about bridges.", "sampling_params": {"ignore_eos": True}}
        body["sampling_params"] |= {"max_new_tokens": 450, "temperature": 0}
        meta = server.post("/generate", body).json()["meta_info"]
        assert meta["completion_tokens"] == 450
        assert meta["kv_compress"]["windows"] >= 2
        assert ("spec_accept_length" in meta) == ("speculative" in flags)
        server.assert_nothing_leaked()
