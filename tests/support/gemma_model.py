"""A small random Gemma 3: layers with a sliding window beside full ones, which turn by other angles."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from kara_sglang.benchmarks.tiny_model import EOS, VOCAB

WINDOW = 40  # tokens that a window layer sees, its own included
FULL = (2, 5)  # layers


def make_tiny_gemma(folder: Path, seed: int = 0) -> Path:
    """Write a random Gemma 3 (six layers, 4 query / 2 KV heads, head_dim 32) to ``folder``; returns it.

    Layers are louder than embeddings, so that greedy decoding does not repeat its input, and attention
    is neither uniform nor one-hot.
    """
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=4096,
        sliding_window=WINDOW,
        layer_types=["full_attention" if i in FULL else "sliding_attention" for i in range(6)],
        rope_parameters={
            # Scaled as in the models of 4B and more.
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        tie_word_embeddings=True,  # as in all of them; SGLang knows no other
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                gain = 0.25 if "embed" in name else 1.0
                torch.nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(0.3)  # Gemma's norms multiply by 1 + weight
            elif "post_" in name or name == "model.norm.weight":
                parameter.fill_(3.0)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return folder
