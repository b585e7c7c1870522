"""nano-kvllm, the engine of Kara's authors: offline, in an environment of its own, CUDA only."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks.serving.load import Load
from kara_sglang.benchmarks.serving.peers.base import Setup
from kara_sglang.benchmarks.serving.rows import Row

_SCRIPT = Path(__file__).with_name("nano_kvllm_offline.py")


class NanoKvllm:
    name = "nano_kvllm"
    install = (
        "python -m venv nano && nano/bin/pip install torch flash-attn triton transformers xxhash\n"
        "git clone https://github.com/TheToughCrane/nano-kvllm   # and put it on nano's PYTHONPATH\n"
        "python -m kara_sglang.benchmarks.serving --peer nano_kvllm=nano/bin/python ..."
    )
    backend = None

    def missing(self, setup: Setup) -> str | None:
        if setup.cpu:
            return "nano-kvllm needs a CUDA GPU"
        if "nano_kvllm" not in setup.pythons:
            return "no interpreter with nano-kvllm was named (--peer nano_kvllm=PYTHON)"
        return None

    def offline(self, row: Row, setup: Setup, load: Load, seed: int) -> dict[str, Any]:
        """Generate the load's tokens in one call; returns seconds and counts."""
        if load.kind != "random" or not load.ignore_eos:
            raise RuntimeError("nano-kvllm is driven with equal work of random prompts only")
        command = [
            *(str(setup.pythons["nano_kvllm"]), str(_SCRIPT), "--model", setup.model),
            *("--requests", str(load.requests), "--prompt", str(load.prompt)),
            *("--output", str(load.output), "--seed", str(seed), "--window", str(setup.window)),
            *(("--pool", str(setup.pool)) if setup.pool is not None else ()),
            *row.flags,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            tail = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise RuntimeError(f"nano-kvllm failed: {tail[0]}")
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
