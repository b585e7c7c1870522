"""A small random gpt-oss: window layers with a KV pool of their own, attention sinks, and experts."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from kara_sglang.benchmarks.tiny_model import EOS, VOCAB

WINDOW = 40  # tokens that a window layer sees, its own included
FULL = (1, 3)  # layers


def make_tiny_gpt_oss(folder: Path, seed: int = 0) -> Path:
    """Write a random gpt-oss (four layers, 4 query / 2 KV heads, head_dim 32, 2 experts) to
    ``folder``; returns it.

    Both experts are always asked: where some are chosen, rounding decides a tie, and a log-probability
    jumps. They are float32; those of the real ones are MXFP4, which needs a GPU. Sinks are numbers of
    8 bits, because SGLang keeps them in bfloat16 whatever the model's dtype.
    """
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=2,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        sliding_window=WINDOW,
        layer_types=["full_attention" if i in FULL else "sliding_attention" for i in range(4)],
        # As in the real ones, whose texts of 4,096 tokens became 131,072.
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 512,
        },
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = GptOssForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter, mean=1.0)
                parameter.copy_(parameter.bfloat16())
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() > 1:
                gain = 3.0 if ("q_proj" in name or "k_proj" in name) else 1.0
                inputs = parameter.shape[1]
                torch.nn.init.normal_(parameter, std=gain * inputs**-0.5)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return folder
