"""Collects what the pass chose while a request runs; writes its file when it ends."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from kara_sglang.config import KaraConfig
from kara_sglang.radix_integration.row import VOTERS, RequestState, TracedWindow, Window
from kara_sglang.scheduler import window_pool
from kara_sglang.trace.format import About, Trace, folder_of, save

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Tracer:
    """The traces of one scheduler (one tensor-parallel rank).

    What was collected lies in the request's own state and goes when the request gives its row back, so
    memory is bounded by what runs: per window, layers * KV heads * W / 8 bytes on the host.
    """

    def __init__(self, scheduler: Scheduler, config: KaraConfig) -> None:
        assert config.trace is not None
        args, pools = scheduler.server_args, scheduler.token_to_kv_pool_allocator.get_kvcache()
        pool = window_pool.full_pool(pools)
        self.folder = folder_of(config.trace)
        self.settings = dataclasses.asdict(config)
        self.model = _absolute(args.model_path)
        self.tokenizer = _absolute(args.tokenizer_path or args.model_path)
        ranks = scheduler.attn_tp_group
        self.tp_rank, self.tp_size = ranks.rank_in_group, ranks.world_size
        self.num_kv_heads = scheduler.model_config.get_total_num_kv_heads()
        # SGLang deals the heads out in order; with more ranks than heads, neighbours share one.
        first = self.tp_rank * self.num_kv_heads // self.tp_size
        self.heads = list(range(first, first + pool.k_buffer[0].shape[1]))

    def add(self, taken: Sequence[tuple[RequestState, Window]], kept: Sequence[torch.Tensor]) -> None:
        """Note the windows that a pass has just compressed; runs on its stream and does not wait.

        Parameters
        ----------
        taken : sequence of (RequestState, Window)
            The windows, each with its request's state.
        kept : sequence of torch.Tensor
            The positions that were kept, each ``(num_layers, num_kv_heads, R)``, integer.
        """
        for (state, window), chosen in zip(taken, kept, strict=True):
            bits = bit_sets(chosen, window.width).to("cpu", non_blocking=True)
            arrived = None
            if chosen.is_cuda:
                arrived = torch.cuda.Event()
                arrived.record()
            state.traced.append(TracedWindow(window, bits, arrived))

    def end(self, req: Req, state: RequestState) -> None:
        """The request gives its row back; write its file if it has ended. A retracted one has not: its
        row, and what is known of it, may come back.

        Without a window there is nothing to show: short requests, health checks among them, leave no
        file. A file that cannot be written is an error in the log, since no answer depends on it.
        """
        if not req.finished():
            return
        try:
            if state.traced:
                save(self._trace(req, state), self.folder)
        except OSError as error:
            logger.error(
                "kv-compress: the trace of request %s could not be written to %s "
                "(--kv-compress-trace): %s",
                req.rid,
                self.folder,
                error.strerror or error,
            )
        finally:
            state.traced.clear()  # a session keeps its requests, and with them their states

    def _trace(self, req: Req, state: RequestState) -> Trace:
        rows = []
        for traced in state.traced:
            window = traced.window
            voters = VOTERS.index(window.mark) if window.mark in VOTERS else 0
            rows.append((window.logical_start, window.kv_start, window.width, window.kept, voters))
            if traced.arrived is not None:
                traced.arrived.synchronize()
        about = About(
            rid=str(req.rid),
            finish=req.finished_reason.to_json()["type"],
            retractions=req.retraction_count,
            selector=state.selector.name,
            kept=state.kept,
            settings=self.settings,
            model=self.model,
            tokenizer=self.tokenizer,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
            heads=self.heads,
            num_kv_heads=self.num_kv_heads,
        )
        prompt, output = (
            np.array(list(ids), dtype=np.int64)
            for ids in (req.origin_input_ids, req.output_ids_through_stop)
        )
        bits = np.stack([traced.bits.numpy() for traced in state.traced])
        return Trace(about, prompt, output, np.array(rows, dtype=np.int64), bits)


def bit_sets(chosen: torch.Tensor, width: int) -> torch.Tensor:
    """Positions as bit sets, on the same device and without a wait.

    Parameters
    ----------
    chosen : torch.Tensor
        Positions in [0, width), no two alike, shape ``(num_layers, num_kv_heads, R)``, integer.
    width : int
        W.

    Returns
    -------
    torch.Tensor
        ``(num_layers, num_kv_heads, ceil(width / 8))``, uint8: position j is bit j % 8 of byte j // 8.
    """
    num_bytes = -(-width // 8)
    shape = (*chosen.shape[:2], num_bytes * 8)
    kept = torch.zeros(shape, dtype=torch.uint8, device=chosen.device)
    kept.scatter_(-1, chosen.long(), 1)
    places = torch.arange(8, dtype=torch.uint8, device=chosen.device)
    return (kept.view(*chosen.shape[:2], num_bytes, 8) << places).sum(dim=-1, dtype=torch.uint8)


def _absolute(path: str) -> str:
    """A model's folder as seen from anywhere; a hub name as it is."""
    return os.path.abspath(path) if os.path.isdir(path) else path
