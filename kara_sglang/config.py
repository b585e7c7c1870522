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
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kara_sglang.checks import checked, parse_object, shown
from kara_sglang.kernels.record import FP4, FP8
from kara_sglang.kernels.selectors import REGISTRY, build

ENV = "SGLANG_KV_COMPRESS"
"""Settings as a selector's name or a JSON object; the launcher hands them to its children in it."""

NONE = "none"

AUTO_GAIN = 2048
"""N of ``prefix_reuse`` ``auto``: what is computed again is less than one chunk of a prefill, with the
smallest default that SGLang has (``arg_groups/memory_hook.py``)."""

_PREFIX_REUSE = r"exact|compressed|auto(:[1-9]\d{0,6})?"

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
        "policy": "periodic",
        "prefix_reuse": "exact",
    },
}


def setting(
    default: Any,
    unit: str,
    text: str,
    more: str = "",
    flag: str | None = None,
    absent: str = "",
    experiment: bool = False,
) -> Any:
    """A field of :class:`KaraConfig`; what is said of it here is all that is said of it anywhere.

    Parameters
    ----------
    default
    unit
        Or the kind of value, in a word or two.
    text
        Its meaning, in Markdown. The first sentence stands by itself.
    more
        Where ``docs/`` says more; links begin there.
    flag
        None: a key of ``--kv-compress-config``.
    absent
        What the default None stands for.
    experiment
        Whether it is for comparisons only.
    """
    about = {"unit": unit, "text": text, "more": more, "flag": flag, "absent": absent}
    return dataclasses.field(default=default, metadata=about | {"experiment": experiment})


@dataclass(frozen=True, slots=True)
class KaraConfig:
    """Settings of one server. What each means is said with it."""

    selector: str = setting(
        "kara",
        "name",
        "How tokens are chosen: `kara`; `keys` needs no recorded queries; `none` switches compression "
        "off.",
        more="All of them: [selectors](usage.md#selectors).",
        flag="--kv-compress",
    )
    window: int = setting(
        512,
        "tokens",
        "W, tokens that are compressed together, a multiple of the page size. A larger window is "
        "better for answers, needs a larger query ring, and leaves more tokens uncompressed at the "
        "end.",
        flag="--kv-compress-window",
    )
    retain: float = setting(
        0.5,
        "share",
        "R / W, the share of each window that is kept, 0 < share <= 1. R is rounded to whole pages, at "
        "least one. Less frees more memory at a higher risk to answers.",
        flag="--kv-compress-retain",
    )
    query_mem_gb: float | None = setting(
        None,
        "GiB per rank",
        "Memory for recorded queries. Windows of requests that find no room in it are chosen by "
        "`keys`. By default what requests need, at most 1/16 of the memory for KV; 2 on a CPU, "
        "0 if the selector needs no queries.",
        more="See [the query ring](#the-query-ring).",
        flag="--kv-compress-query-mem-gb",
        absent="as needed",
    )
    prefix_reuse: str | None = setting(
        None,
        "name",
        "What the prefix cache keeps of a compressed request: its prompt (`exact`), or its compressed "
        "output as well (`compressed`, `auto`). `auto` takes a compressed prefix only where it reaches "
        "2,048 tokens farther than exact KV, `auto:N` N tokens.",
        more="See [below](#compressed-prefixes).",
        flag="--kv-compress-prefix-reuse",
        absent="auto",
    )
    delay: int = setting(
        64,
        "tokens",
        "Newest tokens left uncompressed behind a window. With 0 a window is compressed as soon as it "
        "is full. No shorter than a model's longest sliding window: a smaller one is raised.",
    )
    delay_votes: bool = setting(
        False,
        "true / false",
        "Whether the delay's queries vote as the window's own do (`kara`, `causal`). No gain was "
        "measured.",
        experiment=True,
    )
    ahead: bool = setting(
        True,
        "true / false",
        "Whether queries vote as if they stood W positions later (`kara`, `causal`). With a rotary "
        "embedding that the plugin does not know, a server that records queries is refused until this "
        "is `false`.",
        more="See [architecture](architecture.md#scores-selection-compaction).",
    )
    score: Score = setting(
        "l2_v4_k",
        "name",
        "How attention becomes a score. `sum` (the paper's), `l2` (sum of squares), `sum_v`, `l2_v` "
        "(times the norm of V), `l2_v4` (its fourth power), `l2_v4_k` (and times the distance of the "
        "key from the window's mean key).",
        experiment=True,
    )
    neighbours: int = setting(
        13,
        "tokens",
        "A score is blended with those of this many tokens around, odd, 1 (off) to 255 (`kara`, "
        "`causal`, `keys`). Keeps names and numbers whole more often.",
    )
    chunk_budget: float = setting(
        0.0,
        "share of R",
        "alpha of Token2Chunk: what it may spend on filling gaps, 0 (off) to 1. No gain was measured.",
        experiment=True,
    )
    chunk_width: int = setting(
        8, "tokens", "gamma: the widest chunk, both ends included.", experiment=True
    )
    chunk_quantile: float = setting(
        0.8,
        "quantile",
        "Both ends of a chunk must score above this quantile of their window.",
        experiment=True,
    )
    last_queries: int = setting(
        32, "queries", "How many of the newest queries vote in `snapkv`.", experiment=True
    )
    granularity: Literal["head", "layer"] = setting(
        "head",
        "name",
        "`head`: each KV head keeps its own tokens. `layer`: the heads' scores are added up, and all "
        "heads of a layer (of a rank) keep the same.",
        experiment=True,
    )
    query_heads: Literal["auto", "all", "mean"] = setting(
        "auto",
        "name",
        "What is recorded: `all` query heads, the `mean` of each GQA group, or `auto`: all heads while "
        "the ring has room, else the mean.",
    )
    query_dtype: Literal["fp4", "fp8", "model"] = setting(
        "fp8",
        "name",
        "How queries are stored: `fp8` (e4m3), `fp4` (e2m1 with a scale for every 32 numbers, half the "
        "bytes) or `model` (the model's dtype, twice the bytes).",
    )
    policy: Literal["periodic", "threshold", "pressure", "punctual"] = setting(
        "pressure",
        "name",
        "Which window is compressed when; with `pressure` none below `min_pool_usage`.",
        more="See [below](#policies).",
    )
    period: int = setting(
        1, "decode steps", "From one pass to the next, for `periodic` and `pressure`."
    )
    max_requests_per_pass: int = setting(
        8,
        "windows",
        "Most windows in one pass, for `periodic` and `pressure`. Bounds how long a decode step is "
        "held up.",
    )
    threshold: int = setting(
        0,
        "KV slots",
        "The policy `threshold` compresses a request only while it holds so many slots.",
        experiment=True,
    )
    min_pool_usage: float = setting(
        0.8,
        "share",
        "`pressure` compresses nothing while less of the KV pool is needed uncompressed.",
    )
    retracted_mem_gb: float = setting(
        4.0,
        "GiB per rank",
        "Host memory for rows of requests that SGLang retracts, but for opted-out ones: they come back "
        "instead of being computed again. 0: none.",
    )
    seed: int = setting(0, "number", "Seeds `random`, together with the prompt.", experiment=True)
    trace: str | None = setting(
        None,
        "folder",
        "Write a file per request with the tokens that its windows kept. `python -m kara_sglang.trace "
        "show FILE` makes a page of it. Files hold prompts and answers and are never deleted.",
        more="See [traces](trace.md).",
        flag="--kv-compress-trace",
        absent="no files",
    )
    debug_checks: bool = setting(
        False, "true / false", "Check every pass on the device as well. Slow; for tests."
    )
    untested_sglang: bool = setting(
        False,
        "true / false",
        "Start with a newer SGLang than the tested ones if everything that is used is there.",
        more="See [versions](upgrading-sglang.md).",
    )

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
        if self.shares_prefixes and not self.told_by_its_text(self.selector):
            raise ValueError(
                f"--kv-compress-prefix-reuse {self.prefix_reuse} shares windows that the text up to "
                f"their end decides, and here the {self.delay} tokens behind vote as well "
                f"({self.selector}); use exact, another selector, or a delay of 0"
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

    @property
    def shares_prefixes(self) -> bool:
        """Whether compressed rows enter the prefix cache; not before it is settled."""
        return self.prefix_reuse not in (None, "exact")

    @property
    def least_gain(self) -> int:
        """Tokens that a compressed prefix must reach farther than exact KV to be taken."""
        mode, _, tokens = (self.prefix_reuse or "").partition(":")
        return int(tokens or AUTO_GAIN) if mode == "auto" else 1

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
        if self.shares_prefixes and not self.may_share(self.kept_by(self.selector, page_size)):
            raise ValueError(
                f"--kv-compress-retain {self.retain:g} keeps a single token of a window of "
                f"{self.window}, too few to tell windows apart with --kv-compress-prefix-reuse "
                f"{self.prefix_reuse}; keep more"
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

    def reaching(self, tokens: int) -> KaraConfig:
        """The same with a delay of at least ``tokens``: what a sliding window asks for."""
        return self if self.delay >= tokens else dataclasses.replace(self, delay=tokens)

    def told_by_its_text(self, selector: str) -> bool:
        """Whether the text up to a window's end decides what ``selector`` keeps of it."""
        return self.delay == 0 or not build(selector, self).looks_behind

    def may_share(self, kept: int) -> bool:
        """Whether windows of which ``kept`` tokens stay may enter the prefix cache.

        A window is known there by one id per slot (``radix_integration/keys.py``). A single one carries
        60 bits, so whoever tries some 2^30 texts can find two that share it, and one would be served
        the other's KV. Two ids take 2^60.
        """
        return kept >= 2 or kept == self.window

    def not_shared(self, page_size: int) -> list[str]:
        """Why windows made with these settings cannot be shared, each with the setting that decides."""
        reasons = []
        if not self.told_by_its_text(self.selector):
            reasons.append(
                f"--kv-compress {self.selector}, where the {self.delay} tokens behind a window vote as "
                "well"
            )
        if not self.may_share(self.kept_by(self.selector, page_size)):
            reasons.append(
                f"--kv-compress-retain {self.retain:g}, which keeps a single token of a window"
            )
        return reasons

    def kept(self, page_size: int, retain: float | None = None) -> int:
        """R in tokens for a share ``retain`` (the server's by default): whole pages, at least one."""
        pages = self.window // page_size
        share = self.retain if retain is None else retain
        return max(1, min(pages, math.floor(share * pages + 0.5))) * page_size

    def kept_by(self, selector: str, page_size: int, retain: float | None = None) -> int:
        """R of a request that ``selector`` compresses."""
        return self.window if REGISTRY[selector].keeps_all else self.kept(page_size, retain)


FLAGS: dict[str, str] = {
    f.name: f.metadata["flag"] for f in dataclasses.fields(KaraConfig) if f.metadata["flag"]
}
"""Flags, by the names of their settings."""

CONFIG_KEYS: tuple[str, ...] = tuple(
    f.name for f in dataclasses.fields(KaraConfig) if f.name not in FLAGS
)
"""Keys of ``--kv-compress-config``: everything that has no flag of its own."""

_RANGES = (
    ("window", lambda v: 1 <= v <= 65536, "between 1 and 65536 tokens"),
    ("retain", lambda v: 0 < v <= 1, "a share with 0 < retain <= 1"),
    ("query_mem_gb", lambda v: v is None or 0 <= v <= 1e6, "between 0 and 1000000 (GiB)"),
    (
        "prefix_reuse",
        lambda v: v is None or re.fullmatch(_PREFIX_REUSE, v),
        "exact, compressed, auto, or auto:N with N tokens",
    ),
    ("delay", lambda v: 0 <= v <= 65536, "between 0 and 65536 tokens"),
    ("neighbours", lambda v: 1 <= v <= 255 and v % 2, "an odd number of tokens, 1 to 255"),
    ("chunk_budget", lambda v: 0 <= v <= 1, "a share of the kept tokens between 0 and 1"),
    ("chunk_width", lambda v: 2 <= v <= 65536, "between 2 and 65536 tokens"),
    ("chunk_quantile", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ("last_queries", lambda v: 1 <= v <= 65536, "between 1 and 65536"),
    ("period", lambda v: 1 <= v <= 65536, "between 1 and 65536 decode steps"),
    ("threshold", lambda v: 0 <= v < 2**31, "between 0 and 2**31 - 1 tokens"),
    ("retracted_mem_gb", lambda v: 0 <= v <= 1e6, "between 0 and 1000000 (GiB)"),
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


def check_selector(name: str, value: Any, *others: str) -> None:
    """Raise ``ValueError`` where ``value`` is no selector's name; ``others`` would do as well."""
    if not isinstance(value, str) or value not in REGISTRY:
        raise ValueError(
            f"{name} must be one of {', '.join((*SELECTORS, *others))}, got {shown(value)}"
        )


def _without_queries() -> str:
    return " or ".join(name for name, kind in REGISTRY.items() if not kind.needs_queries)
