"""Which layers have a sliding window, by SGLang's own objects, and how SGLang reads it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import GEMMA_3, QWEN3_8B

from kara_sglang.compat import sliding_window


@pytest.mark.parametrize(
    ("config", "longest", "full"), [(GEMMA_3, 1024, 8), (QWEN3_8B, 0, 36)], ids=["gemma", "qwen"]
)
def test_what_a_config_says(tmp_path: Path, config: dict[str, Any], longest: int, full: int) -> None:
    """By SGLang's ``ModelConfig``; a window that no layer has does not count."""
    from sglang.srt.configs.model_config import ModelConfig

    (tmp_path / "config.json").write_text(json.dumps({"sliding_window": 4096} | config))
    model = ModelConfig(str(tmp_path))
    assert not model.is_hybrid_swa
    assert sliding_window.longest(model) == longest
    assert sliding_window.full_layers(model) == full
    model.hf_text_config = SimpleNamespace()
    assert sliding_window.longest(model) == 0
    assert sliding_window.full_layers(model) == model.num_hidden_layers


def test_what_a_layer_says() -> None:
    from sglang.srt.layers.radix_attention import RadixAttention

    def reach(size: int | None) -> int:
        return sliding_window.reach(RadixAttention(2, 64, 1.0, 2, 0, sliding_window_size=size))

    assert [reach(size) for size in (None, -1, 0, 1, 1023)] == [0, 0, 0, 1, 1023]


def test_sglang_counts_a_window_without_the_token_itself() -> None:
    """A window of n in a config reaches n - 1 back; torch_native masks by places in the row."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.models import gemma3_causal

    config = SimpleNamespace(sliding_window=1024)
    assert gemma3_causal.get_attention_sliding_window_size(config) == 1023
    mask = TorchNativeAttnBackend._make_sliding_window_mask(
        q_len=1, kv_len=10, sliding_window_size=3, device="cpu", query_offset=9
    )
    assert mask.tolist() == [[False] * 6 + [True] * 4]


@pytest.mark.parametrize(
    ("backend", "line"),
    [
        ("flashinfer", "kv_start_idx_tmp = seq_lens - paged_kernel_lens_tmp"),
        ("triton", "window_kv_start_idx = seq_lens - window_kv_lens"),
        ("flashattention", "window_size = (layer.sliding_window_size, 0)"),
    ],
)
def test_backends_of_gpus_count_a_window_by_kv_lengths(backend: str, line: str) -> None:
    """They cannot be imported here. The last one's kernel gets the KV lengths beside it."""
    import sglang

    folder = Path(sglang.__file__).parent / "srt" / "layers" / "attention"
    assert line in (folder / f"{backend}_backend.py").read_text()
