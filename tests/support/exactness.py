"""What answers are compared with, and how: to the bit, or with transformers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from server import prompt

PROMPTS = [prompt(length, seed) for seed, length in enumerate((5, 37, 64, 100))]


def logprobs(answer: dict) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def assert_bit_exact(answers: list[dict], expected: list[dict]) -> None:
    for answer, reference in zip(answers, expected, strict=True):
        assert answer["output_ids"] == reference["output_ids"]
        assert logprobs(answer) == logprobs(reference)


def assert_same_choices(answer: dict, reference: dict, close: float = 1e-3) -> None:
    """The greedy answers of two runs whose batches differed: float32 rounds their sums otherwise. They
    are the same tokens up to a tie: there both runs took a token that they find as likely as the
    other's, so the log-probabilities agree up to and with the first token that differs."""
    pairs = zip(answer["output_ids"], reference["output_ids"], strict=True)
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    end = None if same is None else same + 1
    assert logprobs(answer)[:end] == pytest.approx(logprobs(reference)[:end], abs=close)


def assert_likeliest(
    model: Path,
    prompt: list[int],
    answer: list[int],
    kept: int,
    *,
    transferred: bool = True,
    page_size: int = 16,
    keeps: np.ndarray | None = None,
) -> int:
    """Each token of a greedy answer is one that transformers finds as likely as any other, with the
    K/V that `recent` retains of windows of 64 (delay 16), or what ``keeps`` says
    (:meth:`RetainedCache.prune`). Returns how many it passed.
    Where the prompt was not transferred to a decode server, it is all zeros and its token is given."""
    truth = RetainedCache(model, window=64, kept=kept, delay=16, page_size=page_size)
    if transferred:
        expected = truth.feed(prompt)
    else:
        truth.skip(len(prompt))
        truth.prune()
        expected = truth.feed(answer[:1])
        answer = answer[1:]
    for step, token in enumerate(answer):
        assert expected[token] > expected.max() - 1e-3, f"step {step}, {truth.windows} windows in"
        truth.prune(keeps=keeps)
        expected = truth.feed([token])
    return truth.windows


class RetainedCache:
    """The plain truth: transformers with a cache that holds exactly the retained K/V, as ``stored``.
    Layers with a sliding window hold everything, and see the newest tokens by their true positions."""

    def __init__(
        self,
        model_path: Path,
        window: int,
        kept: int,
        delay: int,
        page_size: int,
        stored: torch.dtype = torch.float32,
    ) -> None:
        from transformers import AutoModelForCausalLM, DynamicCache

        class Stored(DynamicCache):
            def update(self, keys, values, *args, **named):
                keys, values = (part.to(stored).to(part.dtype) for part in (keys, values))
                return super().update(keys, values, *args, **named)

        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self.cache = Stored()
        config = self.model.config
        every = ["full_attention"] * config.num_hidden_layers
        kinds = getattr(config, "layer_types", None) or every
        self.pruned = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        self.sees = config.sliding_window if "sliding_attention" in kinds else None
        self.window, self.kept, self.delay, self.page_size = window, kept, delay, page_size
        self.position = 0
        self.base: int | None = None
        self.windows = 0

    @property
    def slots(self) -> int:
        """K/V entries of a layer that is pruned."""
        return self.cache.get_seq_length(self.pruned[0])

    @torch.no_grad()
    def feed(self, tokens: list[int]) -> torch.Tensor:
        """Log-probabilities after ``tokens``, at their true positions, shape ``(vocab,)``."""
        ids = torch.tensor([tokens])
        where = torch.arange(self.position, self.position + len(tokens))
        mask: torch.Tensor | dict[str, torch.Tensor] = _hidden(self.slots, len(tokens))
        if self.sees is not None:
            near = _hidden(self.position, len(tokens))
            keys = torch.arange(self.position + len(tokens))
            near[where[:, None] - keys >= self.sees] = -math.inf
            mask = {"full_attention": mask[None, None], "sliding_attention": near[None, None]}
        else:
            mask = mask[None, None]
        logits = self.model(
            ids, position_ids=where[None], attention_mask=mask, past_key_values=self.cache
        ).logits
        self.position += len(tokens)
        return torch.log_softmax(logits[0, -1].float(), dim=-1)

    def skip(self, tokens: int) -> None:
        """So many tokens of which K and V are 0: a prompt that nobody has transferred."""
        config = self.model.config
        nothing = torch.zeros(1, config.num_key_value_heads, tokens, config.head_dim)
        for layer in range(config.num_hidden_layers):
            self.cache.update(nothing, nothing, layer)
        self.position += tokens

    def crop(self, tokens: int) -> None:
        """Forget all but the first ``tokens``, of which no window may be in the way."""
        for layer in self.cache.layers:
            length = layer.get_seq_length() - (self.position - tokens)
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        self.position = tokens

    def prune(self, known: int | None = None, keeps: np.ndarray | None = None) -> bool:
        """Before a decode step: drop W - R tokens of a window that is due, as far as ``known`` says, in
        tokens; None: all that are there. Whether one was due.

        ``keeps`` says what stays of each window, ``(windows, pruned layers, KV heads, W)``, 0 or 1;
        None: the newest R tokens.
        """
        length = self.slots
        known = length if known is None else length - (self.position - known)
        if self.base is None:
            self.base = -(-length // self.page_size) * self.page_size
        if known < self.base + self.window + self.delay:
            return False
        heads = self.model.config.num_key_value_heads
        stay = torch.ones(len(self.pruned), heads, length, dtype=torch.bool)
        if keeps is None:
            stay[..., self.base : self.base + self.window - self.kept] = False
        else:
            stay[..., self.base : self.base + self.window] = torch.from_numpy(
                keeps[self.windows]
            ).bool()
        for layer, own in zip([self.cache.layers[n] for n in self.pruned], stay, strict=True):
            layer.keys, layer.values = (
                part[0][own].unflatten(0, (heads, -1))[None] for part in (layer.keys, layer.values)
            )
        self.base += self.kept
        self.windows += 1
        return True


def _hidden(before: int, new: int) -> torch.Tensor:
    """A mask of ``new`` tokens that see each other causally, and all of ``before`` entries."""
    return torch.full((new, before + new), -math.inf).triu(before + 1)
