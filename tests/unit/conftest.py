"""What all unit tests share: SGLang's CPU engine, a clean environment, quiet hypothesis settings."""

from __future__ import annotations

import json
import logging
import os
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings

from kara_sglang import plugin
from kara_sglang.compat.flags import NEWER_FLAGS
from kara_sglang.hooks import Hook

# Timings on a shared machine say nothing; the same examples in every run.
settings.register_profile("unit", deadline=None, derandomize=True, database=None)
settings.load_profile("unit")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on tensors of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def untouched_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compression is off before and after each test, and logging works again."""
    saved = os.environ.pop("SGLANG_KV_COMPRESS", None)
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    plugin.set_launched(None)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.disable(logging.NOTSET)
    if saved is None:
        os.environ.pop("SGLANG_KV_COMPRESS", None)
    else:
        os.environ["SGLANG_KV_COMPRESS"] = saved


@pytest.fixture(scope="session")
def server_defaults() -> dict[str, Any]:
    """Every field of the installed SGLang's ``ServerArgs`` with its default."""
    import msgspec
    from sglang.srt.server_args import ServerArgs

    return {
        field.name: None if field.default is msgspec.NODEFAULT else field.default
        for field in msgspec.structs.fields(ServerArgs)
    }


@pytest.fixture
def resolved(server_defaults: dict[str, Any]) -> Callable[..., SimpleNamespace]:
    """Makes what ``resolving_view(server_args)`` is on a supported server, with some fields changed.
    A field that no tested SGLang has is an error."""

    from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig

    def make(**changes: Any) -> SimpleNamespace:
        unknown = set(changes) - set(server_defaults) - NEWER_FLAGS
        assert not unknown, f"ServerArgs has no field {unknown}"
        graphs = CudaGraphConfig(prefill=PhaseConfig(Backend.BREAKABLE))
        settled = {"device": "cuda", "page_size": 16, "attention_backend": "fa3"}
        settled |= {"cuda_graph_config": graphs}
        return SimpleNamespace(**(server_defaults | settled | changes))

    return make


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a Llama's config.json and nothing else."""
    folder = tmp_path_factory.mktemp("config-only")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's registry, empty for one test."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    yield HookRegistry


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> tuple[Hook, ...]:
    """Hooks on a module that stands in for one of SGLang's: methods of every kind and a function."""

    class Thing:
        def method(self) -> None: ...

        @classmethod
        def make(cls) -> None: ...

        @staticmethod
        def free() -> None: ...

    module = types.ModuleType("sglang.srt.kara_stand_in")
    module.Thing, module.function = Thing, lambda: None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return tuple(
        Hook(f"kara_stand_in.{name}", "after", (), "launcher.flags:check_server_args", "for a test")
        for name in ("Thing.method", "Thing.make", "Thing.free", "function")
    )
