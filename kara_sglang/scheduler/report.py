"""What a user sees of the pass: the report per request, the log line, /server_info, Prometheus."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kara_sglang.options import KEY
from kara_sglang.radix_integration.prefix import held_state, prefix_of, removed_of
from kara_sglang.scheduler import policy, window_pool
from kara_sglang.scheduler.coordinator import Coordinator
from kara_sglang.scheduler.metrics import slots_held
from kara_sglang.scheduler.ring.served import Served
from kara_sglang.scheduler.runtime import runtime

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def request_report(req: Req) -> dict[str, Any] | None:
    """``meta_info.kv_compress`` of a finished request; None while it runs.

    Keys: ``windows`` that it compressed, ``without_queries`` those of them for which its selector asks
    for queries and none were recorded, ``tokens_removed`` per head, ``kv_slots_held`` at the end,
    ``logical_length`` in tokens (prompt and output whose KV it had), ``retained`` share of the
    compressed tokens that is kept, 1.0 where no window was compressed.

    Of a compressed prefix that it continued: ``reused_tokens`` are those of its ``cached_tokens`` that
    lie at or behind the start of the prefix's first window (so clean spans between and behind windows
    count, and the exact part in front does not), ``reused_slots`` the KV slots that hold them. Both are
    0 where it reused exact KV only, and like ``cached_tokens`` they are counted before any retraction.
    Without one, ``logical_length - kv_slots_held = tokens_removed + reused_tokens - reused_slots``.
    ``computed_again`` are tokens that a compressed prefix held beyond exact KV, too few to take it.
    """
    if not req.finished():
        return None
    state = held_state(req)
    windows = state.windows[state.reused :] if state is not None else []
    own_removed = sum(window.freed for window in windows)
    prefix = prefix_of(req)
    covered = sum(window.width for window in windows)
    removed = removed_of(req)
    # A step that verifies drafts may have gone on behind the end of the answer.
    said = len(req.origin_input_ids) + len(req.output_ids_through_stop)
    logical = min(req.kv.kv_committed_len + removed, said)
    return {
        "windows": len(windows),
        "without_queries": state.without_queries() if state is not None else 0,
        "tokens_removed": own_removed,
        "kv_slots_held": logical - removed,
        "logical_length": logical,
        "retained": 1.0 - own_removed / covered if covered else 1.0,
        "reused_tokens": prefix.reused_tokens if prefix is not None else 0,
        "reused_slots": prefix.reused_slots if prefix is not None else 0,
        "computed_again": prefix.computed_again if prefix is not None else 0,
    }


def output_streamer_class(original: Callable[..., type], scheduler: Any) -> type:
    """AROUND ``Scheduler.get_output_streamer_class``: add our field to what is sent out."""
    base: Any = original(scheduler)

    class ReportingOutputStreamer(base):
        __slots__ = ()
        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list[Req]) -> dict[str, list[Any]]:
            fields = base.build_additional_customized_info(self, reqs)
            reports = [request_report(req) for req in reqs]
            if any(report is not None for report in reports):  # else nobody ends with this batch
                # Lists, as SGLang adds them up where no hook of ours is (several tokenizer workers).
                fields[KEY] = [[] if report is None else [report] for report in reports]
            return fields

        def should_build_additional_customized_info(self) -> bool:
            return True

        def is_request_level_customized_info_key(self, key: str) -> bool:
            return key == KEY or base.is_request_level_customized_info_key(self, key)

    return ReportingOutputStreamer


def decode_usage_msg_parts(parts: list[str], _stats: Any) -> list[str]:
    """AFTER ``PoolStats.get_decode_usage_msg_parts``: one short part of the `Decode batch` line."""
    coordinator = runtime.coordinator
    if coordinator is None:
        return parts
    coordinator.export()
    totals = coordinator.totals
    held, logical = slots_held(coordinator.running)
    share = held / logical if logical else 1.0
    return [
        *parts,
        f"kv-compress: {share:.2f} held (#window: {totals.windows}, "
        f"#without-queries: {totals.without_queries}, #freed: {totals.slots_freed})",
    ]


def internal_state(result: Any, *_args: Any) -> Any:
    """AFTER ``Scheduler.get_internal_state``: settings and totals in /server_info."""
    coordinator = runtime.coordinator
    if coordinator is not None:
        result.internal_state["kv_compress"] = snapshot(coordinator)
    return result


def told(coordinator: Coordinator) -> str:
    """When compression begins and whether it has, in one sentence: counts of 0 do not say it."""
    windows = coordinator.totals.windows
    has = f"it has, {windows:,} windows so far" if windows else "it has not yet"
    return f"{policy.begins(coordinator.config)}; {has}"


def snapshot(coordinator: Coordinator) -> dict[str, Any]:
    """Settings and totals as a plain object."""
    totals, recorder = coordinator.totals, coordinator.recorder
    ring = Served.of(recorder, coordinator.config.query_heads)
    scheduler = coordinator.scheduler
    held, logical = slots_held(coordinator.running)
    kept = coordinator.config.kept(coordinator.geometry.page_size)
    uncompressed, longest = coordinator.longer.answers(kept)
    return {
        "settings": dataclasses.asdict(coordinator.config) | {"kept": kept},
        "compression": told(coordinator),
        "longest_answer": {"tokens": longest, "uncompressed": uncompressed},
        "kernels": coordinator.kernels.name,
        "passes": totals.passes,
        "windows": totals.windows,
        "without_queries": totals.without_queries,
        "slots_freed": totals.slots_freed,
        "pass_seconds": totals.pass_seconds,
        "tokens_computed_again": totals.tokens_computed_again,
        "retracted_tokens_returned": totals.retracted_tokens_returned,
        "retracted_tokens_computed": totals.retracted_tokens_computed,
        "long_answers": totals.long_answers,
        "skipped": dict(totals.skipped),
        "recorders_in_use": recorder.in_use,
        "recorder_pages_free": recorder.free_pages,
        "recorder_room": {"bytes": ring.bytes, "all_heads": ring.all_heads, "mean": ring.mean},
        "largest_decode_graph": coordinator.graphs.largest,
        "running_requests": len(coordinator.running),
        "waiting_requests": len(scheduler.waiting_queue),
        "running_held_tokens": held,
        "running_logical_tokens": logical,
        "pool_tokens": scheduler.max_total_num_tokens,
        "pool_tokens_free": window_pool.free_slots(scheduler),
        "pool_tokens_evictable": window_pool.evictable_slots(scheduler),
    }
