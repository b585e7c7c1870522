"""The KV of draft models, behind a pass over their target's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kara_sglang.kernels.compact import kept_alike

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from kara_sglang.kernels.backend import Kernels, Mover, WindowJob


class Drafts:
    """Draft models of one scheduler. A model guesses what its target says, so it keeps what that keeps.

    Parameters
    ----------
    pools : sequence of MHATokenToKVPool
        One per draft model; a token has the same slot in all of them.
    kernels : Kernels
    """

    def __init__(self, pools: Sequence[MHATokenToKVPool], kernels: Kernels) -> None:
        self.pools = pools
        self.kernels = kernels
        self._movers: dict[int, tuple[list[torch.Tensor], Mover]] = {}  # by places, with their buffers

    def __bool__(self) -> bool:
        return bool(self.pools)

    def follow(self, job: WindowJob, kept: torch.Tensor) -> None:
        """Compact a window in all draft models.

        Parameters
        ----------
        job : WindowJob
        kept : torch.Tensor
            The target's positions, shape ``(num_layers, num_kv_heads, R)``, int64.
        """
        width = job.slots.shape[0]
        if job.kept == width:
            return
        for place, pool in enumerate(self.pools):
            heads = pool.k_buffer[0].shape[1]
            alike = kept_alike(kept, len(pool.k_buffer), heads, width)
            self._mover(place, pool)(job.slots, alike)

    def _mover(self, place: int, pool: MHATokenToKVPool) -> Mover:
        """The same one as long as SGLang's buffers are the same."""
        buffers = [*pool.k_buffer, *pool.v_buffer]
        known = self._movers.get(place)
        if known is None or [*map(id, known[0])] != [*map(id, buffers)]:
            known = buffers, self.kernels.mover(pool.k_buffer, pool.v_buffer)
            self._movers[place] = known
        return known[1]
