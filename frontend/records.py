"""What each step of a program cost: tokens, cache, KV slots, time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """One request of a program, as the server reported it."""

    kind: str  # "gen", "select", or "fork": the shared text's one prefill before the forks
    name: str  # the variable, where kara_sglang.frontend.backend.gen named it
    state: str  # SGLang's id of the program state; forks have their own
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache; logical tokens
    output_tokens: int
    reused_tokens: int  # of the cached ones, those that came from compressed blocks
    reused_slots: int  # KV slots which those take
    windows: int  # compressed while this step ran
    tokens_removed: int  # per layer and KV head, by those windows
    slots_held: int  # KV slots that the request held when it ended
    logical_length: int  # slots that it would have held without compression
    seconds: float
    finish: str  # "stop" or "length"
    prompt_ids: tuple[int, ...] = field(repr=False)
    output_ids: tuple[int, ...] = field(repr=False)  # as kept for the next step: no stop token

    @classmethod
    def of(cls, kind: str, name: str, state: str, meta_info: dict[str, Any], **fields: Any) -> Step:
        """Read a ``meta_info`` of ``/generate``; a server without the plugin holds every token."""
        prompt, output = meta_info["prompt_tokens"], meta_info["completion_tokens"]
        # The last output token's KV is never computed.
        whole = prompt + max(output - 1, 0)
        report = meta_info.get("kv_compress") or {}
        if isinstance(report, list):  # of a server with several tokenizer workers
            [report] = report
        return cls(
            kind=kind,
            name=name,
            state=state,
            prompt_tokens=prompt,
            cached_tokens=meta_info["cached_tokens"],
            output_tokens=output,
            reused_tokens=report.get("reused_tokens", 0),
            reused_slots=report.get("reused_slots", 0),
            windows=report.get("windows", 0),
            tokens_removed=report.get("tokens_removed", 0),
            slots_held=report.get("kv_slots_held", whole),
            logical_length=report.get("logical_length", whole),
            finish=meta_info["finish_reason"]["type"],
            **fields,
        )

    def numbers(self) -> dict[str, Any]:
        """All fields but the ids, for JSON."""
        return {name: value for name, value in vars(self).items() if not name.endswith("_ids")}


@dataclass(frozen=True)
class Totals:
    """Sums over steps."""

    steps: int
    prompt_tokens: int
    cached_tokens: int
    prefilled_tokens: int  # prompt tokens that the prefix cache did not have
    output_tokens: int
    reused_tokens: int
    reused_slots: int
    windows: int
    slots_held: int  # each step's slots when it ended; steps that share a prefix count it each
    logical_length: int  # the same without compression
    seconds: float  # steps of forks overlap, so this may exceed the time on the clock

    @classmethod
    def of(cls, steps: list[Step]) -> Totals:
        names = [name for name in cls.__dataclass_fields__ if name not in ("steps", "prefilled_tokens")]
        sums = {name: sum(getattr(step, name) for step in steps) for name in names}
        prefilled = sums["prompt_tokens"] - sums["cached_tokens"]
        return cls(steps=len(steps), prefilled_tokens=prefilled, **sums)


class Ledger:
    """The steps of all programs of one endpoint; written by many threads, read at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: list[Step] = []
        self._running: dict[object, tuple[str, float]] = {}

    @property
    def steps(self) -> list[Step]:
        """Finished steps, in the order in which they finished."""
        with self._lock:
            return list(self._steps)

    @property
    def running(self) -> list[tuple[str, float]]:
        """Name and age in seconds of each request under way."""
        now = time.perf_counter()
        with self._lock:
            return [(name, now - start) for name, start in self._running.values()]

    @property
    def totals(self) -> Totals:
        return Totals.of(self.steps)

    def clear(self) -> None:
        with self._lock:
            self._steps.clear()

    def add(self, step: Step) -> None:
        with self._lock:
            self._steps.append(step)

    @contextmanager
    def request(self, name: str) -> Iterator[None]:
        """A request is under way inside."""
        key = object()
        with self._lock:
            self._running[key] = (name, time.perf_counter())
        try:
            yield
        finally:
            with self._lock:
                del self._running[key]
