"""The plain truth beside the server: transformers with exactly the K/V that compression retains.

A :class:`Replay` performs a script without SGLang: the same model, the same selectors, kept positions
per layer and head, true RoPE positions. Tokens between two compressions are computed at once, so it is
far faster than an engine on a CPU. It checks the instrument (both must give the same numbers), searches
the space of selectors on development texts, and makes tables that an engine on a CPU takes hours for;
the documents say which.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch

from kara_sglang.benchmarks.quality.engine import PAGE_SIZE, EngineFailed
from kara_sglang.benchmarks.quality.script import Cell, Script
from kara_sglang.config import KaraConfig
from kara_sglang.kernels import selectors
from kara_sglang.kernels.record import FP8, mean_of
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.select import select
from kara_sglang.kernels.selectors.base import Selector


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is compressed; lengths in tokens.

    Attributes
    ----------
    selector
        None: not at all.
    window, kept, delay, page_size
        W, R, the delay, and what the first window's start is rounded up to.
    fp8, mean
        What the recorder keeps of the queries.
    seed
        As the request's own option.
    """

    selector: Selector | None
    window: int
    kept: int
    delay: int
    page_size: int = PAGE_SIZE
    fp8: bool = False
    mean: bool = False
    seed: int = 0

    @classmethod
    def of(cls, selector: str | None, config: KaraConfig) -> Self:
        """What a server with these settings and room to record every head does for a request.

        Raises
        ------
        ValueError
            For settings that a replay has nothing for.
        """
        if config.query_dtype == "fp4":
            raise ValueError("a replay records no queries in fp4")
        return cls(
            None if selector is None else selectors.build(selector, config),
            config.window,
            config.kept(PAGE_SIZE),
            config.delay,
            fp8=config.query_dtype == "fp8",
            mean=config.query_heads == "mean",
        )

    def first(self, prompt: int) -> int:
        """Where the first window of a request with ``prompt`` tokens starts."""
        return -(-prompt // self.page_size) * self.page_size


@dataclass(slots=True)
class Layer:
    """One layer's state; ``keys`` and ``values`` are what is retained, queries are all there ever were.

    Shapes ``(num_kv_heads, length, head_dim)`` and ``(num_q_heads, length, head_dim)``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    sliding_window: int | None = None
    """Tokens that a query sees, its own included; None: all."""


class Replay:
    """A transformers model whose attention reads the layers' retained K/V.

    Layers with a sliding window keep everything.

    Parameters
    ----------
    model : str
        A folder.
    dtype : torch.dtype
        float32, unless rounding is to be studied.
    """

    def __init__(self, model: str, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        name = f"kara_replay_{id(self)}"
        AttentionInterface.register(name, self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation=name
        ).eval()
        self.scale = self.model.model.layers[0].self_attn.scaling
        self._layers: list[Layer] = []
        self._full: dict[tuple[str, ...], tuple[Script, list[Layer], Cell, torch.Tensor]] = {}

    def _attention(
        self,
        module: Any,  # an attention layer of transformers
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: torch.Tensor | None,
        sliding_window: int | None = None,
        **more: object,
    ) -> tuple[torch.Tensor, None]:
        """Append the new tokens' K/V, then attend to everything retained, causally among the new."""
        if unknown := [name for name in ("s_aux", "softcap") if more.get(name) is not None]:
            raise EngineFailed(f"this model needs an engine: a replay's attention has no {unknown[0]}")
        if module.layer_idx == len(self._layers):
            self._layers.append(Layer(key[0], value[0], query[0], sliding_window))
        else:
            layer = self._layers[module.layer_idx]
            self._layers[module.layer_idx] = Layer(
                torch.cat([layer.keys, key[0]], dim=1),
                torch.cat([layer.values, value[0]], dim=1),
                torch.cat([layer.queries, query[0]], dim=1),
                sliding_window,
            )
        layer = self._layers[module.layer_idx]
        new, total = query.shape[2], layer.keys.shape[1]
        seen = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        if sliding_window is not None:
            seen = seen.triu(total - new - sliding_window + 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            layer.keys[None],
            layer.values[None],
            attn_mask=seen,
            scale=self.scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2), None

    @torch.no_grad()
    def _feed(self, tokens: list[int], position: int) -> torch.Tensor:
        """Compute tokens at their logical positions; hidden states, shape ``(len(tokens), width)``."""
        return self.model.model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.arange(position, position + len(tokens))[None],
            use_cache=False,
        ).last_hidden_state[0]

    @torch.no_grad()
    def _logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.model.lm_head(hidden).float(), dim=-1)

    def full(self, script: Script) -> Cell:
        """Perform ``script`` with its full cache and remember it as the reference."""
        key = (script.name,)
        if key not in self._full:
            self._layers = []
            tokens = script.prompt + script.forced[:-1]
            hidden = self._feed(tokens, 0)
            first = len(script.prompt) - 1
            measured = script.measured()
            logprobs = self._logprobs(hidden[[first + step for step in measured]])
            slots = [first + step + 1 for step in measured]
            cell = Cell(*_taken(logprobs, script, measured), slots, [])
            place = {step: i for i, step in enumerate(measured)}
            reference = logprobs[[place[step] for step in script.compared()]]
            self._full[key] = (script, self._layers, cell, reference)
        return self._full[key][2]

    def forget(self) -> None:
        """Drop the remembered references."""
        self._full.clear()

    def run(self, script: Script, plan: Plan) -> Cell:
        """Perform ``script``, compressed by ``plan``, and compare with the full cache."""
        full = self.full(script)
        tokens = script.prompt + script.forced[:-1]
        base = plan.first(len(script.prompt))
        done = base + plan.window + plan.delay
        if plan.selector is None or done >= len(tokens):
            return Cell(full.logprob, full.top, full.slots, [0.0] * len(script.compared()))
        _, layers, _, reference = self._full[(script.name,)]
        # Up to the first compression nothing differs from the full cache.
        self._layers = [
            Layer(x.keys[:, :done], x.values[:, :done], x.queries[:, :done], x.sliding_window)
            for x in layers
        ]
        first = len(script.prompt) - 1
        measured = script.measured()
        hidden, slots, removed, windows = {}, {}, 0, 0
        while done < len(tokens):
            self._compress(plan, base, base + removed, windows)
            removed += plan.window - plan.kept
            windows += 1
            base += plan.kept
            block = tokens[done : done + plan.window]
            states = self._feed(block, done)
            for i in range(len(block)):
                hidden[done + i - first] = states[i]
                slots[done + i - first] = done + i + 1 - removed
            done += len(block)
        before = {step: i for i, step in enumerate(measured) if step not in hidden}
        logprob, top = list(full.logprob), list(full.top)
        held = list(full.slots)
        after = [step for step in measured if step not in before]
        kl = [0.0] * len(script.compared())
        if after:
            logprobs = self._logprobs(torch.stack([hidden[step] for step in after]))
            place = {step: i for i, step in enumerate(measured)}
            for step, p, t in zip(after, *_taken(logprobs, script, after), strict=True):
                logprob[place[step]], top[place[step]] = p, t
                held[place[step]] = slots[step]
            row = {step: i for i, step in enumerate(after)}
            for i, step in enumerate(script.compared()):
                if step in row:
                    kl[i] = divergence(reference[i], logprobs[row[step]])
        return Cell(logprob, top, held, kl)

    def _compress(self, plan: Plan, base: int, logical: int, windows: int) -> None:
        assert plan.selector is not None
        width = plan.window
        for number, layer in enumerate(self._layers):
            if layer.sliding_window is not None:
                if plan.delay < layer.sliding_window:
                    raise EngineFailed(
                        f"give --delay {layer.sliding_window}, this model's window, or more"
                    )
                continue  # it sees nothing that is compressed
            keys = layer.keys[:, base : base + width].transpose(0, 1)
            values = layer.values[:, base : base + width].transpose(0, 1)
            queries = None
            if plan.selector.needs_queries:
                queries = self._recorded(layer, plan, logical, keys.shape[1])
                if plan.selector.ahead:
                    queries = self._turn(width, keys.shape[2]).moved(queries, 0)
            scores = plan.selector.score(
                queries,
                keys,
                values,
                scale=self.scale,
                seed=plan.seed + 1_000_003 * windows + number,
            )
            kept = select(scores, plan.kept, plan.selector.chunks)
            index = kept[:, :, None].expand(-1, -1, keys.shape[2])

            def splice(cache: torch.Tensor, index: torch.Tensor = index) -> torch.Tensor:
                window = cache[:, base : base + width].gather(1, index)
                return torch.cat([cache[:, :base], window, cache[:, base + width :]], dim=1)

            self._layers[number] = dataclasses.replace(
                layer, keys=splice(layer.keys), values=splice(layer.values)
            )

    def _turn(self, positions: int, head_dim: int) -> RopeShift:
        """From transformers' own frequencies, the same in all layers."""
        rotary = self.model.model.rotary_emb
        # Models with sliding windows have one set for each kind of layer.
        of_full = getattr(rotary, "full_attention_inv_freq", None)
        angles = positions * (rotary.inv_freq if of_full is None else of_full).double()
        return RopeShift.of_layer(angles.cos(), angles.sin(), head_dim, halves=True)

    @staticmethod
    def _recorded(layer: Layer, plan: Plan, start: int, num_kv_heads: int) -> torch.Tensor:
        """What the recorder holds: ``(W + delay, num_kv_heads, group or 1, head_dim)``."""
        stop = start + plan.window + plan.delay
        queries = layer.queries[:, start:stop].transpose(0, 1).unflatten(1, (num_kv_heads, -1))
        if plan.mean:
            queries = mean_of(queries.transpose(1, 2))[:, :, None]
        if plan.fp8:
            limit = torch.finfo(FP8).max
            queries = queries.clamp(-limit, limit).to(FP8)
        return queries


def divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    """KL divergence in nats of ``other`` from ``full``, both log-probabilities, shape ``(vocab,)``."""
    full = full.double()
    return (full.exp() * (full - other.double())).sum().item()


def _taken(logprobs: torch.Tensor, script: Script, steps: list[int]) -> tuple[list[float], list[bool]]:
    ids = torch.tensor([script.forced[step] for step in steps])
    taken = logprobs.gather(-1, ids[:, None])[:, 0]
    return taken.double().tolist(), (logprobs.argmax(dim=-1) == ids).tolist()
