"""A server that could not compress does not start, and its last line says why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from server import CPU_FLAGS, PAGE_16, WINDOW, free_port, run

# Run by every Python process that has this folder on its path, before SGLang is imported.
SABOTAGE = {
    "a hook that does not fit": (
        """
import sys
if "--multiprocessing-fork" in sys.argv:
    import dataclasses, kara_sglang.hooks as hooks
    table = list(hooks.SCHEDULER_HOOKS)
    index = next(i for i, h in enumerate(table) if h.target.endswith("reset_for_retract"))
    table[index] = dataclasses.replace(table[index], target="managers.schedule_batch.Req.reset_gone")
    hooks.SCHEDULER_HOOKS = tuple(table)
""",
        "Req.reset_gone is not in place",
    ),
    "a child without the plugin": (
        """
import os, sys
if "--multiprocessing-fork" in sys.argv:
    os.environ.pop("SGLANG_KV_COMPRESS", None)
""",
        "a scheduler process runs without the plugin",
    ),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_unhooked_server_refuses_to_start(
    what: str, tiny_model: Path, logs: Path, tmp_path: Path
) -> None:
    code, reason = SABOTAGE[what]
    (tmp_path / "sitecustomize.py").write_text(code)
    log = logs / f"{what.replace(' ', '_')}.log"
    command = (
        *("-m", "sglang.launch_server", "--model-path", str(tiny_model), *CPU_FLAGS, *PAGE_16),
        *("--skip-tokenizer-init", "--port", str(free_port()), "--kv-compress", "kara", *WINDOW),
        # With compressed prefixes SGLang itself ends a child that does not know their cache.
        *("--kv-compress-prefix-reuse", "exact"),
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with run(command, log, {"PYTHONPATH": path}) as process:
        code = process.wait(timeout=240)
    text = log.read_text()
    assert code not in (0, None)
    assert "fired up" not in text
    last = text.strip().splitlines()[-1]
    assert "kv-compress: error: " in last, text[-2000:]
    assert reason in last
