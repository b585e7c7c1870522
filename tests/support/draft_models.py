"""Small draft models that guess well, and what transformers says that each step must accept of them.

In SGLang a draft model does not see the first token of a text: at a position it gets the token behind
it, EAGLE with the target's hidden state of the position. So a draft that equals its target guesses
nearly always, but not always, and each wrong or right guess is predictable.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kara_sglang.benchmarks.tiny_model import make_tiny_llama


def make_target(folder: Path) -> Path:
    """One layer, and embeddings with a mean square of 1, so that their norm leaves them alone."""
    model = _load(make_tiny_llama(folder, layers=1))
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        weight /= weight.square().mean(-1, keepdim=True).sqrt()
    model.save_pretrained(folder)
    return folder


def make_eagle(folder: Path, target: Path) -> Path:
    """The target's layer behind ``fc``, which adds a little of the hidden state to the embedding."""
    from safetensors.torch import save_file

    model = _load(target)
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    fc = torch.cat((torch.eye(width), torch.randn(width, width, generator=generator) * 0.01), dim=1)
    tensors = {"fc.weight": fc, "fc.bias": torch.zeros(width)}
    for name, tensor in model.model.layers.state_dict().items():
        if "input_layernorm" not in name:
            tensors[f"layers.{name}"] = tensor
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLMEagle"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _load(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Expected:
    """What SGLang must do with a target and its draft; without ``eagle`` the target drafts itself."""

    def __init__(self, target: Path, eagle: Path | None = None) -> None:
        self.target, self.draft = _load(target), _load(target)
        self.fc: torch.Tensor | None = None
        if eagle is not None:
            from safetensors.torch import load_file

            self.fc = load_file(eagle / "model.safetensors")["fc.weight"]
            self.draft.model.layers[0].input_layernorm = torch.nn.Identity()
            self.draft.model.norm = torch.nn.Identity()

    @torch.no_grad()
    def text(self, prompt: list[int], tokens: int) -> list[int]:
        """The prompt and the target's greedy answer."""
        text = list(prompt)
        for _ in range(tokens):
            text.append(int(self.target(torch.tensor([text])).logits[0, -1].argmax()))
        return text

    @torch.no_grad()
    def accepted(self, text: list[int], prompt: int, tokens: int, steps: int) -> list[int]:
        """How many drafts each step accepts while a request with such a prompt writes so many tokens.

        The text must be a step longer: SGLang counts what the last one accepts beyond the end.
        """
        states = self.target.model(torch.tensor([text])).last_hidden_state
        counts, length = [], prompt  # the token at `length` is certain and has no KV yet
        while length + 1 < prompt + tokens:
            guesses = self._guesses(text[: length + 1], states[:, :length], steps)
            right = [guess == text[length + 1 + i] for i, guess in enumerate(guesses)]
            counts.append([*right, False].index(False))
            length += counts[-1] + 1
        return counts

    def _guesses(self, text: list[int], states: torch.Tensor, steps: int) -> list[int]:
        ids, guesses = text[1:], []
        for _ in range(steps):
            inputs = self.draft.model.embed_tokens(torch.tensor([ids]))
            if self.fc is not None:
                inputs = torch.cat((inputs, states), dim=-1) @ self.fc.T
            hidden = self.draft.model(inputs_embeds=inputs).last_hidden_state
            guesses.append(int(self.draft.lm_head(hidden[0, -1]).argmax()))
            ids = [*ids, guesses[-1]]
            states = torch.cat((states, hidden[:, -1:]), dim=1)
        return guesses
