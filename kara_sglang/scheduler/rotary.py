"""The rotary embeddings of a loaded model, for moving its recorded queries ahead."""

from __future__ import annotations

from typing import Any

import torch

from kara_sglang.kernels.rope_shift import RopeShift

UNKNOWN_ROTARY = (
    "the plugin does not know this model's rotary embedding, so queries cannot be moved ahead; "
    "start with --kv-compress-config '{\"ahead\": false}'"
)


def rope_shift_of(
    model: torch.nn.Module, layers: list[Any], positions: int, device: torch.device
) -> RopeShift:
    """How queries of ``layers`` are moved ahead by ``positions``.

    Parameters
    ----------
    model : torch.nn.Module
        SGLang's, with weights.
    layers : list of RadixAttention
        Its attention layers, in order.
    positions : int
    device : torch.device
        Where the shift shall lie.

    Raises
    ------
    ValueError
        Where an attention layer's owner has no ``rotary_emb`` with a ``cos_sin_cache``, as SGLang's own
        models have (``layers/rotary_embedding/base.py``), or does more to queries behind it. A
        ``rotary_emb`` of None stands for a layer without positions.
    """
    owners = {id(child): owner for owner in model.modules() for child in owner.children()}
    shifts = [_of_layer(owners.get(id(layer)), layer.qk_head_dim, positions) for layer in layers]
    shift = RopeShift.of(shifts)
    return RopeShift(shift.cos.to(device), shift.sin.to(device), shift.partner.to(device), shift.run)


def _of_layer(owner: torch.nn.Module | None, head_dim: int, positions: int) -> RopeShift:
    rotary: Any = getattr(owner, "rotary_emb", _MISSING)
    if rotary is None:
        return RopeShift.of_layer(torch.empty(0), torch.empty(0), head_dim, halves=True)
    cache = getattr(rotary, "cos_sin_cache", None)
    row = positions - getattr(rotary, "position_start", 0)
    # HunYuan's models norm queries behind the rotation, number by number: the two do not commute.
    if cache is None or cache.dim() != 2 or len(cache) <= row or hasattr(owner, "query_layernorm"):
        raise ValueError(UNKNOWN_ROTARY)
    cos, sin = cache[row].float().cpu().chunk(2)
    size = torch.hypot(cos, sin)  # some embeddings also scale, which is in the queries already
    return RopeShift.of_layer(cos / size, sin / size, head_dim, halves=rotary.is_neox_style)


_MISSING = object()
