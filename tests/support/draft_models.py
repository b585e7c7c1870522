"""Small draft models that guess well, and what transformers says that each step must accept of them.

In SGLang a draft model does not see the first token of a text: at a position it gets the token behind
it, and all but STANDALONE get the target's hidden states of the position. So a draft that does what its
target does guesses nearly always, but not always, and each wrong or right guess is predictable.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kara_sglang.benchmarks.tiny_model import VOCAB, make_tiny_llama

LITTLE = 0.01
"""What a draft's guess owes to the hidden states."""
TAPPED = (0, 1, 2)
"""Layers of the target whose outputs EAGLE3 gets."""
SPECIAL = 3
"""Token ids that EAGLE3's draft does not guess; its vocabulary begins behind them."""


# -- checkpoints -------------------------------------------------------------------------------------


def make_target(folder: Path, head_dim: int = 32) -> Path:
    """One layer, and embeddings with a mean square of 1, so that their norm leaves them alone."""
    model = _load(make_tiny_llama(folder, layers=1, head_dim=head_dim))
    _scale_embeddings(model, 1)
    model.save_pretrained(folder)
    return folder


def make_deep_target(folder: Path) -> Path:
    """Four layers of which the last says nearly all, and the embeddings next to nothing. All heads of
    the last are alike, and so each keeps what most of them keep."""
    model = _load(make_tiny_llama(folder))
    _scale_embeddings(model, LITTLE)
    *others, last = model.model.layers
    with torch.no_grad():
        for layer in others:
            layer.self_attn.o_proj.weight *= LITTLE**2
            layer.mlp.down_proj.weight *= LITTLE**2
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(last.self_attn, name).weight
            weight.copy_(weight[: len(weight) // 4].repeat(4, 1))
    model.save_pretrained(folder)
    return folder


def make_mtp_target(folder: Path) -> Path:
    """A MiMo, which is a Qwen2 with a head that guesses in its checkpoint; one layer as above. SGLang's
    CPU engine knows it with the usual head_dim only."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    llama = _load(make_target(folder, head_dim=16))
    with torch.device("meta"):
        config = Qwen2Config.from_dict(llama.config.to_dict() | {"model_type": "qwen2"})
        names = Qwen2ForCausalLM(config).state_dict()
    tensors, generator = llama.state_dict(), torch.Generator().manual_seed(1)
    for name in names.keys() - tensors.keys():
        tensors[name] = torch.randn(names[name].shape, generator=generator) * 0.1
    width = config.hidden_size
    head = {
        "input_proj.weight": _mixed(width, generator).roll(width, dims=1),
        "token_layernorm.weight": torch.ones(width),
        "hidden_layernorm.weight": torch.ones(width),
        "final_layernorm.weight": tensors["model.norm.weight"],
    }
    head |= _of_layer(tensors, 0)
    tensors |= {f"model.mtp_layers.0.{name}": tensor.clone() for name, tensor in head.items()}
    _write(folder, folder, tensors, "MiMoForCausalLM", model_type="qwen2", num_nextn_predict_layers=1)
    return folder


def make_eagle(folder: Path, target: Path) -> Path:
    """The target's layer behind ``fc``, which adds a little of the hidden state to the embedding."""
    layer = _of_layer(_load(target).state_dict(), 0)
    tensors = {f"layers.0.{name}": tensor for name, tensor in layer.items()}
    del tensors["layers.0.input_layernorm.weight"]
    width = len(tensors["layers.0.post_attention_layernorm.weight"])
    tensors["fc.weight"] = _mixed(width, torch.Generator().manual_seed(1))
    tensors["fc.bias"] = torch.zeros(width)
    return _write(folder, target, tensors, "LlamaForCausalLMEagle")


def make_eagle3(folder: Path, target: Path) -> Path:
    """The target's last layer, whose attention also sees a little of the hidden states."""
    weights, generator = _load(target).state_dict(), torch.Generator().manual_seed(1)
    tensors = {f"midlayer.{name}": tensor for name, tensor in _of_layer(weights, 3).items()}
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = tensors[f"midlayer.self_attn.{name}.weight"]
        states = torch.randn(weight.shape, generator=generator) * LITTLE
        tensors[f"midlayer.self_attn.{name}.weight"] = torch.cat((weight, states), dim=1)
    width = weight.shape[1]
    tensors["midlayer.hidden_norm.weight"] = torch.ones(width)
    fc = torch.randn(width, len(TAPPED) * width, generator=generator)
    tensors["fc.weight"] = fc / (len(TAPPED) * width) ** 0.5
    # The residual is the hidden state, of which the own ones must be small, too.
    tensors["norm.weight"] = weights["model.norm.weight"] * LITTLE
    tensors["lm_head.weight"] = weights["lm_head.weight"][SPECIAL:] / LITTLE
    tensors["d2t"] = torch.full((VOCAB - SPECIAL,), SPECIAL)
    more = {"num_hidden_layers": 1, "draft_vocab_size": VOCAB - SPECIAL, "norm_output": True}
    more["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": TAPPED}
    return _write(folder, target, tensors, "LlamaForCausalLMEagle3", **more)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _scale_embeddings(model: Any, root_of_mean_square: float) -> None:
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        weight *= root_of_mean_square / weight.square().mean(-1, keepdim=True).sqrt()


def _mixed(width: int, generator: torch.Generator) -> torch.Tensor:
    """Takes an embedding and a hidden state, beside each other, to the embedding and a little more."""
    return torch.cat((torch.eye(width), torch.randn(width, width, generator=generator) * LITTLE), dim=1)


def _of_layer(tensors: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}."
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _write(
    folder: Path, target: Path, tensors: dict[str, torch.Tensor], architecture: str, **more: Any
) -> Path:
    if folder != target:
        folder.mkdir()
        shutil.copy(target / "config.json", folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [architecture]} | more
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# -- what they must guess ----------------------------------------------------------------------------


class Standalone:
    """The target as its own draft.

    A draft maps token ids and hidden states of as many positions, ``(1, n, width)``, to what follows.
    """

    def __init__(self, target: Path, _draft: Path) -> None:
        self.target, self.draft = _load(target), _load(target)
        self.head = self.draft.lm_head
        self.first = 0  # the token id of its first logit

    def given(self, text: list[int]) -> torch.Tensor:
        """The hidden states that the target gives of a text."""
        return self.target.model(torch.tensor([text])).last_hidden_state

    def inputs(self, embedded: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """What goes into the draft's layers."""
        return embedded

    def hidden(self, ids: list[int], states: torch.Tensor) -> torch.Tensor:
        """The draft's last hidden states: what its head and its next step get."""
        embedded = self.draft.model.embed_tokens(torch.tensor([ids]))
        return self.draft.model(inputs_embeds=self.inputs(embedded, states)).last_hidden_state


class Eagle(Standalone):
    """Token and hidden state go into the layer together; nothing is normed."""

    def __init__(self, target: Path, draft: Path) -> None:
        super().__init__(target, draft)
        self.fc = load_file(draft / "model.safetensors")["fc.weight"]
        self.draft.model.layers[0].input_layernorm = torch.nn.Identity()
        self.draft.model.norm = torch.nn.Identity()

    def inputs(self, embedded: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return torch.cat((embedded, states), dim=-1) @ self.fc.T


class Mtp(Standalone):
    """Hidden state and token go into the layer together, each normed; no token at position 0."""

    def __init__(self, target: Path, draft: Path) -> None:
        super().__init__(target, draft)
        self.fc = load_file(draft / "model.safetensors")["model.mtp_layers.0.input_proj.weight"]

    def inputs(self, embedded: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        normed = [
            torch.nn.functional.rms_norm(part, part.shape[-1:], eps=self.draft.config.rms_norm_eps)
            for part in (states, embedded)
        ]
        normed[1][:, 0] = 0
        return torch.cat(normed, dim=-1) @ self.fc.T


class Eagle3(Standalone):
    """The residual is the hidden state; the attention sees the token beside it."""

    def __init__(self, target: Path, draft: Path) -> None:
        super().__init__(target, draft)
        tensors = load_file(draft / "model.safetensors")
        self.fc, self.first = tensors["fc.weight"], SPECIAL
        self.head = torch.nn.Linear(1, 1, bias=False)
        del self.draft.model.layers[:-1]
        (layer,) = self.draft.model.layers
        layer.self_attn.layer_idx = 0
        layer.input_layernorm = self.both = _Both(self.draft.config.rms_norm_eps)
        named = {self.head: "lm_head", self.draft.model.norm: "norm"}
        named |= {
            getattr(layer.self_attn, name): f"midlayer.self_attn.{name}"
            for name in ("q_proj", "k_proj", "v_proj")
        }
        for module, name in named.items():
            module.weight = torch.nn.Parameter(tensors[f"{name}.weight"])

    def given(self, text: list[int]) -> torch.Tensor:
        outputs = self.target.model(torch.tensor([text]), output_hidden_states=True).hidden_states[1:]
        return torch.cat([outputs[layer] for layer in TAPPED], dim=-1) @ self.fc.T

    def inputs(self, embedded: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        self.both.embedded = embedded
        return states


class _Both(torch.nn.Module):
    """A layer's norm that puts the embeddings of this step before its input."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps, self.embedded = eps, torch.empty(0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        parts = (self.embedded, states)
        normed = [torch.nn.functional.rms_norm(part, part.shape[-1:], eps=self.eps) for part in parts]
        return torch.cat(normed, dim=-1)


DRAFTS = {"STANDALONE": Standalone, "EAGLE": Eagle, "EAGLE3": Eagle3, "MTP": Mtp}


def make(kind: str, folder: Path) -> tuple[Path, Path]:
    """A target and its draft, in folders below ``folder``."""
    if kind == "MTP":
        return (make_mtp_target(folder / "target"),) * 2
    if kind == "EAGLE3":
        target = make_deep_target(folder / "target")
        return target, make_eagle3(folder / "draft", target)
    target = make_target(folder / "target")
    return target, make_eagle(folder / "draft", target) if kind == "EAGLE" else target


@torch.no_grad()
def text_of(draft: Standalone, prompt: list[int], tokens: int) -> list[int]:
    """The prompt and the target's greedy answer."""
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(draft.target(torch.tensor([text])).logits[0, -1].argmax()))
    return text


@torch.no_grad()
def accepted(draft: Standalone, text: list[int], prompt: int, tokens: int, steps: int) -> list[int]:
    """How many drafts each step accepts while a request with such a prompt writes so many tokens.

    The text must be a step longer: SGLang counts what the last one accepts beyond the end.
    """
    states = draft.given(text)
    counts, length = [], prompt  # the token at `length` is certain and has no KV yet
    while length + 1 < prompt + tokens:
        guesses = _guesses(draft, text[: length + 1], states[:, :length], steps)
        right = [guess == text[length + 1 + i] for i, guess in enumerate(guesses)]
        counts.append([*right, False].index(False))
        length += counts[-1] + 1
    return counts


def _guesses(draft: Standalone, text: list[int], states: torch.Tensor, steps: int) -> list[int]:
    ids, guesses = text[1:], []
    for _ in range(steps):
        hidden = draft.hidden(ids, states)
        guesses.append(draft.first + int(draft.head(hidden[0, -1]).argmax()))
        ids = [*ids, guesses[-1]]
        states = torch.cat((states, hidden[:, -1:]), dim=1)
    return guesses
