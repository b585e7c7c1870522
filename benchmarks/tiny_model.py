"""A small random Llama with a tokenizer of its own: what counted figures and tests run on.

It generates as fast as the engine can schedule, so that scheduling can be counted in seconds; its
answers mean nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCAB = 512
EOS = 2


def make_tiny_llama(
    folder: Path,
    *,
    layers: int = 4,
    seed: int = 0,
    head_dim: int = 32,
    family: str = "Llama",
    context: int = 8192,
) -> Path:
    """Write a random Llama (8 query / 4 KV heads) with a context of so many tokens to ``folder``, or a
    model of another family of transformers; returns it.

    Weights are scaled so that attention is neither uniform nor one-hot, and greedy decoding does not
    fall into a loop at once.
    """
    import transformers

    settings: dict[str, Any] = {"rope_theta": 10000.0}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=head_dim,
        max_position_embeddings=context,
        **settings,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                gain = 3.0 if ("q_proj" in name or "k_proj" in name) else 1.0
                torch.nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return folder


def add_word_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of one made-up word per id beside the model, so that text can travel.

    Every text of these words, separated by blanks, has exactly one token per word.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {0: "<unk>", 1: "<s>", EOS: "</s>"}
    words = {special.get(i, f"w{i}"): i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder
