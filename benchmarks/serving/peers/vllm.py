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
        # As long as the pool allows: its own choice is the model's, which a scarce pool does not hold.
        words += ["--port", str(port), "--dtype", setup.dtype, "--max-model-len", "auto"]
        if setup.pool is not None:
            block = 32 if setup.cpu else 16
            blocks = setup.pool // block + 1  # it keeps one for itself
            words += ["--block-size", str(block), "--num-gpu-blocks-override", str(blocks)]
        return [*words, *row.flags]

    def environment(self, row: Row, setup: Setup) -> dict[str, str]:
        if not setup.cpu:
            return {}
        # GiB that it wants to be told on a CPU; the pool is what the number of blocks says.
        return {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

    def counters(self, log: str) -> Counters | None:
        return None
