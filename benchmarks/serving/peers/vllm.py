"""vLLM, in an environment of its own: its packages and SGLang's do not go together."""

from __future__ import annotations

import re
import statistics

from prometheus_client.parser import text_string_to_metric_families

from kara_sglang.benchmarks.serving.counters import Counters
from kara_sglang.benchmarks.serving.rows import Row
from kara_sglang.benchmarks.serving.server import Server
from kara_sglang.benchmarks.serving.setup import Setup

_RUNNING = re.compile(r"Running: (\d+) reqs")
_TOTALS = (
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
)


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
        every = {"VLLM_LOG_STATS_INTERVAL": "1"}  # seconds between two lines that say how many run
        if not setup.cpu:
            return every
        # GiB that it wants to be told on a CPU; the pool is what the number of blocks says.
        return every | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

    def mark(self, server: Server) -> tuple[int, dict[str, float]]:
        return server.log_position(), _totals(server.get("/metrics").text)

    def counters(self, server: Server, mark: tuple[int, dict[str, float]]) -> Counters:
        """Running requests are sampled once a second; its decode steps are not known."""
        position, before = mark
        after = _totals(server.get("/metrics").text)
        preempted, hits, asked = (after[name] - before[name] for name in _TOTALS)
        running = [n for line in _RUNNING.findall(server.log_since(position)) if (n := int(line))]
        return Counters(
            decode_steps=None,
            mean_running=statistics.fmean(running) if running else None,
            peak_running=max(running, default=None),
            retractions=int(preempted),
            prefilled=int(asked - hits),
            hit_rate=hits / asked if asked else 0.0,
            held=1.0,
            without_queries=None,
            without_graph=None,
            schedule={},
        )


def _totals(metrics: str) -> dict[str, float]:
    """The counters of :data:`_TOTALS`, summed over engines, from Prometheus' text."""
    samples = [s for family in text_string_to_metric_families(metrics) for s in family.samples]
    if missing := set(_TOTALS) - {sample.name for sample in samples}:
        raise RuntimeError(f"vLLM's /metrics has no {', '.join(sorted(missing))}")
    return {name: sum(s.value for s in samples if s.name == name) for name in _TOTALS}
