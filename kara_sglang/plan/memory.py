"""How one GPU's memory is divided: weights, SGLang's reserve, query ring, scratch, KV pool.

The order is SGLang's (``mem_cache/kv_cache_configurator.py``, ``_profile_available_bytes``): what is
free once the weights are loaded, less a share of what was free before, becomes the pool. Ring and
scratch are allocated with the weights, so a compressed server's pool is smaller by them.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kara_sglang.compat import sliding_window
from kara_sglang.plan.launch import Launch
from kara_sglang.scheduler import window_pool
from kara_sglang.scheduler.pace import pace_of
from kara_sglang.scheduler.reserved import largest_window, query_ring, shape_of
from kara_sglang.scheduler.ring.size import Room

if TYPE_CHECKING:
    from kara_sglang.scheduler.ring.recorder import QueryRecorder

CONTEXT_BYTES = 1 << 30
"""What a driver and a CUDA context keep of a GPU's memory: an assumption, about right for an H100."""


@dataclass(frozen=True, slots=True)
class Rank:
    """What one tensor-parallel rank holds of a model; has the attributes that
    :func:`kara_sglang.scheduler.reserved.shape_of` reads."""

    num_hidden_layers: int
    full_layers: int
    layers_per_slot: float
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    kv_itemsize: int

    @classmethod
    def of(cls, launch: Launch) -> Rank:
        """The rank's share.

        Raises
        ------
        ValueError
            Where the query heads cannot be divided.
        """
        model, tp = launch.model, launch.tp
        if model.num_attention_heads % tp:
            raise ValueError(f"--tp-size {tp} does not divide {model.num_attention_heads} query heads")
        return cls(
            num_hidden_layers=model.num_hidden_layers,
            full_layers=sliding_window.full_layers(model),
            layers_per_slot=window_pool.layers_per_slot(launch.resolved, model),
            num_attention_heads=model.num_attention_heads // tp,
            num_kv_heads=model.get_num_kv_heads(tp),
            head_dim=model.head_dim,
            v_head_dim=model.v_head_dim,
            dtype=model.dtype,
            kv_itemsize=launch.kv_dtype.itemsize,
        )

    def get_total_num_kv_heads(self) -> int:
        return self.num_kv_heads

    @property
    def token_bytes(self) -> int:
        """K and V of one token, all layers (``DefaultPoolConfigurator._compute_cell_size``; where those
        with a sliding window have a pool of their own, ``HybridSWAPoolConfigurator``)."""
        return int(self._slot_bytes)

    def slots_in(self, memory: int) -> int:
        """KV slots that so many bytes hold."""
        return int(memory // self._slot_bytes)

    @property
    def _slot_bytes(self) -> float:
        numbers = self.num_kv_heads * (self.head_dim + self.v_head_dim)
        return numbers * self.kv_itemsize * self.layers_per_slot


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per GPU, and KV slots.

    Attributes
    ----------
    total, context, weights, reserve
        The GPU's memory, what a context takes, the model's weights, and what SGLang leaves for
        activations and graphs. None where no GPU is planned for.
    ring, scratch
        What compression takes.
    stock_pool, pool
        KV slots without compression and with it.
    """

    total: int | None
    context: int | None
    weights: int | None
    reserve: int | None
    ring: int
    scratch: int
    stock_pool: int
    pool: int


def divide(launch: Launch, rank: Rank, ring: QueryRecorder, weights: int | None) -> Memory:
    """Divide the memory of one GPU.

    Parameters
    ----------
    launch, rank
    ring
        :func:`ring_of`.
    weights
        Bytes of weights of all ranks together; None where no GPU is planned for.

    Raises
    ------
    ValueError
        Where nothing is left for the pool.
    """
    taken = ring.num_bytes
    cap = launch.resolved.max_total_tokens
    if launch.gpu_memory is None:
        if cap is None:
            raise ValueError("on a CPU the pool is as large as --max-total-tokens says; add it")
        pool = _whole_pages(cap, launch)
        return Memory(None, None, None, None, taken, 0, pool, pool)
    assert weights is not None
    scratch = scratch_bytes(launch, rank)
    total, share, reserve, left = _left(launch, weights)
    pools = []
    for free, what in ((left, "weights"), (left - taken - scratch, "weights, query ring and scratch")):
        slots = rank.slots_in(free)
        if slots < launch.resolved.page_size:
            raise ValueError(
                f"{what} leave no memory for KV on a GPU of {launch.gpu_memory / 1024:g} GiB with "
                f"--tp-size {launch.tp}; use more GPUs, --mem-fraction-static above "
                f"{launch.resolved.mem_fraction_static}, or less --kv-compress-query-mem-gb"
            )
        pools.append(_whole_pages(slots if cap is None else min(cap, slots), launch))
    return Memory(total, CONTEXT_BYTES, share, reserve, taken, scratch, *pools)


def _left(launch: Launch, weights: int) -> tuple[int, int, int, int]:
    """The GPU's memory, its share of the weights, SGLang's reserve, and what these leave."""
    assert launch.gpu_memory is not None
    total = int(launch.gpu_memory * 2**20)
    share = weights // launch.tp
    reserve = int((total - CONTEXT_BYTES) * (1 - launch.resolved.mem_fraction_static))
    return total, share, reserve, total - CONTEXT_BYTES - share - reserve


def _whole_pages(slots: int, launch: Launch) -> int:
    page = launch.resolved.page_size
    return slots // page * page


def ring_of(launch: Launch, rank: Rank, weights: int | None) -> QueryRecorder:
    """The query ring of one rank, on the ``meta`` device. ``weights`` as for :func:`divide`; not read
    where the settings say the ring's size."""
    free = None
    if (
        launch.gpu_memory is not None
        and launch.config.query_mem_gb is None
        and launch.config.keeps_queries
    ):
        assert weights is not None
        free = max(0, _left(launch, weights)[-1] - scratch_bytes(launch, rank))
    room = Room(
        free,
        slot_bytes=rank.token_bytes,
        most_slots=launch.resolved.max_total_tokens,
        most_running=launch.resolved.max_running_requests,
    )
    return query_ring(shape_of(rank, rank.full_layers), launch.config, room, pace_of(launch.resolved))


def scratch_bytes(launch: Launch, rank: Rank) -> int:
    """What the kernels reserve on a GPU (``TritonKernels.reserve``)."""
    from kara_sglang.kernels.triton import TritonKernels

    largest = largest_window(shape_of(rank, rank.full_layers), launch.config)
    return TritonKernels().reserve(torch.device("meta"), largest)


def weight_bytes(model_path: str, model: Any) -> int:
    """Size of the weights in bytes: of the model's files, else counted from its config.

    Parameters
    ----------
    model_path
        Folder or name on a hub.
    model
        SGLang's ``ModelConfig``.

    Raises
    ------
    ValueError
        Where neither says it.
    """
    folder = Path(model_path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return int(json.loads(index.read_text())["metadata"]["total_size"])
    if files := sorted(folder.glob("*.safetensors")):
        return sum(_tensor_bytes(file) for file in files)
    if model.quantization is not None:
        raise ValueError("a config does not say how large quantized weights are; add --weights-gb")
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(model.hf_text_config)
    except Exception as error:  # whatever a model's code raises
        raise ValueError(
            f"the weights cannot be counted from this config ({type(error).__name__}); add --weights-gb"
        ) from error
    return sum(p.numel() for p in empty.parameters()) * model.dtype.itemsize


def _tensor_bytes(file: Path) -> int:
    """Of all tensors in a safetensors file: what follows its header."""
    with file.open("rb") as stream:
        (header,) = struct.unpack("<Q", stream.read(8))
    return file.stat().st_size - 8 - header
