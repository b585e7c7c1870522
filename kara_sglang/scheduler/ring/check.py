"""For ``debug_checks``: whether a window's queries in the ring are its own.

A step that stores nothing, such as a CUDA graph without the launches that record, leaves older queries
where a window's own should be. Nothing else would show it: the window is chosen, by the wrong queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from kara_sglang.kernels.record import PAGE, Step, plan


class RingCheck:
    """The logical position that each entry of the ring was last written for.

    Attributes
    ----------
    positions
        Shape ``(num_layers, num_entries)``, int64, on the ring's device; -1 where the page's owner has
        written nothing.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.positions = torch.full(shape, -1, dtype=torch.int64, device=device)

    def record(self, layers: slice, step: Step) -> None:
        """Beside the launch that stores these layers' queries: captured, or left out, with it."""
        entries = plan(step, self.positions.shape[1] - 1)
        positions = step.positions[:, None].expand_as(entries).flatten()
        of_layers = self.positions[layers]
        of_layers.index_copy_(1, entries.flatten(), positions.expand(len(of_layers), -1))

    def forget(self, pages: Iterable[int]) -> None:
        """These pages have a new owner."""
        for page in pages:
            self.positions[:, page * PAGE : (page + 1) * PAGE] = -1

    def require(self, request: str, pages: Sequence[Sequence[int]], start: int, count: int) -> None:
        """Raise RuntimeError unless ``pages`` hold the ``count`` queries from position ``start`` on, in
        every layer. Synchronises."""
        wanted = torch.arange(start, start + count, device=self.positions.device)
        of_token = torch.tensor(pages, device=wanted.device)[:, wanted // PAGE - start // PAGE]
        held = self.positions[:, of_token * PAGE + wanted % PAGE]
        wrong = (held != wanted).nonzero()
        if len(wrong):
            layer, member, token = wrong[0].tolist()
            found = int(held[layer, member, token])
            raise RuntimeError(
                f"kv-compress: request {request}: the ring should hold the query of position "
                f"{start + token} in layer {layer}, it holds "
                + (f"that of position {found}" if found >= 0 else "none of this request's")
            )
