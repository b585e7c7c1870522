"""All settings of the plugin: one flat record, its checks, and its JSON form.

The same record comes from the command line, from SGLang's ``--config`` file, from
:func:`kara_sglang.configure` and from the environment variable :data:`ENV`. Errors are ``ValueError``
with one line that names the flag or key and the way out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kara_sglang.kernels.record import FP4, FP8
from kara_sglang.kernels.selectors import REGISTRY

ENV = "SGLANG_KV_COMPRESS"
"""Settings as a selector's name or a JSON object; the launcher hands them to its children in it."""

NONE = "none"

Score = Literal["sum", "sum_v", "l2", "l2_v", "l2_v4", "l2_v4_k"]
SELECTORS: tuple[str, ...] = tuple(REGISTRY)

# The paper's own choices (arXiv 2607.01237, section 4): everything that this project added is off.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "score": "sum",
        "neighbours": 1,
        "chunk_budget": 0.1,
        "ahead": False,
        "delay": 0,
        "query_heads": "all",
        "query_dtype": "model",
    },
}


@dataclass(frozen=True, slots=True)
class KaraConfig:
    """Settings of one server.

    Attributes
    ----------
    selector
        Which tokens of a window are kept; the registry is ``kernels/selectors``.
    window
        W, tokens that are compressed together. A multiple of the page size.
    retain
        Share of a window that is kept, 0 < retain <= 1. R = retain * W, rounded to whole pages.
    query_mem_gb
        Memory of the ring that holds recorded queries, in GiB per rank. ``None``: what the KV pool's
        requests need, see ``ring_size.py``, where the server's selector needs queries, else 0.
    prefix_reuse
        ``exact``: the prefix cache holds uncompressed KV only. ``compressed``: it keeps what a
        compressed request leaves behind, too.
    delay
        Newest tokens left uncompressed behind the window.
    delay_votes
        Whether the delay's queries vote as the window's own do. For ``kara`` and ``causal``.
    ahead
        Whether queries vote as if they stood one window later. For ``kara`` and ``causal``.
    score
        ``sum`` of the attention that a key collects (the paper's), ``l2``: sum of its squares; with
        ``_v`` times the norm of the value, with ``_v4`` times its fourth power, with ``_k`` times the
        distance of the key's direction from that of the window's mean key.
    neighbours
        Tokens around each, itself included, with whose scores its own is blended; odd, 1 for none.
        For ``kara``, ``causal`` and ``keys``.
    chunk_budget
        alpha: share of R that Token2Chunk may spend on filling gaps; 0 switches it off.
    chunk_width
        gamma: widest chunk in tokens, both ends included.
    chunk_quantile
        Both ends of a chunk must score above this quantile of the window.
    last_queries
        How many of the newest queries ``snapkv`` looks through.
    granularity
        ``head``: each KV head keeps its own tokens; ``layer``: the heads' scores are added up and all
        heads of a layer (of a rank) keep the same. For ``kara``, ``causal``, ``snapkv`` and ``keys``.
    query_heads
        ``all`` query heads are recorded, or the ``mean`` of each GQA group; ``auto``: all while the
        ring has room and the mean when it has not.
    query_dtype
        ``fp8`` (e4m3), ``fp4`` (e2m1 with a scale for every 32 numbers) or ``model`` (the model's own).
    policy
        Whose window is compressed when: ``periodic`` (the paper's), ``threshold``, ``pressure``, or
        ``punctual``: each in the step in which it falls due.
    period
        Decode steps between two passes (``periodic``, ``pressure``).
    max_requests_per_pass
        Requests that one pass compresses at most (``periodic``, ``pressure``).
    threshold
        KV slots from which on a request is compressed (``threshold``).
    min_pool_usage
        Share of the KV pool, needed uncompressed, below which nothing is compressed
        (``pressure``).
    seed
        Seeds the ``random`` selector.
    trace
        Folder for one file per request that says which tokens its windows kept; None: no files.
    debug_checks
        Checks the invariants of every pass on the device, too (synchronises; for tests).
    untested_sglang
        Start with a newer SGLang than the tested ones, if all that the plugin uses of it is there.
    """

    selector: str = "kara"
    window: int = 512
    retain: float = 0.5
    query_mem_gb: float | None = None
    prefix_reuse: Literal["exact", "compressed"] = "exact"
    delay: int = 64
    delay_votes: bool = False
    ahead: bool = True
    score: Score = "l2_v4_k"
    neighbours: int = 13
    chunk_budget: float = 0.0
    chunk_width: int = 8
    chunk_quantile: float = 0.8
    last_queries: int = 32
    granularity: Literal["head", "layer"] = "head"
    query_heads: Literal["auto", "all", "mean"] = "auto"
    query_dtype: Literal["fp4", "fp8", "model"] = "fp8"
    policy: Literal["periodic", "threshold", "pressure", "punctual"] = "periodic"
    period: int = 1
    max_requests_per_pass: int = 8
    threshold: int = 0
    min_pool_usage: float = 0.8
    seed: int = 0
    trace: str | None = None
    debug_checks: bool = False
    untested_sglang: bool = False

    def __post_init__(self) -> None:
        for name, check, expected in _RANGES:
            if not check(getattr(self, name)):
                raise ValueError(
                    f"{flag_of(name)} must be {expected}, got {shown(getattr(self, name))}"
                )
        if REGISTRY[self.selector].needs_queries and not self.keeps_queries:
            raise ValueError(
                f"--kv-compress-query-mem-gb 0 leaves no room for the queries that --kv-compress "
                f"{self.selector} needs; give it memory or choose {_without_queries()}"
            )
        if self.policy == "punctual" and self.query_heads == "auto" and self.keeps_queries:
            raise ValueError(
                f'{flag_of("policy")} "punctual" is there for answers that do not depend on what else '
                'runs, and query_heads "auto" makes them: set query_heads to "all" or "mean"'
            )

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> KaraConfig:
        """Check keys and types, apply ``preset`` first and everything else over it."""
        settings = dict(settings)
        preset = settings.pop("preset", "default")
        if not isinstance(preset, str) or preset not in PRESETS:
            names = ", ".join(PRESETS)
            raise ValueError(f"{flag_of('preset')} must be one of {names}, got {shown(preset)}")
        merged = PRESETS[preset] | settings
        types = typing.get_type_hints(cls)
        for key, value in merged.items():
            if key not in types:
                known = ", ".join(["preset", *CONFIG_KEYS])
                raise ValueError(f"--kv-compress-config: unknown key {shown(key)}; known keys: {known}")
            if key == "selector":
                check_selector(flag_of(key), value)
            merged[key] = checked(flag_of(key), value, types[key])
        return cls(**merged)

    @classmethod
    def from_env(cls) -> KaraConfig | None:
        """The settings in :data:`ENV`, or None where compression is off."""
        settings = environment_settings()
        return None if settings is None else cls.from_settings(settings)

    @property
    def keeps_queries(self) -> bool:
        """Whether there is a query ring."""
        if self.query_mem_gb is not None:
            return self.query_mem_gb * 2**30 >= 1
        return REGISTRY[self.selector].needs_queries

    def ring_dtype(self, model: torch.dtype) -> torch.dtype:
        """What recorded queries are stored as, of a model whose own are ``model``."""
        return {"fp4": FP4, "fp8": FP8, "model": model}[self.query_dtype]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def check_page_size(self, page_size: int) -> None:
        """Raise where whole pages of ``page_size`` tokens do not fit the window or the share."""
        if self.window % page_size:
            below = self.window // page_size * page_size
            near = f"{below} or {below + page_size}" if below else f"{page_size}"
            raise ValueError(
                f"--kv-compress-window {self.window} is not a multiple of the page size "
                f"{page_size} (--page-size); use {near}"
            )
        whole = REGISTRY[self.selector].keeps_all or self.retain == 1
        if self.kept(page_size) == self.window and not whole:
            raise ValueError(
                f"--kv-compress-retain {self.retain:g} of a window of {self.window} tokens keeps all "
                f"of it in pages of {page_size}; keep less, or use a larger --kv-compress-window"
            )
        shares = whole or self.may_share(self.kept(page_size))
        if self.prefix_reuse == "compressed" and not shares:
            raise ValueError(
                f"--kv-compress-retain {self.retain:g} keeps a single token of a window of "
                f"{self.window}, too few to tell windows apart with --kv-compress-prefix-reuse "
                "compressed; keep more"
            )

    def check_context(self, context_length: int, page_size: int) -> None:
        """Raise where no answer can get as long as a window and its delay, behind the shortest prompt.

        ``context_length`` is the model's, in tokens, prompt and answer together.
        """
        if page_size + self.window + self.delay >= context_length:
            raise ValueError(
                f"no answer fills a window of {self.window} tokens (--kv-compress-window) and its "
                f"delay of {self.delay} within the model's context of {context_length} "
                "(--context-length), so nothing would ever be compressed; use a smaller window"
            )

    def may_share(self, kept: int) -> bool:
        """Whether windows of which ``kept`` tokens stay may enter the prefix cache.

        A window is known there by one id per slot (``radix_integration/keys.py``). A single one carries
        60 bits, so whoever tries some 2^30 texts can find two that share it, and one would be served
        the other's KV. Two ids take 2^60.
        """
        return kept >= 2 or kept == self.window

    def kept(self, page_size: int, retain: float | None = None) -> int:
        """R in tokens for a share ``retain`` (the server's by default): whole pages, at least one."""
        pages = self.window // page_size
        share = self.retain if retain is None else retain
        return max(1, min(pages, math.floor(share * pages + 0.5))) * page_size

    def kept_by(self, selector: str, page_size: int, retain: float | None = None) -> int:
        """R of a request that ``selector`` compresses."""
        return self.window if REGISTRY[selector].keeps_all else self.kept(page_size, retain)


FLAGS = {
    "selector": "--kv-compress",
    "window": "--kv-compress-window",
    "retain": "--kv-compress-retain",
    "query_mem_gb": "--kv-compress-query-mem-gb",
    "prefix_reuse": "--kv-compress-prefix-reuse",
    "trace": "--kv-compress-trace",
}

CONFIG_KEYS: tuple[str, ...] = tuple(
    f.name for f in dataclasses.fields(KaraConfig) if f.name not in FLAGS
)
"""Keys of ``--kv-compress-config``: everything that has no flag of its own."""

_RANGES = (
    ("window", lambda v: 1 <= v <= 65536, "between 1 and 65536 tokens"),
    ("retain", lambda v: 0 < v <= 1, "a share with 0 < retain <= 1"),
    ("query_mem_gb", lambda v: v is None or 0 <= v <= 1e6, "between 0 and 1000000 (GiB)"),
    ("delay", lambda v: 0 <= v <= 65536, "between 0 and 65536 tokens"),
    ("neighbours", lambda v: 1 <= v <= 255 and v % 2, "an odd number of tokens, 1 to 255"),
    ("chunk_budget", lambda v: 0 <= v <= 1, "a share of the kept tokens between 0 and 1"),
    ("chunk_width", lambda v: 2 <= v <= 65536, "between 2 and 65536 tokens"),
    ("chunk_quantile", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ("last_queries", lambda v: 1 <= v <= 65536, "between 1 and 65536"),
    ("period", lambda v: 1 <= v <= 65536, "between 1 and 65536 decode steps"),
    ("threshold", lambda v: 0 <= v < 2**31, "between 0 and 2**31 - 1 tokens"),
    ("min_pool_usage", lambda v: 0 <= v <= 1, "a share between 0 and 1"),
    ("max_requests_per_pass", lambda v: 1 <= v <= 65536, "between 1 and 65536"),
    ("seed", lambda v: 0 <= v < 2**31, "between 0 and 2**31 - 1"),
    ("trace", lambda v: v is None or bool(v.strip()), "the name of a folder"),
)


def environment_settings() -> dict[str, Any] | None:
    """What :data:`ENV` asks for, unchecked; None where it is unset or ``none``."""
    text = os.environ.get(ENV, "").strip()
    settings = parse_object(text, ENV) if text.startswith("{") else {"selector": text or NONE}
    return None if settings.get("selector") == NONE else settings


def flag_of(field: str) -> str:
    """What a user typed for ``field``: its flag, or its key in the config object."""
    return FLAGS.get(field, f"--kv-compress-config: {field}")


def parse_object(text: str, source: str) -> dict[str, Any]:
    """A JSON object from ``text``; errors name ``source``."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not a JSON object ({error})") from None
    except (RecursionError, ValueError):  # nested too deep, or a number of thousands of digits
        raise ValueError(f"{source}: not a JSON object that can be read") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(value).__name__}")
    return value


def read_config_object(text_or_path: str) -> dict[str, Any]:
    """The value of ``--kv-compress-config``: a JSON object, or the path of a file that holds one."""
    if text_or_path.lstrip().startswith("{"):
        return parse_object(text_or_path, "--kv-compress-config")
    path = Path(text_or_path)
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:  # ValueError: no text, or no path
        raise ValueError(
            f"--kv-compress-config: {shown(text_or_path)} is neither a JSON object nor a readable file "
            f"({getattr(error, 'strerror', None) or error})"
        ) from None
    return parse_object(text, f"--kv-compress-config: file {text_or_path}")


def checked(name: str, value: Any, annotation: Any) -> Any:
    """``value`` if it has the annotated type (an int passes for a float), else ``ValueError``."""
    choices = [annotation]
    if typing.get_origin(annotation) not in (None, Literal):
        choices = list(typing.get_args(annotation))
    for choice in choices:
        if typing.get_origin(choice) is Literal:
            if value in typing.get_args(choice) and isinstance(value, str):
                return value
        elif choice is float and isinstance(value, int) and not isinstance(value, bool):
            if abs(value) < 2**53:
                return float(value)
        elif isinstance(value, choice) and not (choice is int and isinstance(value, bool)):
            return value
    raise ValueError(f"{name} must be {_describe(choices)}, got {shown(value)}")


def check_selector(name: str, value: Any) -> None:
    """Raise ``ValueError`` where ``value`` is no selector's name."""
    if not isinstance(value, str) or value not in REGISTRY:
        raise ValueError(f"{name} must be one of {', '.join(SELECTORS)}, got {shown(value)}")


def shown(value: Any) -> str:
    """``value`` as an error message quotes it, cut short."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _without_queries() -> str:
    return " or ".join(name for name, kind in REGISTRY.items() if not kind.needs_queries)


def _describe(choices: list[Any]) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
        str: "a string",
    }
    parts = []
    for choice in choices:
        if typing.get_origin(choice) is Literal:
            parts.append("one of " + ", ".join(typing.get_args(choice)))
        else:
            parts.append(words[choice])
    return " or ".join(parts)
