"""What a user sees of the pass: the report per request, the log line, /server_info, Prometheus."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from kara_sglang.coordinator import STATE, Coordinator
from kara_sglang.runtime import runtime
from kara_sglang.state import RequestState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def request_report(req: Req) -> dict[str, Any] | None:
    """``meta_info.kv_compress`` of a finished request; None while it runs.

    Keys: ``windows`` compressed, ``tokens_removed`` per head, ``kv_slots_held`` at the end,
    ``logical_length`` in tokens (prompt and output whose KV was computed), ``retained`` share of the
    compressed tokens that is kept, 1.0 where no window was compressed.
    """
    if not req.finished():
        return None
    state: RequestState | None = getattr(req, STATE, None)
    windows = state.windows if state is not None else []
    removed = state.removed if state is not None else 0
    covered = sum(window.width for window in windows)
    held = req.kv.kv_committed_len
    return {
        "windows": len(windows),
        "tokens_removed": removed,
        "kv_slots_held": held,
        "logical_length": held + removed,
        "retained": 1.0 - removed / covered if covered else 1.0,
    }


def decode_usage_msg_parts(parts: list[str], _stats: Any) -> list[str]:
    """AFTER ``PoolStats.get_decode_usage_msg_parts``: one short part of the `Decode batch` line."""
    coordinator = runtime.coordinator
    if coordinator is None:
        return parts
    coordinator.export()
    totals = coordinator.totals
    held, logical = coordinator.held()
    share = held / logical if logical else 1.0
    return [
        *parts,
        f"kv-compress: {share:.2f} held (#window: {totals.windows}, #freed: {totals.slots_freed})",
    ]


def internal_state(result: Any, *_args: Any) -> Any:
    """AFTER ``Scheduler.get_internal_state``: settings and totals in /server_info."""
    coordinator = runtime.coordinator
    if coordinator is not None:
        result.internal_state["kv_compress"] = snapshot(coordinator)
    return result


def snapshot(coordinator: Coordinator) -> dict[str, Any]:
    """Settings and totals as a plain object."""
    totals, recorder = coordinator.totals, coordinator.recorder
    held, logical = coordinator.held()
    scheduler = coordinator.scheduler
    return {
        "settings": dataclasses.asdict(coordinator.config)
        | {"kept": coordinator.config.kept(coordinator.geometry.page_size)},
        "kernels": coordinator.kernels.name,
        "passes": totals.passes,
        "windows": totals.windows,
        "slots_freed": totals.slots_freed,
        "pass_seconds": totals.pass_seconds,
        "skipped": dict(totals.skipped),
        "recorders_in_use": recorder.in_use if recorder is not None else 0,
        "recorder_units_free": recorder.free_units if recorder is not None else 0,
        "running_held_tokens": held,
        "running_logical_tokens": logical,
        "pool_tokens": scheduler.max_total_num_tokens,
        "pool_tokens_free": scheduler.token_to_kv_pool_allocator.available_size(),
        "pool_tokens_evictable": scheduler.tree_cache.evictable_size(),
    }
