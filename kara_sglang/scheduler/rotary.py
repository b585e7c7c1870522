"""The rotary embeddings of a loaded model, for moving its recorded queries ahead."""

from __future__ import annotations

from typing import Any

import torch

from kara_sglang.kernels.rope_shift import RopeShift

UNKNOWN_ROTARY = (
    "the plugin does not know this model's rotary embedding, so queries cannot be moved ahead; "
    "start with --kv-compress-config '{\"ahead\": false}'"
)


TURNED = ("Gemma2Attention", "Gemma3Attention", "GptOssAttention", "Olmo2Attention")
"""Classes of attention whose full layers rotate queries beside layers with a sliding window. Cohere 2,
EXAONE 4 and others have a table there and leave it alone, so nothing need be moved."""


def rope_shift_of(
    model: torch.nn.Module,
    layers: list[Any],
    positions: int,
    device: torch.device,
    *,
    windowed: bool = False,
) -> RopeShift:
    """How queries of ``layers`` are moved ahead by ``positions``.

    Parameters
    ----------
    model : torch.nn.Module
        SGLang's, with weights.
    layers : list of RadixAttention
        Its attention layers without a sliding window, in order.
    positions : int
    device : torch.device
        Where the shift shall lie.
    windowed : bool
        Whether other layers have a sliding window.

    Raises
    ------
    ValueError
        Where an attention layer's owner has no ``rotary_emb`` with a ``cos_sin_cache``, as SGLang's own
        models have (``layers/rotary_embedding/base.py``), or does more to queries behind it. A
        ``rotary_emb`` of None stands for a layer without positions. With ``windowed`` the owner must
        be one of :data:`TURNED`.
    """
    owners = {id(child): owner for owner in model.modules() for child in owner.children()}
    shared = _shared(model)
    shifts = []
    for layer in layers:
        owner = owners.get(id(layer))
        if windowed and type(owner).__name__ not in TURNED:
            raise ValueError(UNKNOWN_ROTARY)
        if shared is None:
            shifts.append(_of_layer(owner, layer.qk_head_dim, positions))
        else:
            angles = positions * shared.original_inv_freq.double().cpu()
            shifts.append(
                RopeShift.of_layer(angles.cos(), angles.sin(), layer.qk_head_dim, halves=True)
            )
    shift = RopeShift.of(shifts)
    return RopeShift(shift.cos.to(device), shift.sin.to(device), shift.partner.to(device), shift.run)


def _shared(model: torch.nn.Module) -> Any | None:
    """What all full layers of a Gemma 3 model turn by: the model makes cosines and sines for them
    (``models/gemma3_causal.py``). Its layers have tables as well, which know no scaling."""
    for module in model.modules():
        if hasattr(module, "rotary_emb_local"):
            rotary: Any = module.rotary_emb
            if rotary.rope_type not in ("default", "linear"):
                raise ValueError(UNKNOWN_ROTARY)
            return rotary
    return None


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
