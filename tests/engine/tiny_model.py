"""A small random Llama that real SGLang loads like any other model."""

from __future__ import annotations

import json
from pathlib import Path

import torch

VOCAB = 512


def make_tiny_llama(folder: Path, *, layers: int = 4, seed: int = 0) -> Path:
    """Write a random Llama (8 query / 4 KV heads, head_dim 32) to ``folder``; returns it.

    Weights are scaled so that attention is neither uniform nor one-hot, and greedy decoding does not
    fall into a loop at once.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=8192,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                gain = 3.0 if ("q_proj" in name or "k_proj" in name) else 1.0
                torch.nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder
