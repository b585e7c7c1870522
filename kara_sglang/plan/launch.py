"""The command line that is planned, read as the launcher of the server will read it.

Flags, defaults and the model's config all go through SGLang's own code. Only two answers of the machine
are replaced: how much memory its GPU has, and that it is a CUDA GPU.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from kara_sglang import prefix_reuse
from kara_sglang.compat import kv_cache, sliding_window
from kara_sglang.config import KaraConfig
from kara_sglang.launcher import flags, refusals
from kara_sglang.scheduler import graphs, window_pool


@dataclass(frozen=True, slots=True)
class Launch:
    """One server, as its flags and its model's config describe it.

    Attributes
    ----------
    words
        Arguments of ``python -m sglang.launch_server``.
    resolved
        SGLang's settings after it has filled in its defaults (``resolving_view``).
    model
        SGLang's ``ModelConfig``.
    config : KaraConfig
    gpu_memory
        MiB per GPU as ``nvidia-smi`` says; None on a CPU.
    """

    words: list[str]
    resolved: Any
    model: Any
    config: KaraConfig
    gpu_memory: float | None

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return self.resolved.tp_size

    @property
    def kv_dtype(self) -> torch.dtype:
        """In what K and V are kept; a ``ValueError`` where the model's quantization cannot be read."""
        return kv_cache.planned_dtype(self.resolved.kv_cache_dtype, self.model)

    @property
    def captured(self) -> int:
        """Largest batch of which SGLang captures a decode graph; 0 where it captures none."""
        return 0 if self.gpu_memory is None else graphs.captured(self.resolved)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # without SGLang's usage text, which is hundreds of lines


def parser() -> argparse.ArgumentParser:
    """All flags of ``sglang.launch_server``, the plugin's included; raises ``ValueError``."""
    from sglang.srt.server_args import ServerArgs

    made = _Parser(allow_abbrev=False)
    ServerArgs.add_cli_args(made)
    if not any("--kv-compress" in action.option_strings for action in made._actions):
        flags.add_cli_args(None, made)  # SGLang's hooks do it where plugins are loaded
    return made


def read(words: list[str], gpu_memory: float | None) -> Launch:
    """Read ``words`` as the launcher does, for a GPU of ``gpu_memory`` MiB.

    Parameters
    ----------
    words
        Arguments of ``python -m sglang.launch_server``.
    gpu_memory
        None: what SGLang finds on this machine.

    Raises
    ------
    ValueError
        One line, for whatever the launcher would refuse.
    """
    from sglang.srt.arg_groups import memory_hook
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    device = [] if gpu_memory is None else ["--device", "cuda"]
    namespace = parser().parse_args([*words, *device])
    config = flags.read_flags(namespace)
    if config is None:
        raise ValueError("a plan needs compression; leave out --kv-compress none")
    with _gpu_of(gpu_memory):
        attributes = {name for name in ServerArgs.__struct_fields__ if hasattr(namespace, name)}
        record = ServerArgs(**{name: getattr(namespace, name) for name in attributes})
        try:
            model = model_config_of(record)
            record.resolve_once()
        except Exception as error:  # whatever SGLang raises for a model or flag that it does not take
            raise ValueError(f"SGLang refuses this: {_first_line(error)}") from error
        resolved = resolving_view(record)
        if resolved.device != "cpu" and gpu_memory is None:
            gpu_memory = memory_hook.get_device_memory_capacity(resolved.device)
    config = prefix_reuse.settled(config, resolved, model)
    refused = (
        refusals.of_flags(resolved)
        + refusals.of_sharing(resolved, config)
        + refusals.of_model_config(model)
        + refusals.of_window_pool(resolved, model, config)
        + refusals.of_rotary(model, config)
    )
    if refused:
        raise ValueError("; ".join(refused))
    if resolved.disaggregation_mode == "prefill":
        raise ValueError("a prefill server compresses nothing; plan its decode server")
    if resolved.attn_dp_size > 1:
        raise ValueError(
            "a plan does not divide a model for --attn-dp-size; plan one of its ranks, with its share "
            "of --tp-size and of the requests"
        )
    if window_pool.by_running_requests(resolved, model):
        raise ValueError(
            "a plan does not know the KV pool of sliding-window layers that SGLang makes with both "
            "--disable-radix-cache and --max-running-requests; leave one of them out"
        )
    config = config.reaching(sliding_window.longest(model))
    config.check_page_size(resolved.page_size)
    config.check_context(model.context_len, resolved.page_size)
    return Launch(words, resolved, model, config, gpu_memory)


@contextlib.contextmanager
def _gpu_of(memory: float | None) -> Iterator[None]:
    """SGLang's defaults as on a CUDA GPU of ``memory`` MiB; None: as on this machine.

    ``arg_groups/memory_hook.py`` asks for the memory, and ``model_executor/cuda_graph_config.py`` which
    prefill graph is the default.
    """
    if memory is None:
        yield
        return
    from sglang.srt.arg_groups import memory_hook
    from sglang.srt.model_executor import cuda_graph_config

    asked = memory_hook.get_device_memory_capacity, cuda_graph_config.default_prefill_backend
    memory_hook.get_device_memory_capacity = lambda _device=None: memory
    cuda_graph_config.default_prefill_backend = lambda: cuda_graph_config.Backend.BREAKABLE
    try:
        yield
    finally:
        memory_hook.get_device_memory_capacity, cuda_graph_config.default_prefill_backend = asked


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return text or type(error).__name__
