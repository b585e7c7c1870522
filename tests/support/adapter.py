"""A small LoRA adapter, and a model that it was merged into.

As a plugin: SGLang's LoRA copies from pinned memory, which no machine without a GPU has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make(folder: Path, model_path: Path, merged: Path) -> Path:
    """Write a random adapter for the attention of a model; and to ``merged`` the model with it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(TARGETS):
            out, width = module.weight.shape
            a = torch.randn(RANK, width, generator=generator) / width**0.5
            b = torch.randn(out, RANK, generator=generator) * 0.2
            tensors |= {
                f"base_model.model.{name}.lora_{part}.weight": tensor
                for part, tensor in (("A", a), ("B", b))
            }
            module.weight.data += ALPHA / RANK * b @ a
    model.save_pretrained(merged)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": RANK}
    about |= {
        "lora_alpha": ALPHA,
        "target_modules": TARGETS,
        "base_model_name_or_path": str(model_path),
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


class Unpinned:
    """``torch``, but for memory that would be pinned."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("arange", "empty", "tensor", "zeros"):
            return found
        return lambda *args, pin_memory=False, **named: found(*args, **named)


def load() -> None:
    """What SGLang calls in each process."""
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend

    layers.torch = torch_backend.torch = Unpinned()
    torch.Tensor.pin_memory = lambda tensor: tensor
