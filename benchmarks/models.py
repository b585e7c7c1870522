"""The models whose shapes the kernels are compiled for, counted for and timed at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """Shapes of one model (of its published config), per GPU without tensor parallelism.

    Attributes
    ----------
    name
        Of the checkpoint.
    layers, query_heads, kv_heads, head_dim
        Attention shapes.
    parameters
        In units of 1e9; a decode step reads all of them once.
    kv_itemsize
        Bytes of a number of K and V.
    """

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    parameters: float
    kv_itemsize: int = 2

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one token, all layers."""
        return 2 * self.kv_itemsize * self.layers * self.kv_heads * self.head_dim


MODELS = (
    Model("Qwen3-8B", 36, 32, 8, 128, 8.19),
    Model("R1-Distill-Qwen-7B", 28, 28, 4, 128, 7.62),
    Model("Qwen3-32B", 64, 64, 8, 128, 32.76),
)
