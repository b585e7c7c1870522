"""The plan of one server under one load: all figures, warnings, and the command line to copy."""

from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import dataclass
from typing import Any

from kara_sglang.benchmarks.arithmetic import Settings
from kara_sglang.benchmarks.models import Model
from kara_sglang.plan import gain
from kara_sglang.plan.launch import Launch
from kara_sglang.plan.load import Held, Load, compressed, uncompressed
from kara_sglang.plan.memory import Memory, Rank, divide, ring_of
from kara_sglang.scheduler import graphs, window_pool
from kara_sglang.scheduler.pace import pace_of
from kara_sglang.scheduler.ring.recorder import QueryRecorder, cheapest
from kara_sglang.scheduler.ring.served import Served


@dataclass(frozen=True, slots=True)
class Projection:
    """Output tok/s with compression over that without, and what it was reckoned with."""

    gain: float
    card: str
    kind: str = "a projection from datasheets, not a measurement"


@dataclass(frozen=True, slots=True)
class Plan:
    """Figures are per GPU; KV slots and requests are the same on all GPUs of a server.

    ``asked_graph`` is the largest decode graph that SGLang captures with the flags as the user gave
    them; the plan may add a larger one. With ``untouched`` the policy compresses nothing
    under this load, and ``held`` is what requests hold once memory is short.
    """

    launch: Launch
    asked_graph: int
    load: Load
    rank: Rank
    memory: Memory
    ring: Served | None
    stock: Held
    held: Held
    untouched: bool
    projection: Projection | None

    @property
    def fits(self) -> tuple[int, int]:
        """Requests that the pool holds without compression, and with it."""
        return (
            self._fitting(self.stock, self.memory.stock_pool),
            self._fitting(self.held, self.memory.pool),
        )

    def _fitting(self, held: Held, slots: int) -> int:
        """Where sliding-window layers have a pool of their own, that must hold the newest tokens of
        each request, compressed or not."""
        fits = held.fitting(slots)
        resolved, model = self.launch.resolved, self.launch.model
        if not model.is_hybrid_swa:
            return fits
        newest = min(self.stock.most, window_pool.most_of_one(resolved, model))
        return min(fits, int(slots * window_pool.share(resolved, model)) // newest)

    @property
    def running(self) -> tuple[int, int]:
        """Requests of the load that run at once, without compression and with it."""
        wanted = self.load.running
        if limit := self.launch.resolved.max_running_requests:
            wanted = min(wanted, limit)
        return min(wanted, self.fits[0]), min(wanted, self.fits[1])

    @classmethod
    def of(cls, launch: Launch, asked_graph: int, load: Load, weights: int | None) -> Plan:
        """Reckon everything; ``weights`` in bytes, of all ranks together, None on a CPU.

        Raises
        ------
        ValueError
            Where the memory does not suffice for the weights, or for one request of the load.
        """
        rank = Rank.of(launch)
        recorder = ring_of(launch, rank, weights)
        ring = None
        if launch.config.keeps_queries:
            ring = _served(recorder, launch.config.query_heads)
        memory = divide(launch, rank, recorder, weights)
        page = launch.resolved.page_size
        stock = uncompressed(load, page)
        untouched = (
            launch.config.policy == "pressure"
            and load.running * stock.most < launch.config.min_pool_usage * memory.pool
        )
        plan = cls(
            launch=launch,
            asked_graph=asked_graph,
            load=load,
            rank=rank,
            memory=memory,
            ring=ring,
            stock=stock,
            held=compressed(load, launch.config, page, pace_of(launch.resolved)),
            untouched=untouched,
            projection=None,
        )
        if plan.stock.most > memory.pool:
            raise ValueError(
                f"a prompt of {load.prompt:,} and an answer of {load.answer:,} tokens must fit "
                f"uncompressed, and the pool has {memory.pool:,} KV slots; plan more memory (only one "
                "answer at a time can be longer)"
            )
        return dataclasses.replace(plan, projection=_project(plan))

    def warnings(self) -> list[str]:
        """What to change, or to know; one line each."""
        lines = []
        load, config = self.load, self.launch.config
        without, running = self.running
        if running < load.running and running == self.fits[1]:
            lines.append(f"{load.running - running} of {load.running} requests wait: memory is full")
        if self.held.windows == 0:
            lines.append(
                f"no window is compressed: answers of {load.answer:,} tokens end before a window of "
                f"{config.window} and its delay of {config.delay}; use a smaller --kv-compress-window"
            )
        elif self.untouched:
            lines.append(
                "all fits uncompressed, so the policy `pressure` leaves these answers as they are; it "
                "compresses as above when memory is short"
            )
        elif without == running:
            line = f"all {running} requests that run fit without compression, so it gains little here"
            if config.policy != "pressure":
                line += "; the policy `pressure` compresses only when memory is short"
            lines.append(line)
        if self.launch.resolved.speculative_algorithm is not None:
            lines.append(
                "drafts are not reckoned with: the gain is that of steps with one token, and fewer "
                "requests fit beside the weights and the KV of a draft model"
            )
        if self.launch.captured and running > self.asked_graph:
            lines.append(
                f"{running} requests run, and by itself SGLang captures decode graphs up to "
                f"{self.asked_graph} here; larger batches run without a graph, slower: "
                f"{graphs.FLAG} {max(running, self.launch.captured)}"
            )
        if self.ring is not None and self.ring.requests < running:
            need = math.ceil(running * self.ring.request_bytes / 2**30 * 100) / 100
            lines.append(
                f"the query ring has room for {self.ring.requests} of {running} requests; those of the "
                f"others are chosen by `keys`, or use --kv-compress-query-mem-gb {need}"
            )
        if load.prompt + load.answer > self.launch.model.context_len:
            lines.append(
                f"prompt and answer are longer than the model's context of "
                f"{self.launch.model.context_len:,} tokens; SGLang ends such answers early"
            )
        return lines

    def command(self) -> str:
        """What to copy."""
        return shlex.join(["python", "-m", "sglang.launch_server", *self.launch.words])

    def as_json(self) -> dict[str, Any]:
        """All figures: sizes in bytes, lengths in tokens; pairs are without compression and with it."""
        launch, ring = self.launch, self.ring
        config = launch.config
        return {
            "model": {
                "architectures": launch.model.hf_config.architectures,
                "weights_bytes_per_gpu": self.memory.weights,
                "kv_bytes_per_token_per_gpu": self.rank.token_bytes,
                "context": launch.model.context_len,
            },
            "settings": dataclasses.asdict(config) | {"kept": config.kept(launch.resolved.page_size)},
            "server": {
                "tp_size": launch.tp,
                "page_size": launch.resolved.page_size,
                "mem_fraction_static": launch.resolved.mem_fraction_static,
            },
            "memory": {
                "total_bytes": self.memory.total,
                "context_bytes": self.memory.context,
                "reserve_bytes": self.memory.reserve,
                "ring_bytes": self.memory.ring,
                "scratch_bytes": self.memory.scratch,
            },
            "pool_tokens": _pair(self.memory.stock_pool, self.memory.pool),
            "load": dataclasses.asdict(self.load),
            "slots_per_request_at_most": _pair(self.stock.most, self.held.most),
            "slots_per_request_mean": _pair(self.stock.mean, self.held.mean),
            "windows_per_request": self.held.windows,
            "requests_that_fit": _pair(*self.fits),
            "requests_running": _pair(*self.running),
            "decode_graphs": {
                "needed": self.running[1],
                "captured": launch.captured,
                "captured_without_the_plan": self.asked_graph,
            },
            "ring": ring and dataclasses.asdict(ring),
            "projection": self.projection and dataclasses.asdict(self.projection),
            "warnings": self.warnings(),
            "command": self.command(),
        }

    def as_text(self) -> str:
        """What a person reads."""
        launch, rank, config = self.launch, self.rank, self.launch.config
        kept = config.kept(launch.resolved.page_size)
        layers = f"{rank.num_hidden_layers} layers"
        if rank.full_layers < rank.num_hidden_layers:
            layers += f", of which passes work over the {rank.full_layers} with full attention"
        lines = [
            f"{', '.join(launch.model.hf_config.architectures)}: {layers}; "
            f"per GPU {rank.num_attention_heads} query and {rank.num_kv_heads} KV heads of "
            f"{rank.head_dim}, {rank.token_bytes:,} bytes of KV a token",
            f"{config.selector}: windows of {config.window}, {kept} kept, delay {config.delay}, "
            f"policy {config.policy}",
        ]
        if self.memory.total is not None:
            lines += ["", *self._memory_lines()]
        lines += ["", *self._load_lines(), ""]
        if self.ring is not None:
            lines.append(_ring_line(self.ring))
        if (projection := self.projection) is not None:
            lines.append(
                f"Output tokens per second: {projection.gain:.2f} times those without compression; "
                f"{projection.kind}, at the speed of {projection.card}"
            )
        if warnings := self.warnings():
            lines += ["", *(f"! {line}" for line in warnings)]
        return "\n".join([*lines, "", "Launch:", f"  {self.command()}"])

    def _memory_lines(self) -> list[str]:
        launch, memory = self.launch, self.memory
        parts = {
            "in all": memory.total,
            "context (assumed)": memory.context,
            "weights": memory.weights,
            f"left free by SGLang ({launch.resolved.mem_fraction_static} static)": memory.reserve,
            "query ring": memory.ring,
            "scratch": memory.scratch,
            "KV pool": memory.pool * self.rank.token_bytes,
        }
        title = "the GPU" if launch.tp == 1 else f"each of {launch.tp} GPUs"
        return [
            f"Memory of {title} with compression, GiB",
            *(f"  {name:<44}{(size or 0) / 2**30:12.2f}" for name, size in parts.items()),
        ]

    def _load_lines(self) -> list[str]:
        load, (without, running) = self.load, self.running
        rows: dict[str, tuple[int | str, int]] = {
            "KV slots of the pool": (self.memory.stock_pool, self.memory.pool),
            "slots a request holds at most": (self.stock.most, self.held.most),
            "slots a request holds in the mean": (round(self.stock.mean), round(self.held.mean)),
            "windows compressed per answer": ("", self.held.windows),
            "requests that fit": self.fits,
            f"of {load.running} requests run at once": (without, running),
        }
        if self.launch.captured:
            rows["largest decode graph needed"] = (without, running)
            rows["largest decode graph captured"] = ("", self.launch.captured)
        title = f"Prompts of {load.prompt:,} tokens, answers of {load.answer:,}"
        return [
            f"{title:<46}{'without':>12}{'with':>12}",
            *(f"  {name:<44}{_figure(a)}{_figure(b)}" for name, (a, b) in rows.items()),
        ]


def _figure(value: int | str) -> str:
    return f"{value:>12,}" if isinstance(value, int) else f"{value:>12}"


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configs of sparse models call the number of their experts."""


def _pair(without: float, with_: float) -> dict[str, float]:
    return {"without": without, "with": with_}


def _served(recorder: QueryRecorder, heads: str) -> Served:
    least = cheapest(recorder.shape.group, heads)
    if not recorder.serves(least):
        raise ValueError(
            "--kv-compress-query-mem-gb has no room for the queries of one request; it takes "
            f"{recorder.most_bytes(least) / 2**30:.4f} GiB"
        )
    return Served.of(recorder, heads)


def _ring_line(ring: Served) -> str:
    return (
        f"Query ring: {ring.bytes / 2**30:.2f} GiB ({ring.why}); a request takes "
        f"{ring.all_heads_bytes:,} bytes with all query heads, {ring.mean_bytes:,} with their mean: "
        f"room for {ring.in_words()}"
    )


def _project(plan: Plan) -> Projection | None:
    """None on a CPU, and for quantized and sparse models, of which a step reads and computes other
    amounts."""
    launch, rank, memory = plan.launch, plan.rank, plan.memory
    text = launch.model.hf_text_config
    sparse = any(getattr(text, name, None) for name in _EXPERTS)
    if memory.total is None or launch.model.quantization is not None or sparse:
        return None
    assert memory.weights is not None
    model = Model(
        name="",
        layers=rank.num_hidden_layers,
        query_heads=rank.num_attention_heads,
        kv_heads=rank.num_kv_heads,
        head_dim=rank.head_dim,
        parameters=memory.weights / 2e9,
        kv_itemsize=rank.kv_itemsize,
    )
    config = launch.config
    kept = config.kept(launch.resolved.page_size)
    held, settings = plan.stock, None
    if not plan.untouched:
        held = plan.held
        settings = Settings(window=config.window, kept=kept, delay=config.delay, mean=True)
    card = gain.nearest(memory.total)
    stock = gain.rate(model, card, plan.load, plan.stock, memory.stock_pool, None)
    ours = gain.rate(model, card, plan.load, held, memory.pool, settings)
    return Projection(ours / stock, card.name)
