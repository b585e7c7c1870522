"""DP attention: each rank has requests of its own, and all of them step together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import requests
from mixing import answers_beside_prefills, assert_exact
from server import PAGE_16, PUNCTUAL, WINDOW, launch

from kara_sglang.benchmarks.tiny_model import make_tiny_llama

FLAGS = (
    *("--skip-tokenizer-init", *PAGE_16, "--kv-compress", "kara", *WINDOW, *PUNCTUAL),
    *("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
)

CONVERT = """
import importlib.abc, importlib.machinery, sys

NAME = "sglang.srt.managers.scheduler_components.dp_attn"

class Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)

        def convert(self, batch):
            if batch is not None and batch.forward_mode.is_decode() and batch.is_extend_in_batch:
                batch.convert_decode_to_extend()
                print("converted a step of", len(batch.reqs), flush=True)
            return batch

        adapter = next(c for c in vars(module).values() if hasattr(c, "maybe_convert_decode_to_extend"))
        adapter.maybe_convert_decode_to_extend = convert

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target) if name == NAME else None
        if spec is not None:
            spec.loader = Loader(name, spec.origin)
        return spec

sys.meta_path.insert(0, Finder)
"""
"""Where a rank prefills, SGLang turns the decode steps of others into prefills of one token each, if
its prefills run in CUDA graphs. Here it does so on a CPU."""


@pytest.fixture(scope="module")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SGLang's Llama knows no DP attention."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny-qwen3", family="Qwen3")


def test_ranks_with_requests_of_their_own(tiny_qwen3: Path, logs: Path, tmp_path: Path) -> None:
    """Steps that SGLang has turned into prefills included."""
    (tmp_path / "sitecustomize.py").write_text(CONVERT)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "PYTHONPATH": path}
    with launch(tiny_qwen3, logs / "dp_attention.log", *FLAGS, env=env, timeout=400) as server:
        answers = answers_beside_prefills(server, 60)
        assert server.log_text().count("converted a step of 2") > 10
        assert_exact(tiny_qwen3, answers)
        info = requests.get(f"{server.url}/server_info", timeout=60).json()
        states = [state["kv_compress"] for state in info["internal_states"]]
        assert sum(state["windows"] for state in states) == 12
        assert all(state["windows"] and not state["recorders_in_use"] for state in states)
        server.assert_nothing_leaked()
