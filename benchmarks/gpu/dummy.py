"""Model folders without weights: a published model's shape, for SGLang's ``--load-format dummy``.

Speed depends on shapes, not on what the weights say, and a GPU machine without a network has none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vocab_size": 151936,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": _QWEN3
    | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 4000}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    | {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True},
    "Qwen3-4B": _QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "Qwen3-8B": _QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}
"""``config.json`` as published, what does not matter here left out; ``tiny`` is for rehearsals."""


def write_config(folder: Path, name: str) -> Path:
    """The folder of the model ``name`` below ``folder``: a ``config.json`` and nothing else."""
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(CONFIGS[name], indent=2) + "\n")
    return target


def kv_bytes(name: str) -> int:
    """Bytes of K and V of one token in 16 bit, all layers."""
    config = CONFIGS[name]
    return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
