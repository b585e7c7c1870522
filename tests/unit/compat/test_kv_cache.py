"""In what K and V are kept: by flag, and by what a checkpoint's quantization says with `auto`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import QWEN3_8B

from kara_sglang.compat import kv_cache
from kara_sglang.plan import memory
from kara_sglang.plan.launch import Launch, read

EIGHT = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
LINEAR = {"targets": ["Linear"], "weights": EIGHT, "input_activations": EIGHT}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": LINEAR},
    "ignore": ["lm_head"],
}
FP8, MODEL = torch.float8_e4m3fn, torch.bfloat16


def launch_of(folder: Path, quantization: dict[str, Any] | None, *flags: str) -> Launch:
    extra = {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(QWEN3_8B | extra))
    return read(["--model-path", str(folder), "--kv-compress", "kara", *flags], 80 * 1024)


@pytest.mark.parametrize(
    ("quantization", "stored"),
    [
        (None, MODEL),
        (COMPRESSED, MODEL),
        (COMPRESSED | {"kv_cache_scheme": EIGHT}, FP8),
        (COMPRESSED | {"kv_cache_scheme": EIGHT | {"strategy": "channel"}}, MODEL),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, MODEL),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, FP8),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": EIGHT}, FP8),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, MODEL),
    ],
    ids=str,
)
def test_auto_is_what_the_checkpoint_says(
    tmp_path: Path, quantization: dict[str, Any] | None, stored: torch.dtype
) -> None:
    """The plan asks SGLang's code about the config; a server asks it about the loaded model."""
    launch = launch_of(tmp_path, quantization)
    assert launch.resolved.kv_cache_dtype == "auto"
    assert launch.kv_dtype == stored
    assert memory.Rank.of(launch).token_bytes == 36 * 8 * 2 * 128 * stored.itemsize
    loaded = SimpleNamespace()
    if quantization is not None:
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.model_loader.weight_utils import get_quant_config

        loaded.quant_config = get_quant_config(launch.model, LoadConfig(), {})
    assert kv_cache.dtype_of("auto", MODEL, loaded) == stored


def test_a_flag_overrules_the_checkpoint(tmp_path: Path) -> None:
    scheme = COMPRESSED | {"kv_cache_scheme": EIGHT}
    for flag, stored in kv_cache.NAMED.items():
        assert launch_of(tmp_path, scheme, "--kv-cache-dtype", flag).kv_dtype == stored


def test_a_quantization_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(quantization="gone", dtype=MODEL)
    with pytest.raises(ValueError, match=r"quantization \(gone\) .*; pass --kv-cache-dtype"):
        kv_cache.planned_dtype("auto", model)
    assert kv_cache.planned_dtype("fp8_e5m2", model) == torch.float8_e5m2
