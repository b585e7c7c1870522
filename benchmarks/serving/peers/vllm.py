"""vLLM, in an environment of its own: its packages and SGLang's do not go together."""

from __future__ import annotations

from kara_sglang.benchmarks.serving.counters import Counters
from kara_sglang.benchmarks.serving.peers.base import Setup
from kara_sglang.benchmarks.serving.rows import Row


class VLLM:
    name = "vllm"
    install = (
        "python -m venv vllm && vllm/bin/pip install vllm   # no GPU: benchmarks/serving/README.md\n"
        "python -m kara_sglang.benchmarks.serving --peer vllm=vllm/bin/python ..."
    )
    backend = "vllm"

    def missing(self, setup: Setup) -> str | None:
        if "vllm" in setup.pythons:
            return None
        return "no interpreter with vLLM was named (--peer vllm=PYTHON)"

    def command(self, row: Row, setup: Setup, port: int) -> list[str]:
        python = str(setup.pythons["vllm"])
        words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", setup.model]
        words += ["--port", str(port), "--dtype", setup.dtype, "--max-model-len", "4096"]
        if setup.pool is not None and not setup.cpu:
            block = 16
            words += ["--num-gpu-blocks-override", str(setup.pool // block)]
        return [*words, *row.flags]

    def environment(self, row: Row, setup: Setup) -> dict[str, str]:
        if not setup.cpu:
            return {}
        # The CPU engine's pool is given in GiB: the smallest, the comparison with it is of rates only.
        return {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

    def counters(self, log: str) -> Counters | None:
        return None
