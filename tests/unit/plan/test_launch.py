"""The command line of a plan, read as the launcher reads it."""

from __future__ import annotations

import pytest
import torch

from kara_sglang.plan.launch import read


def test_flags_defaults_and_the_model_are_the_launchers(qwen: str) -> None:
    """For a GPU that is not here; what SGLang is told of it is taken back."""
    from sglang.srt.arg_groups import memory_hook
    from sglang.srt.model_executor import cuda_graph_config

    asked = memory_hook.get_device_memory_capacity, cuda_graph_config.default_prefill_backend
    words = ["--model-path", qwen, "--kv-compress", "snapkv", "--tp-size", "2", "--page-size", "64"]
    launch = read([*words, "--kv-cache-dtype", "fp8_e4m3"], 80 * 1024)
    assert (launch.tp, launch.resolved.device, launch.resolved.page_size) == (2, "cuda", 64)
    assert (launch.config.selector, launch.model.num_hidden_layers) == ("snapkv", 36)
    assert launch.kv_dtype == torch.float8_e4m3fn
    assert launch.gpu_memory == 80 * 1024 and launch.captured > 24
    assert asked == (memory_hook.get_device_memory_capacity, cuda_graph_config.default_prefill_backend)
    smaller = read([*words, "--cuda-graph-max-bs-decode", "24"], 30 * 1024)
    assert smaller.captured == 24 and smaller.kv_dtype == torch.bfloat16


def test_on_a_cpu_no_graph_is_captured(qwen: str) -> None:
    launch = read(["--model-path", qwen, "--kv-compress", "kara", "--device", "cpu"], None)
    assert (launch.resolved.device, launch.gpu_memory, launch.captured) == ("cpu", None, 0)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--kv-compress none", "leave out --kv-compress none"),
        (
            "--kv-compress kara --pp-size 2 --enable-streaming-session",
            "--pp-size .*; --enable-streaming-session",
        ),
        ("--kv-compress kara --enable-mixed-chunk", "use --disable-prefill-cuda-graph"),
        ("--kv-compress kara --disaggregation-mode prefill", "plan its decode server"),
        (
            "--kv-compress kara --tp-size 2 --attn-dp-size 2 --disable-prefill-cuda-graph",
            "does not divide a model for --attn-dp-size",
        ),
        ("--kv-compress kara --kv-compress-window 40 --page-size 16", "use 32 or 48"),
        ("--kv-compress kara --context-length 300", "window"),
    ],
)
def test_what_the_launcher_refuses_is_one_line(qwen: str, flags: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        read(["--model-path", qwen, *flags.split()], 80 * 1024)
    assert "\n" not in str(refused.value)
