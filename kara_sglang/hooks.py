"""The one table of places where the plugin touches SGLang, and the check that they are in place.

SGLang applies hooks by name and only logs a failure (``plugins/hook_registry.py``), so everything that
the plugin relies on is listed here, is compared with the signature that we expect, and is verified
after the fact. Paths are relative to ``sglang.srt``. What the plugin uses beside hooks is in
``compat/surface.py``; ``docs/upgrading-sglang.md`` says how both follow a new SGLang.
"""

from __future__ import annotations

import inspect
import pkgutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

PLUGIN, DISTRIBUTION = "kara", "kara-sglang"
CACHE_BACKEND = "kara"
"""Name of our prefix cache in SGLang's registry; the launcher chooses it by itself."""

_ROOT = "sglang.srt."


@dataclass(frozen=True, slots=True)
class Hook:
    """One target in SGLang.

    Attributes
    ----------
    target
        Dotted path below ``sglang.srt``.
    kind
        ``before``, ``after`` or ``around``.
    parameters
        Names of the target's leading parameters that we rely on.
    handler
        ``module:function`` below ``kara_sglang``, imported when the hook is registered.
    why
        One line for the documentation and the doctor.
    gone
        What in SGLang would make the hook needless.
    otherwise
        The hooks that take its place where SGLang does not have the target.
    """

    target: str
    kind: str
    parameters: tuple[str, ...]
    handler: str
    why: str
    gone: str = ""
    otherwise: tuple[Hook, ...] = ()

    @property
    def path(self) -> str:
        return _ROOT + self.target

    def exists(self) -> bool:
        """Whether the installed SGLang has the target."""
        try:
            pkgutil.resolve_name(self.path)
        except (ImportError, AttributeError, ValueError):
            return False
        return True

    def problem(self) -> str | None:
        """Why the target in the installed SGLang is not what we expect, or None."""
        try:
            function = pkgutil.resolve_name(self.path)
        except (ImportError, AttributeError, ValueError) as error:
            return f"{self.path} is missing ({error})"
        if not callable(function):
            return f"{self.path} is no function"
        # Below a class method's binding and below the hooks that are already in place.
        function = inspect.unwrap(getattr(function, "__func__", function))
        names = tuple(inspect.signature(function).parameters)
        if names[: len(self.parameters)] != self.parameters:
            return f"{self.path} takes {names}, expected it to begin with {self.parameters}"
        return None


# Always registered, in every process that loads plugins: the flags.
CLI_HOOKS = (
    Hook(
        "server_args.ServerArgs.add_cli_args",
        "after",
        ("parser",),
        "launcher.flags:add_cli_args",
        "adds the flags",
        "SGLang has a registry of flags for plugins",
    ),
    Hook(
        "server_args.ServerArgs.from_cli_args",
        "after",
        ("cls", "args"),
        "launcher.flags:from_cli_args",
        "reads the flags",
        "that registry hands a plugin its parsed flags",
    ),
    Hook(
        "server_args.ServerArgs.check_server_args",
        "after",
        ("self",),
        "launcher.flags:check_server_args",
        "refuses flags and models that compression does not support",
        "that registry lets a plugin refuse the resolved settings",
    ),
)

# Registered in the launcher once compression is switched on.
LAUNCHER_HOOKS = (
    Hook(
        "managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "before",
        ("self", "obj", "input_ids"),
        "launcher.requests:check_input",
        "refuses prompts that hold no token or what is none; an error is HTTP 400",
        "SGLang itself refuses empty prompts and ids outside the vocabulary",
    ),
    Hook(
        "sampling.sampling_params.SamplingParams.verify",
        "after",
        ("self", "vocab_size"),
        "launcher.requests:verify_sampling_params",
        "checks per-request options; an error is HTTP 400",
        "SGLang has a registry of checks for `custom_params`",
    ),
    Hook(
        "managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
        "around",
        ("self", "meta_info", "state", "customized_info", "index", "finish_reason"),
        "launcher.requests:update_request_meta_info",
        "puts meta_info.kv_compress into the answer",
        "customized info that is one object per request goes into `meta_info` as it is",
    ),
    Hook(
        "entrypoints.engine._wait_for_scheduler_ready",
        "after",
        ("scheduler_pipe_readers", "scheduler_procs"),
        "launcher.requests:check_children",
        "refuses to serve when a scheduler runs without the plugin",
        "SGLang ends a process in which a plugin or a hook fails",
    ),
)

# Registered in the scheduler processes once compression is switched on.
SCHEDULER_HOOKS = (
    Hook(
        "model_executor.model_runner.ModelRunner.load_model",
        "after",
        ("self",),
        "scheduler.runtime:after_load_model",
        "allocates the query ring and a pass's scratch before the KV pool is sized",
        "a pass has a callback between model and KV pool",
    ),
    Hook(
        "model_executor.model_runner.ModelRunner.init_cuda_graphs",
        "before",
        ("self", "capture_decode_cuda_graph"),
        "scheduler.runtime:before_cuda_graphs",
        "allocates the recorder's row tables before graph capture",
        "a pass has a callback before graph capture",
    ),
    Hook(
        "layers.radix_attention.RadixAttention.forward",
        "before",
        ("self", "q", "k", "v", "forward_batch"),
        "scheduler.runtime:before_attention",
        "records post-RoPE queries in decode steps",
        "attention layers have observers of their queries",
    ),
    Hook(
        "model_executor.forward_batch_info.ForwardBatch.init_new",
        "after",
        ("cls", "batch", "model_runner"),
        "scheduler.runtime:after_init_forward_batch",
        "sets RoPE positions from the logical length",
        "a request has a position offset that `ForwardBatch` adds",
    ),
    Hook(
        "managers.overlap_utils.FutureMap.resolve_seq_lens_cpu",
        "after",
        ("self", "batch"),
        "scheduler.runtime:after_resolve_seq_lens",
        "shortens rows that the step in flight has published at their old length",
        "a pass may correct published lengths",
    ),
    Hook(
        "speculative.spec_utils.move_accept_tokens_to_target_kvcache",
        "after",
        ("batch", "accept_index"),
        "scheduler.runtime:after_move_accepted",
        "moves the queries of accepted drafts as SGLang moves their K and V",
        "attention layers have observers of their queries",
    ),
    *(
        Hook(
            f"layers.attention.{backend}.common_template",
            "around",
            ("self", "forward_batch", "kv_indices_buffer", "call_fn"),
            "scheduler.runtime:around_draft_indices",
            "gives a draft model's steps KV lengths where SGLang takes positions for them",
            "`generate_draft_decode_kv_indices` takes KV lengths",
        )
        for backend in (
            "flashinfer_backend.FlashInferMultiStepDraftBackend",
            "triton_backend.TritonMultiStepDraftBackend",
        )
    ),
    Hook(
        "speculative.eagle_utils._verify_coins",
        "around",
        ("sampling_info", "seq_lens"),
        "scheduler.runtime:around_verify_coins",
        "draws the coins of seeded requests by logical positions",
        "a request has a position offset that `ForwardBatch` adds",
    ),
    Hook(
        "managers.scheduler.Scheduler.__init__",
        "after",
        ("self", "server_args", "port_args"),
        "scheduler.runtime:after_scheduler_init",
        "checks the real objects and the hooks, starts the coordinator",
        "a pass is made by a registry once the scheduler is built",
    ),
    Hook(
        "managers.schedule_batch.ScheduleBatch.check_decode_mem",
        "before",
        ("self", "selected_indices"),
        "scheduler.runtime:before_check_decode_mem",
        "the compaction pass, ahead of the memory check",
        "the scheduler calls registered passes ahead of its memory check",
    ),
    Hook(
        "managers.schedule_batch.ScheduleBatch.release_req",
        "before",
        ("self", "idx", "remaing_req_count", "offload_kv"),
        "scheduler.runtime:before_release_req",
        "copies a compressed row to the host before a retraction frees it",
        "SGLang keeps the KV of retracted requests",
    ),
    Hook(
        "managers.scheduler.retract_all",
        "before",
        (),
        "scheduler.runtime:before_retract_all",
        "gives up such copies: a server that is paused may get other weights",
        "SGLang keeps the KV of retracted requests",
    ),
    Hook(
        "managers.scheduler.Scheduler.flush_cache",
        "after",
        ("self", "empty_cache"),
        "scheduler.runtime:after_flush_cache",
        "gives them up with all other KV",
        "SGLang keeps the KV of retracted requests",
    ),
    Hook(
        "managers.schedule_batch.ScheduleBatch._evict_swa",
        "before",
        ("self", "req", "pre_len"),
        "scheduler.runtime:before_evict_swa",
        "gives slots back by KV length that have left a sliding window",
        "a request has a KV length of its own",
    ),
    Hook(
        "managers.schedule_batch.Req.reset_for_retract",
        "after",
        ("self",),
        "scheduler.runtime:after_reset_for_retract",
        "forgets a retracted request's windows",
        "passes are told of a retraction",
    ),
    Hook(
        "mem_cache.memory_pool.ReqToTokenPool.free",
        "before",
        ("self", "req"),
        "scheduler.runtime:before_free_row",
        "takes the request's recorder back",
        "passes are told when a row is given back",
    ),
    Hook(
        "disaggregation.decode.DecodeReqToTokenPool.free",
        "before",
        ("self", "req"),
        "scheduler.runtime:before_free_row",
        "the same on a decode server, whose rows are in a pool of another class",
        "passes are told when a row is given back",
    ),
    Hook(
        "managers.scheduler.Scheduler.get_prefill_adder_class",
        "around",
        ("self",),
        "scheduler.admission:adder_class",
        "admits requests by what they will hold once compressed",
        "a pass says how many slots a request will come to hold",
    ),
    Hook(
        "managers.scheduler.Scheduler.init_req_max_new_tokens",
        "around",
        ("self", "req"),
        "scheduler.runtime:around_init_req_max_new_tokens",
        "ends a request whose options nobody has checked (tokenizer workers load no plugins), and "
        "remembers what one asked for beyond SGLang's cap",
        "tokenizer workers load plugins, and a pass says how many slots a request will come to hold",
    ),
    Hook(
        "managers.schedule_batch.beam_retraction_order",
        "after",
        ("sorted_indices", "reqs"),
        "scheduler.runtime:after_retraction_order",
        "keeps the answer that is longer than the pool where memory is short",
        "a request can be one that is not retracted",
    ),
    Hook(
        "managers.scheduler.Scheduler._add_request_to_queue",
        "around",
        ("self", "req", "is_retracted"),
        "scheduler.runtime:around_add_request_to_queue",
        "ends the answer that is longer than the pool where its KV was given up",
        "a request can be one that is not retracted",
    ),
    Hook(
        "managers.scheduler.Scheduler.get_output_streamer_class",
        "around",
        ("self",),
        "scheduler.report:output_streamer_class",
        "reports what was compressed with a request's last output",
        "SGLang has a registry of fields that are reported per request",
    ),
    Hook(
        "managers.scheduler_components.pool_stats_observer.PoolStats.get_decode_usage_msg_parts",
        "after",
        ("self",),
        "scheduler.report:decode_usage_msg_parts",
        "adds the share retained to the `Decode batch` log line",
        "a pass may add to the log line",
    ),
    Hook(
        "managers.scheduler.Scheduler.get_internal_state",
        "after",
        ("self", "recv_req"),
        "scheduler.report:internal_state",
        "adds settings and totals to /server_info",
        "a pass may add to the internal state",
    ),
    Hook(
        "managers.scheduler.Scheduler.attach_hicache_storage_wrapped",
        "around",
        ("self", "recv_req"),
        "scheduler.runtime:attach_storage",
        "refuses a HiCache storage backend while the server runs",
        "HiCache storage backends are tested with compression",
    ),
    Hook(
        "managers.scheduler.Scheduler.get_init_info",
        "after",
        ("self",),
        "scheduler.runtime:after_get_init_info",
        "tells the launcher that this process is hooked",
        "SGLang ends a process in which a plugin or a hook fails",
    ),
    Hook(
        "managers.data_parallel_controller.DataParallelController.get_init_info",
        "after",
        ("self",),
        "handshake:after_controller_init_info",
        "passes on what the schedulers of a data-parallel server said",
        "SGLang ends a process in which a plugin or a hook fails",
        otherwise=(
            Hook(
                "managers.data_parallel_controller.aggregate_scheduler_startup_times",
                "around",
                ("startup_times",),
                "handshake:around_startup_times",
                "notes what the schedulers of a data-parallel server said",
                "0.5.22 leaves the tested versions",
            ),
            Hook(
                "managers.data_parallel_controller.DataParallelController.__init__",
                "after",
                ("self", "server_args", "port_args"),
                "handshake:after_controller_init",
                "passes it on with the controller's start-up times",
                "0.5.22 leaves the tested versions",
            ),
        ),
    ),
)

# Registered beside them: prefills behind slots that stand for other tokens.
PREFILL_HOOKS = (
    Hook(
        "mem_cache.allocation.alloc_for_extend",
        "before",
        ("batch",),
        "radix_integration.prefill:before_alloc_for_extend",
        "turns a prefill's lengths from tokens into slots",
        "a match has a length in tokens and one in slots",
    ),
    Hook(
        "mem_cache.allocation._prefix_kv_indices",
        "around",
        ("batch", "req"),
        "radix_integration.prefill:around_prefix_kv_indices",
        "reads a later chunk's prefix off its row in slots",
        "a match has a length in tokens and one in slots",
    ),
    Hook(
        "managers.schedule_batch.ScheduleBatch.prepare_for_extend",
        "after",
        ("self",),
        "radix_integration.prefill:after_prepare_for_extend",
        "lets SGLang sum up a prefill's lengths in slots",
        "a match has a length in tokens and one in slots",
    ),
)

ALL_HOOKS = (*CLI_HOOKS, *LAUNCHER_HOOKS, *SCHEDULER_HOOKS, *PREFILL_HOOKS)


def scheduler_hooks() -> tuple[Hook, ...]:
    """The hooks of a scheduler process."""
    return fitting((*SCHEDULER_HOOKS, *PREFILL_HOOKS))


def fitting(hooks: Iterable[Hook], exists: Callable[[Hook], bool] = Hook.exists) -> tuple[Hook, ...]:
    """``hooks``, with those that take its place for each one whose target SGLang does not have."""
    return tuple(
        one
        for hook in hooks
        for one in (hook.otherwise if hook.otherwise and not exists(hook) else (hook,))
    )


def digest(hooks: tuple[Hook, ...]) -> int:
    """A number that launcher and scheduler must agree on."""
    return zlib.crc32(repr([(hook.path, hook.kind, hook.handler) for hook in hooks]).encode())


def register(hooks: tuple[Hook, ...]) -> None:
    """Put ``hooks`` into SGLang's registry, each target once. Applied by ``apply_hooks()``."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    # Said for those that SGLang does not register itself: it logs who holds a target.
    source = HookSource(PLUGIN, DISTRIBUTION)
    for hook in hooks:
        handler = _handler(hook)
        if all(registered is not handler for _, registered, _ in HookRegistry._hooks[hook.path]):
            HookRegistry.register(hook.path, handler, HookType(hook.kind), source=source)


def missing(hooks: tuple[Hook, ...]) -> list[str]:
    """Targets of ``hooks`` that do not call our handler in this process."""
    return [hook.path for hook in hooks if not _in_place(hook)]


def _in_place(hook: Hook) -> bool:
    # SGLang's own list of patched targets knows paths only: with another plugin's hook already on a
    # target, it would skip ours. So look for the handler in what the wrappers close over.
    try:
        function = pkgutil.resolve_name(hook.path)
    except (ImportError, AttributeError, ValueError):
        return False
    handler = _handler(hook)
    function = getattr(function, "__func__", function)
    while function is not None:
        if any(cell.cell_contents is handler for cell in function.__closure__ or ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def problems(hooks: tuple[Hook, ...] = ALL_HOOKS) -> list[str]:
    """What does not fit between ``hooks`` and the installed SGLang, one line each."""
    return [text for hook in fitting(hooks) if (text := hook.problem()) is not None]


def _handler(hook: Hook) -> Callable[..., Any]:
    module, function = hook.handler.split(":")
    return pkgutil.resolve_name(f"kara_sglang.{module}:{function}")
