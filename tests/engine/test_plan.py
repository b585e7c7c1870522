"""The plan against a real server with the same settings: pool, ring, windows, requests that run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from server import CPU_FLAGS, PAGE_16, WINDOW, Server, environment, prompt

PROMPT, ANSWER, REQUESTS = 384, 420, 16


def run(module: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", module, *words),
        env=environment(variables) | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        capture_output=True,
        text=True,
        timeout=300,
    )


def planned(model: Path) -> dict[str, Any]:
    """What ``python -m kara_sglang.plan`` says of the server ``kara``."""
    load = ("--prompt", str(PROMPT), "--answer", str(ANSWER), "--running", str(REQUESTS))
    flags = ("--skip-tokenizer-init", *PAGE_16, *CPU_FLAGS, "--kv-compress", "kara", *WINDOW)
    done = run("kara_sglang.plan", "--model", str(model), *load, "--json", "--", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def most_running(server: Server, option: Any) -> tuple[list[dict[str, Any]], int]:
    """The reports of equal requests that arrive together, and how many the log says ran at once."""
    server.flush()
    before = len(server.log_text())
    inputs = [prompt(PROMPT, 900 + i) for i in range(REQUESTS)]
    answers = server.generate(inputs, kv_compress=option, tokens=ANSWER)
    # Each time that one is admitted; lines of decode steps come every 40 steps only.
    lines = re.findall(
        r"Prefill batch.*#new-seq: (\d+).*#running-req: (\d+)", server.log_text()[before:]
    )
    ran = max(int(new) + int(running) for new, running in lines)
    return [a["meta_info"]["kv_compress"] for a in answers], ran


def test_the_plan_the_doctor_and_the_server_agree(kara: Server, tiny_model: Path) -> None:
    """One model, one set of settings: the same pool, ring and R from all three."""
    kara.assert_nothing_leaked()
    plan, state = planned(tiny_model), kara.state()
    trace = {"trace": state["settings"]["trace"]}  # the only setting that the plan was not given
    assert plan["settings"] | trace == state["settings"]
    assert plan["pool_tokens"] == {"without": 8192, "with": state["pool_tokens"]}
    ring = plan["ring"]
    room = {key: ring[key] for key in ("bytes", "all_heads", "mean")}
    assert room == state["recorder_room"]
    size = f"{ring['bytes'] / 2**30:.2f} GiB ({ring['why']})"
    served = f"{ring['all_heads']} requests with all query heads or {ring['mean']} with their mean"
    assert f"query ring {size} for {served}; windows of others" in kara.log_text()

    settings = json.dumps({key: plan["settings"][key] for key in ("window", "delay", "query_mem_gb")})
    said = run("kara_sglang.doctor", "--model-path", str(tiny_model), SGLANG_KV_COMPRESS=settings)
    every, mean = ring["all_heads_bytes"], ring["mean_bytes"]
    assert f"{every:,} bytes a request with all query heads, {mean:,} with their mean" in said.stdout
    assert f"a ring of {size} has room for {served}; windows of others" in said.stdout


def test_as_many_run_as_the_plan_says(kara: Server, tiny_model: Path) -> None:
    """Requests that arrive together and go to their end, stock and compressed."""
    plan = planned(tiny_model)
    fits = plan["requests_that_fit"]
    assert fits["without"] < fits["with"] < REQUESTS
    before = len(kara.log_text())
    _, ran = most_running(kara, False)
    assert ran == fits["without"]
    reports, ran = most_running(kara, None)
    assert ran == fits["with"]
    assert {report["windows"] for report in reports} == {plan["windows_per_request"]}
    assert "Retract requests" not in kara.log_text()[before:]
    kara.assert_nothing_leaked()
