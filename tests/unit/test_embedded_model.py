"""The embedded model: where it comes from, and that its conversion restores what it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT

from kara_sglang import embedded_model


def test_the_makefile_installs_the_package_that_the_code_names() -> None:
    assert f"--no-deps {embedded_model.REQUIREMENT})" in (ROOT / "Makefile").read_text()
    assert embedded_model.REQUIREMENT.replace("==", "-") in embedded_model.FOLDER_NAME


def test_a_cached_model_needs_no_package(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded_model.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(embedded_model.EmbeddedModelMissing, match="pip install"):
        embedded_model.embedded_model_path()
    assert list(tmp_path.iterdir()) == []
    folder = tmp_path / "kara-sglang" / embedded_model.FOLDER_NAME
    folder.mkdir(parents=True)
    assert embedded_model.embedded_model_path() == folder


HEADS, KV_HEADS, HIDDEN, FFN = 4, 2, 32, 48


def llama_cpp_order(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of Q or K one by one: llama.cpp keeps the rows of a rotation together."""
    half = len(matrix) // heads // 2
    rows = [
        head * 2 * half + part * half + i
        for head in range(heads)
        for i in range(half)
        for part in range(2)
    ]
    return matrix[rows]


def test_a_conversion_restores_weights_and_tokenizer(tmp_path: Path) -> None:
    import gguf
    from safetensors.torch import load_file
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoConfig, AutoTokenizer

    generator = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": ("attn_q", (HIDDEN, HIDDEN)),
        "self_attn.k_proj": ("attn_k", (HIDDEN * KV_HEADS // HEADS, HIDDEN)),
        "self_attn.v_proj": ("attn_v", (HIDDEN * KV_HEADS // HEADS, HIDDEN)),
        "self_attn.o_proj": ("attn_output", (HIDDEN, HIDDEN)),
        "mlp.gate_proj": ("ffn_gate", (FFN, HIDDEN)),
        "mlp.up_proj": ("ffn_up", (FFN, HIDDEN)),
        "mlp.down_proj": ("ffn_down", (HIDDEN, FFN)),
        "input_layernorm": ("attn_norm", (HIDDEN,)),
        "post_attention_layernorm": ("ffn_norm", (HIDDEN,)),
    }
    # "12" can be merged here: a tokenizer that does not split digits gives itself away.
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "12"]
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(12345.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    expected = {}

    def add(name: str, gguf_name: str, shape: tuple[int, ...]) -> None:
        matrix = generator.standard_normal(shape).astype(np.float32)
        expected[name] = torch.from_numpy(matrix).to(torch.bfloat16)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(gguf_name.split(".")[-2])
        writer.add_tensor(gguf_name, llama_cpp_order(matrix, heads) if heads else matrix)

    add("model.embed_tokens.weight", "token_embd.weight", (len(tokens), HIDDEN))
    add("model.norm.weight", "output_norm.weight", (HIDDEN,))
    for name, (gguf_name, shape) in shapes.items():
        add(f"model.layers.0.{name}.weight", f"blk.0.{gguf_name}.weight", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    folder = tmp_path / "converted"
    embedded_model.convert(tmp_path / "tiny.gguf", folder)

    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, matrix in expected.items():
        assert torch.equal(weights[name], matrix), name
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_attention_heads, config.num_key_value_heads) == (HEADS, KV_HEADS)
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (12345.0, 1e-5)
    assert config.tie_word_embeddings and config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a12<|im_end|>") == ["a", "1", "2", "<|im_end|>"]
    chat = [{"role": "user", "content": "hé 12"}]
    assert tokenizer.decode(tokenizer.apply_chat_template(chat)["input_ids"]) == "hé 12<|im_end|>"
