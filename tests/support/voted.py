"""What a window keeps where transformers' queries vote, all computed from the text at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kara_sglang.config import KaraConfig
from kara_sglang.kernels import selectors
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.select import select


@torch.no_grad()
def kept_of(model_path: Path, text: list[int], start: int, window: int, delay: int) -> torch.Tensor:
    """What the selector ``kara`` keeps of the first window of a text, which begins at ``start``.

    Returns
    -------
    torch.Tensor
        Whether a token is kept, shape ``(num_layers, num_kv_heads, window)``, bool.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    selector = selectors.build("kara", KaraConfig(window=window, delay=delay))
    found = []

    def vote(attention: Any, _args: tuple[Any, ...], named: dict[str, Any]) -> None:
        width = attention.head_dim
        q, k, v = (
            projection(named["hidden_states"]).unflatten(-1, (-1, width)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *named["position_embeddings"])
        q, k, v = (part[0, :, start:].transpose(0, 1) for part in (q, k, v))
        cos, sin = model.model.rotary_emb(q, torch.tensor([[window]]))
        ahead = RopeShift.of_layer(
            *(part[0, 0, : width // 2] for part in (cos, sin)), width, halves=True
        )
        queries = ahead.moved(q[: window + delay].unflatten(1, (k.shape[1], -1)), 0)
        scores = selector.score(queries, k[:window], v[:window], scale=width**-0.5, seed=0)
        kept = select(scores, window // 2, selector.chunks)
        found.append(torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, kept, True))

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(vote, with_kwargs=True)
    model(torch.tensor([text]))
    return torch.stack(found)
