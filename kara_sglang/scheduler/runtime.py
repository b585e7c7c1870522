"""The hooks of the pass, as SGLang calls them in a scheduler process.

One scheduler process is one tensor-parallel rank: it has one model, one recorder, one coordinator.
They come into being in the order in which SGLang builds its own parts: kernels and ring with the
model's weights, row tables before graph capture, the coordinator with the scheduler.
"""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kara_sglang import handshake, hooks, plugin, prefix_reuse
from kara_sglang.compat import attention_backends, kv_cache
from kara_sglang.compat.sliding_window import longest, reach
from kara_sglang.config import KaraConfig
from kara_sglang.kernels.backend import Kernels
from kara_sglang.kernels.dispatch import pick
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.radix_integration import prefill
from kara_sglang.radix_integration.prefix import removed_of
from kara_sglang.scheduler import policy, refusals, window_pool
from kara_sglang.scheduler.compaction import Compaction
from kara_sglang.scheduler.coordinator import Coordinator
from kara_sglang.scheduler.pace import pace_of
from kara_sglang.scheduler.reserved import largest_window, query_ring
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder, cheapest
from kara_sglang.scheduler.ring.served import Served
from kara_sglang.scheduler.ring.size import Room
from kara_sglang.scheduler.rotary import rope_shift_of
from kara_sglang.scheduler.scales import softmax_scales
from kara_sglang.scheduler.tails import Tails

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a pass is made of, from the model's weights on.

    Attributes
    ----------
    config, kernels, recorder
    kernels_why
        Why these kernels, in words for people.
    layers
        The attention layers that a pass works over, with their places: the model's but those with a
        sliding window, in order. A draft model has others.
    reach
        Tokens before its own that a layer with a sliding window sees, at most.
    rope_shift
        How queries are moved ahead; None where the settings do not ask for it.
    """

    config: KaraConfig
    kernels: Kernels
    kernels_why: str
    recorder: QueryRecorder
    layers: dict[RadixAttention, int]
    reach: int
    rope_shift: RopeShift | None


@dataclass(slots=True)
class Runtime:
    """What this process has built so far."""

    parts: Parts | None = None
    coordinator: Coordinator | None = None
    drafts: list[ModelRunner] = field(default_factory=list)  # of draft models
    tails: Tails | None = None  # of the newest step, where that prefills
    refused: list[str] = field(default_factory=list)  # why this server must not start


runtime = Runtime()


def after_load_model(_result: Any, runner: ModelRunner) -> None:
    """AFTER ``ModelRunner.load_model``: allocate ring and scratch before SGLang sizes the KV pool."""
    if runner.is_draft_worker:
        runtime.drafts.append(runner)
        return
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
    from sglang.srt.layers.radix_attention import RadixAttention

    layers = sorted(
        (module for module in runner.model.modules() if isinstance(module, RadixAttention)),
        key=lambda layer: layer.layer_id,
    )
    runtime.refused += refusals.of_attention_layers(layers)
    if runtime.refused:
        return
    full = [layer for layer in layers if not reach(layer)]
    farthest = max(map(reach, layers))
    config = plugin.active()
    assert config is not None
    # With overlap the step in flight reads one slot more than the next one will.
    config = config.reaching(max(farthest + 1 if farthest else 0, longest(runner.model_config)))
    device = torch.device(runner.device)
    kernels, why = pick(device)
    first = full[0]
    shape = AttentionShape(
        num_layers=len(full),
        num_q_heads=first.tp_q_head_num,
        num_kv_heads=first.tp_k_head_num,
        head_dim=first.qk_head_dim,
        dtype=runner.dtype,
        device=device,
    )
    kernels.reserve(device, largest_window(shape, config))
    rope_shift = None
    if config.keeps_queries and config.ahead:
        try:
            rope_shift = rope_shift_of(
                runner.model, full, config.window, device, windowed=len(full) < len(layers)
            )
        except ValueError as error:
            runtime.refused.append(str(error))
    # Given back and taken again with the KV pool (/release_memory_occupation): nobody runs then.
    room = room_of(runner, layers) if config.keeps_queries else Room()
    pace = pace_of(resolving_view(runner.server_args))
    with runner.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
        recorder = query_ring(shape, config, room, pace)
    need = cheapest(shape.group, config.query_heads)
    if config.keeps_queries and not recorder.serves(need):
        bytes_needed = recorder.most_bytes(need)
        runtime.refused.append(
            f"--kv-compress-query-mem-gb has no room for the queries of one request; this model and "
            f"window need at least {bytes_needed / 2**30:.4f} GiB"
        )
    places = {layer: place for place, layer in enumerate(full)}
    runtime.parts = Parts(config, kernels, why, recorder, places, farthest, rope_shift)


def room_of(runner: ModelRunner, layers: list[RadixAttention]) -> Room:
    """What there is for KV and ring, as SGLang is about to reckon it
    (``KVCacheConfigurator._profile_available_bytes``); the same on all tensor-parallel ranks."""
    from sglang.srt.arg_groups.overrides import resolving_view

    free = free_bytes(torch.device(runner.device))
    if free is None:
        return Room()
    resolved = resolving_view(runner.server_args)
    stored = kv_cache.dtype_of(resolved.kv_cache_dtype, runner.dtype, runner.model)
    share = window_pool.share(resolved, runner.model_config)
    numbers = sum(
        layer.tp_k_head_num * (layer.qk_head_dim + layer.v_head_dim) * (share if reach(layer) else 1)
        for layer in layers
    )
    most = resolved.max_running_requests
    slack = runner.pre_model_load_memory * 2**30 * (1 - resolved.mem_fraction_static)
    return Room(
        max(0, free - int(slack)),
        slot_bytes=int(numbers * stored.itemsize),
        most_slots=resolved.max_total_tokens,
        most_running=most and max(1, most // resolved.attn_dp_size),
    )


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the rank's GPU, or of the rank's that has least; None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(free, op=torch.distributed.ReduceOp.MIN)
    return int(free)


def before_cuda_graphs(runner: ModelRunner, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE ``ModelRunner.init_cuda_graphs``: captured graphs read the row tables."""
    if runner.is_draft_worker:
        return
    if runtime.parts is not None and runtime.parts.recorder.num_pages:
        runtime.parts.recorder.allocate_tables(runner.req_to_token_pool.req_to_token.shape[0])


def before_attention(
    layer: Any,
    q: torch.Tensor,
    k: Any,
    v: Any,
    forward_batch: ForwardBatch,
    *_args: Any,
    **_kw: Any,
) -> None:
    """BEFORE ``RadixAttention.forward``: record a decode step's post-RoPE queries.

    With speculation the step that verifies drafts records theirs. A draft model's queries are nobody's,
    and nobody asks for those of a layer with a sliding window. A step that prefills records those of
    its tails.

    Without a graph the step is skipped when nobody records. A graph is replayed for any batch, so there
    the tables decide, whenever it is captured: at start, or again with other weights. The steps that
    warm it up record as well, so that no kernel is first compiled in a capture.
    """
    parts = runtime.parts
    if parts is None or not parts.recorder.num_pages:
        return
    place = parts.layers.get(layer)
    if place is None or not (parts.recorder.active or _capturing()):
        return
    mode = forward_batch.forward_mode
    if mode.is_decode() or mode.is_target_verify():
        rows, positions = forward_batch.req_pool_indices, forward_batch.positions
    elif mode.is_extend() and runtime.tails is not None:
        tails = runtime.tails
        q, rows, positions = tails.queries(q), tails.rows, tails.positions
    else:
        return
    parts.recorder.record(parts.kernels, place, q, rows, positions)


def _capturing() -> bool:
    """Whether SGLang captures a graph or warms one up."""
    from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode

    return get_is_capture_mode()


def after_init_forward_batch(
    result: ForwardBatch, _cls: Any, batch: ScheduleBatch, _runner: ModelRunner, **_kwargs: Any
) -> None:
    """AFTER ``ForwardBatch.init_new``: RoPE positions follow the logical length, also of drafts."""
    if runtime.coordinator is None:
        return
    mode = batch.forward_mode
    runtime.tails = None
    if mode.is_decode() or mode.is_target_verify() or mode.is_draft_extend_v2():
        runtime.coordinator.compaction.lengths.shift_positions(result)
    elif mode.is_extend():
        prefill.shift_positions(result, batch)
        runtime.tails = Tails.of(result, batch)


def after_resolve_seq_lens(
    _result: None, _map: Any, batch: ScheduleBatch, *_args: Any, **_kwargs: Any
) -> None:
    """AFTER ``FutureMap.resolve_seq_lens_cpu``: passes since the step in flight began have shortened
    rows whose lengths that step has published."""
    if runtime.coordinator is not None:
        runtime.coordinator.compaction.lengths.correct(batch)


def after_move_accepted(
    _result: None, batch: ScheduleBatch, accept_index: torch.Tensor, *_args: Any, **_kwargs: Any
) -> None:
    """AFTER ``move_accept_tokens_to_target_kvcache``: queries move as K and V have; the worker still
    has the lengths with which its step began."""
    if runtime.coordinator is not None:
        compaction = runtime.coordinator.compaction
        first = compaction.lengths.logical(batch.seq_lens, batch.req_pool_indices)
        compaction.recorder.keep_accepted(first, batch.req_pool_indices, accept_index)


def around_draft_indices(
    original: Callable[..., None], backend: Any, forward_batch: ForwardBatch, *args: Any, **named: Any
) -> None:
    """AROUND ``common_template`` of the backends flashinfer and triton for a draft model that takes
    several steps: their kernel adds up positions to find where a request's slots begin, and takes
    them for KV lengths (``generate_draft_decode_kv_indices``). The model's own positions stay true."""
    if runtime.coordinator is None:
        original(backend, forward_batch, *args, **named)
        return
    with runtime.coordinator.compaction.lengths.positions_in_slots(forward_batch):
        original(backend, forward_batch, *args, **named)


def around_verify_coins(original: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """AROUND ``eagle_utils._verify_coins``: with a seed a coin is drawn by the position that it is for,
    and a length in slots would give one twice."""
    if runtime.coordinator is not None:
        lengths = runtime.coordinator.compaction.lengths
        named["seq_lens"] = lengths.logical_of_step(named["seq_lens"])
    return original(*args, **named)


def after_scheduler_init(_result: None, scheduler: Scheduler, *_args: Any, **_kwargs: Any) -> None:
    """AFTER ``Scheduler.__init__``: look at the real objects, then start."""
    from sglang.srt.arg_groups.overrides import resolving_view

    parts = runtime.parts
    runtime.refused += [
        f"hook {path} is not in place; this SGLang does not fit"
        for path in hooks.missing(hooks.scheduler_hooks())
    ]
    pools = [runner.token_to_kv_pool for runner in runtime.drafts]
    if parts is not None:
        numbers = [layer.layer_id for layer in parts.layers]
        runtime.refused += refusals.of_scheduler(scheduler, parts.config, numbers)
        runtime.refused += refusals.of_drafts(pools)
    if runtime.refused:
        return
    assert parts is not None
    resolved = resolving_view(scheduler.server_args)
    scales = functools.partial(
        softmax_scales,
        list(parts.layers),
        window_pool.full_pool(scheduler.token_to_kv_pool_allocator.get_kvcache()).dtype,
        attention_backends.writing(resolved),
    )
    compaction = Compaction(
        scheduler,
        parts.config,
        parts.recorder,
        parts.kernels,
        scales,
        parts.rope_shift,
        pools,
        layers=None if window_pool.is_used(scheduler) else numbers,
        reach=parts.reach,
    )
    coordinator = Coordinator(parts.config, compaction)
    coordinator.warm_up()
    runtime.coordinator = coordinator
    reuse = prefix_reuse.in_words(parts.config, resolved, scheduler.model_config)
    logger.info("KV compression is on: %s; %s.", described(parts, coordinator), reuse)


def described(parts: Parts, coordinator: Coordinator) -> str:
    """What runs, how many requests ring and decode graphs are for, and when compression begins, in
    words for the log."""
    config, recorder, scheduler = parts.config, parts.recorder, coordinator.scheduler
    kept = config.kept(scheduler.page_size)
    ring = "no query ring"
    if recorder.num_pages:
        room = Served.of(recorder, config.query_heads).in_words()
        ring = f"query ring {recorder.num_bytes / 2**30:.2f} GiB ({recorder.why}) for {room}"
    graphs = coordinator.graphs.room(
        coordinator.geometry, kept, scheduler.max_total_num_tokens, scheduler.max_running_requests
    )
    stock, most = coordinator.longer.answers(kept)
    answers = f"answers of up to {most:,} tokens"
    if most > stock:
        answers += f" (beyond {stock:,} one at a time)"
    return (
        f"{config.selector}, window {config.window}, kept {kept}, delay {config.delay} tokens, "
        f"{parts.kernels.name} kernels ({parts.kernels_why}), {ring}, {graphs}, "
        f"{answers}; {policy.begins(config)}"
    )


def after_get_init_info(result: dict[str, Any], _scheduler: Scheduler) -> None:
    """AFTER ``Scheduler.get_init_info``: the launcher looks for this before it serves.

    A refusal travels to the launcher the same way, so that the reason is the last thing it says.
    """
    ready = runtime.coordinator is not None
    handshake.tell(result, handshake.ready_word() if ready else "; ".join(runtime.refused))


def before_check_decode_mem(batch: ScheduleBatch, selected_indices: list[int] | None = None) -> None:
    """BEFORE ``ScheduleBatch.check_decode_mem``: the pass, ahead of the memory check of a step in which
    the running requests decode, alone or beside a prefill. A retraction, which checks for those that
    would stay, comes behind it."""
    if runtime.coordinator is not None and selected_indices is None:
        runtime.coordinator.before_decode(batch)


def before_release_req(
    batch: ScheduleBatch, idx: int, _remaining: int, offload_kv: bool = True
) -> None:
    """BEFORE ``ScheduleBatch.release_req``, by which memory that is short and priorities retract; what
    is to be aborted is not offloaded."""
    if runtime.coordinator is not None and offload_kv:
        runtime.coordinator.returning.keep(batch.reqs[idx])


def before_retract_all(*_args: Any, **_kwargs: Any) -> None:
    """BEFORE ``retract_all``, with which the scheduler pauses."""
    if runtime.coordinator is not None:
        runtime.coordinator.returning.drop_all()


def after_flush_cache(flushed: bool, _scheduler: Scheduler, *_args: Any, **_kwargs: Any) -> None:
    """AFTER ``Scheduler.flush_cache``: a paused server flushes while requests wait."""
    if flushed and runtime.coordinator is not None:
        runtime.coordinator.returning.drop_all()


def before_evict_swa(
    batch: ScheduleBatch, req: Req, pre_len: int, *, eviction_interval: int = 1
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """BEFORE ``ScheduleBatch._evict_swa``: slots that have left a sliding window are counted off the KV
    length. SGLang asks once so many tokens have left it, but counts logically, so it is told again."""
    from sglang.srt.environ import envs

    removed = removed_of(req)
    if not removed:
        return None
    interval = max(eviction_interval, envs.SGLANG_SWA_EVICTION_INTERVAL.get())
    return (batch, req, pre_len - removed), {"eviction_interval": interval}


def after_reset_for_retract(_result: None, req: Req) -> None:
    """AFTER ``Req.reset_for_retract``."""
    if runtime.coordinator is not None:
        runtime.coordinator.forget(req)


def around_init_req_max_new_tokens(cap: Callable[..., None], scheduler: Scheduler, req: Req) -> None:
    """AROUND ``Scheduler.init_req_max_new_tokens``, where every request passes ahead of the queue: one
    whose options nobody has checked ends, and what one asked for beyond its cap is kept."""
    coordinator, asked = runtime.coordinator, req.sampling_params.max_new_tokens
    if coordinator is not None and req.to_finish is None:
        problem = coordinator.terms_of.problem(req)
        if problem is not None:
            req.set_finish_with_abort(problem)
    cap(scheduler, req)
    if coordinator is not None:
        coordinator.longer.remember(req, asked)


def after_retraction_order(order: list[int], _sorted_indices: list[int], reqs: list[Req]) -> list[int]:
    """AFTER ``schedule_batch.beam_retraction_order``, which has the last word on who is kept."""
    return order if runtime.coordinator is None else runtime.coordinator.longer.keep(order, reqs)


def around_add_request_to_queue(
    add: Callable[..., None], scheduler: Scheduler, req: Req, is_retracted: bool = False
) -> None:
    """AROUND ``Scheduler._add_request_to_queue``: a long answer that lost its KV cannot come back."""
    if runtime.coordinator is not None and runtime.coordinator.longer.is_gone(req):
        runtime.coordinator.longer.end(req)
    else:
        add(scheduler, req, is_retracted)


def attach_storage(_attach: Callable[..., Any], _scheduler: Scheduler, _request: Any) -> Any:
    """AROUND ``Scheduler.attach_hicache_storage_wrapped``: what the flags refuse at the start."""
    from sglang.srt.managers.io_struct import AttachHiCacheStorageReqOutput

    return AttachHiCacheStorageReqOutput(success=False, message=refusals.STORAGE)


def before_free_row(_pool: Any, req: Req) -> None:
    """BEFORE ``ReqToTokenPool.free`` and ``DecodeReqToTokenPool.free``: the row, and with it the
    recorder, is about to be reused."""
    if runtime.coordinator is not None:
        runtime.coordinator.row_freed(req)
