"""The settings' record: presets, ranges, types, rounding to pages, and its way through JSON."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kara_sglang import config as module
from kara_sglang.config import CONFIG_KEYS, FLAGS, PRESETS, SELECTORS, KaraConfig
from kara_sglang.kernels.selectors import REGISTRY


def test_defaults_are_the_documented_ones() -> None:
    """Window 512, half kept, delay 64, fp8; score and alpha are what docs/quality.md found."""
    assert dataclasses.asdict(KaraConfig()) == {
        "selector": "kara",
        "window": 512,
        "retain": 0.5,
        "query_mem_gb": None,
        "prefix_reuse": None,
        "delay": 64,
        "delay_votes": False,
        "ahead": True,
        "score": "l2_v4_k",
        "neighbours": 13,
        "chunk_budget": 0.0,
        "chunk_width": 8,
        "chunk_quantile": 0.8,
        "last_queries": 32,
        "granularity": "head",
        "query_heads": "auto",
        "query_dtype": "fp8",
        "policy": "pressure",
        "period": 1,
        "max_requests_per_pass": 8,
        "threshold": 0,
        "min_pool_usage": 0.8,
        "retracted_mem_gb": 4.0,
        "seed": 0,
        "trace": None,
        "debug_checks": False,
        "untested_sglang": False,
    }
    assert (
        KaraConfig.from_settings({}) == KaraConfig.from_settings({"preset": "default"}) == KaraConfig()
    )


def test_every_field_is_a_flag_or_a_key() -> None:
    """Nothing can be set that --help does not name, and nothing twice."""
    fields = [field.name for field in dataclasses.fields(KaraConfig)]
    assert sorted([*FLAGS, *CONFIG_KEYS]) == sorted(fields)
    for field in dataclasses.fields(KaraConfig):
        assert field.metadata["unit"] and field.metadata["text"].endswith("."), field.name


def test_the_paper_preset_and_what_goes_over_it() -> None:
    """The paper's plain sum of all heads without delay, always; single settings win over a preset."""
    paper = KaraConfig.from_settings({"preset": "paper"})
    changed = {
        "score": "sum",
        "neighbours": 1,
        "chunk_budget": 0.1,
        "ahead": False,
        "delay": 0,
        "query_heads": "all",
        "query_dtype": "model",
        "policy": "periodic",
        "prefix_reuse": "exact",
    }
    assert dataclasses.asdict(paper) == dataclasses.asdict(KaraConfig()) | changed
    assert paper.chunk_budget > 0
    mixed = KaraConfig.from_settings({"delay": 7, "preset": "paper", "selector": "causal"})
    assert (mixed.delay, mixed.score, mixed.selector) == (7, "sum", "causal")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_left_alone(preset: str) -> None:
    """Reading settings must not write into the table of presets or into the caller's dictionary."""
    table = {name: dict(values) for name, values in PRESETS.items()}
    given_settings = {"preset": preset, "delay": 3, "retain": 1}
    KaraConfig.from_settings(given_settings)
    assert table == PRESETS and given_settings == {"preset": preset, "delay": 3, "retain": 1}


WRONG_TYPE: list[tuple[str, Any, str]] = [
    ("selector", 1, "--kv-compress must be one of"),
    ("selector", "none", f"one of {', '.join(SELECTORS)}"),
    ("selector", "Kara", "--kv-compress must be one of"),
    ("selector", ["kara"], "--kv-compress must be one of"),
    ("selector", None, "--kv-compress must be one of"),
    ("window", 64.0, "--kv-compress-window must be a whole number"),
    ("window", "64", "--kv-compress-window must be a whole number"),
    ("window", True, "--kv-compress-window must be a whole number"),
    ("window", None, "--kv-compress-window must be a whole number"),
    ("retain", "0.5", "--kv-compress-retain must be a number"),
    ("retain", True, "--kv-compress-retain must be a number"),
    ("retain", None, "--kv-compress-retain must be a number"),
    ("query_mem_gb", "2", "--kv-compress-query-mem-gb must be a number or null"),
    ("query_mem_gb", False, "--kv-compress-query-mem-gb must be a number or null"),
    ("prefix_reuse", True, "--kv-compress-prefix-reuse must be a string"),
    ("delay", 1.5, "--kv-compress-config: delay must be a whole number"),
    ("score", "l3", "--kv-compress-config: score must be one of sum, sum_v, l2, l2_v, l2_v4, l2_v4_k"),
    ("neighbours", 13.0, "--kv-compress-config: neighbours must be a whole number"),
    ("chunk_budget", [0.1], "--kv-compress-config: chunk_budget must be a number"),
    ("chunk_width", 8.0, "--kv-compress-config: chunk_width must be a whole number"),
    ("chunk_quantile", {}, "--kv-compress-config: chunk_quantile must be a number"),
    ("last_queries", "all", "--kv-compress-config: last_queries must be a whole number"),
    ("granularity", "token", "--kv-compress-config: granularity must be one of head, layer"),
    ("query_heads", "some", "--kv-compress-config: query_heads must be one of auto, all, mean"),
    ("query_dtype", "int4", "--kv-compress-config: query_dtype must be one of fp4, fp8, model"),
    (
        "policy",
        "none",
        "--kv-compress-config: policy must be one of periodic, threshold, pressure, punctual",
    ),
    ("threshold", 1.0, "--kv-compress-config: threshold must be a whole number"),
    ("retracted_mem_gb", "4 GiB", "--kv-compress-config: retracted_mem_gb must be a number"),
    ("min_pool_usage", "80%", "--kv-compress-config: min_pool_usage must be a number"),
    ("period", 0.5, "--kv-compress-config: period must be a whole number"),
    ("max_requests_per_pass", None, "max_requests_per_pass must be a whole number"),
    ("seed", 1.0, "--kv-compress-config: seed must be a whole number"),
    ("trace", 1, "--kv-compress-trace must be a string or null"),
    ("delay_votes", 1, "--kv-compress-config: delay_votes must be true or false"),
    ("ahead", 1, "--kv-compress-config: ahead must be true or false"),
    ("debug_checks", 1, "--kv-compress-config: debug_checks must be true or false"),
    ("debug_checks", "true", "--kv-compress-config: debug_checks must be true or false"),
    ("untested_sglang", "yes", "--kv-compress-config: untested_sglang must be true or false"),
]

OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("window", 0, "between 1 and 65536 tokens"),
    ("window", -512, "between 1 and 65536 tokens"),
    ("window", 65537, "between 1 and 65536 tokens"),
    ("retain", 0, "0 < retain <= 1"),
    ("retain", -0.1, "0 < retain <= 1"),
    ("retain", 1.0000001, "0 < retain <= 1"),
    ("retain", math.nan, "0 < retain <= 1"),
    ("retain", math.inf, "0 < retain <= 1"),
    ("query_mem_gb", -0.5, "between 0 and 1000000 (GiB)"),
    ("query_mem_gb", 1e7, "between 0 and 1000000 (GiB)"),
    ("prefix_reuse", "all", "exact, compressed, auto, or auto:N with N tokens"),
    ("prefix_reuse", "auto:0", "exact, compressed, auto, or auto:N"),
    ("prefix_reuse", "auto:-1", "exact, compressed, auto, or auto:N"),
    ("prefix_reuse", "auto:12345678", "exact, compressed, auto, or auto:N"),
    ("prefix_reuse", "exact:5", "exact, compressed, auto, or auto:N"),
    ("delay", -1, "between 0 and 65536 tokens"),
    ("delay", 65537, "between 0 and 65536 tokens"),
    ("chunk_budget", -0.01, "between 0 and 1"),
    ("chunk_budget", 1.01, "between 0 and 1"),
    ("chunk_budget", math.nan, "between 0 and 1"),
    ("neighbours", 0, "an odd number of tokens, 1 to 255"),
    ("neighbours", 8, "an odd number of tokens, 1 to 255"),
    ("neighbours", 257, "an odd number of tokens, 1 to 255"),
    ("chunk_width", 1, "between 2 and 65536 tokens"),
    ("chunk_quantile", -0.01, "between 0 and 1"),
    ("chunk_quantile", 1.01, "between 0 and 1"),
    ("chunk_quantile", math.nan, "between 0 and 1"),
    ("last_queries", 0, "between 1 and 65536"),
    ("period", 0, "between 1 and 65536 decode steps"),
    ("period", 65537, "between 1 and 65536 decode steps"),
    ("threshold", -1, "between 0 and 2**31 - 1 tokens"),
    ("retracted_mem_gb", -1, "between 0 and 1000000 (GiB)"),
    ("retracted_mem_gb", 1e7, "between 0 and 1000000 (GiB)"),
    ("min_pool_usage", -0.1, "a share between 0 and 1"),
    ("min_pool_usage", 1.1, "a share between 0 and 1"),
    ("min_pool_usage", math.nan, "a share between 0 and 1"),
    ("max_requests_per_pass", 0, "between 1 and 65536"),
    ("seed", -1, "between 0 and 2**31 - 1"),
    ("seed", 2**31, "between 0 and 2**31 - 1"),
    ("trace", " ", "the name of a folder"),
]


def refusal(changes: dict[str, Any]) -> str:
    """The one line that a ``ValueError`` says."""
    with pytest.raises(ValueError) as caught:
        KaraConfig.from_settings(changes)
    text = str(caught.value)
    assert "\n" not in text and type(caught.value) is ValueError
    return text


@pytest.mark.parametrize("field,value,message", WRONG_TYPE)
def test_wrong_types(field: str, value: Any, message: str) -> None:
    """Types are exact, but a whole number passes for a number; the line shows what was given."""
    text = refusal({field: value})
    assert message in text and text.endswith(f"got {value!r}")


@pytest.mark.parametrize("field,value,message", OUT_OF_RANGE)
def test_out_of_range(field: str, value: Any, message: str) -> None:
    """The line names the flag or key as a user typed it, the range and the value."""
    text = refusal({field: value})
    assert text.startswith(module.flag_of(field)) and message in text and "got" in text
    # The record itself refuses as well, however it is made.
    with pytest.raises(ValueError, match="must be"):
        KaraConfig(**{field: value})


def test_what_auto_takes() -> None:
    for text, shares, least in (
        *(("exact", False, 1), ("compressed", True, 1)),
        (None, False, 1),
        *(("auto", True, module.AUTO_GAIN), ("auto:1", True, 1), ("auto:300", True, 300)),
    ):
        config = KaraConfig(prefix_reuse=text)
        assert (config.shares_prefixes, config.least_gain) == (shares, least)


def test_every_range_has_a_test() -> None:
    """And so has every field's type."""
    assert {name for name, _, _ in OUT_OF_RANGE} == {name for name, _, _ in module._RANGES}
    assert {name for name, _, _ in WRONG_TYPE} == {f.name for f in dataclasses.fields(KaraConfig)}


def test_long_values_are_cut_short() -> None:
    """One line stays one that can be read."""
    for changes in (
        {"score": "x" * 10_000},
        {"x" * 10_000: 1},
        {"preset": ["y"] * 5000},
        {"selector": "z" * 10_000},
        {"window": 10**5000},
        {"seed": -(10**5000)},
    ):
        assert len(refusal(changes)) < 500


@pytest.mark.parametrize("preset", ["papers", "", None, 1, ["paper"], {"paper": 1}])
def test_bad_presets(preset: Any) -> None:
    """Also one that cannot be looked up in a dictionary."""
    text = refusal({"preset": preset})
    assert "--kv-compress-config: preset must be one of default, paper" in text


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
@pytest.mark.parametrize("selector", ["kara", "recent"])
def test_query_memory_is_a_finite_number(value: float, selector: str) -> None:
    """JSON and argparse both read Infinity and NaN as numbers."""
    text = refusal({"selector": selector, "query_mem_gb": value})
    assert text.startswith("--kv-compress-query-mem-gb must be")


@pytest.mark.parametrize(
    "field", ["retain", "query_mem_gb", "chunk_budget", "chunk_quantile", "min_pool_usage"]
)
def test_whole_numbers_beyond_any_float(field: str) -> None:
    """JSON knows no largest number."""
    text = refusal({field: 10**400})
    assert text.startswith(module.flag_of(field))


def test_unknown_keys_list_the_known_ones() -> None:
    """Near misses included."""
    for key in ("Window", "kv_compress", "chunk-budget", ""):
        text = refusal({key: 1})
        assert f"unknown key {key!r}" in text
        assert all(known in text for known in ("preset", *CONFIG_KEYS))


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_selector_that_needs_queries_needs_memory(selector: str) -> None:
    """Said in terms of the flags, with a way out."""
    if REGISTRY[selector].needs_queries:
        text = refusal({"selector": selector, "query_mem_gb": 0})
        assert (
            "--kv-compress-query-mem-gb 0 leaves no room" in text
            and f"choose {' or '.join(s for s in SELECTORS if not REGISTRY[s].needs_queries)}" in text
        )
        assert KaraConfig(selector=selector).keeps_queries
    else:
        assert not KaraConfig(selector=selector, query_mem_gb=0).keeps_queries
        assert not KaraConfig(selector=selector).keeps_queries
    assert KaraConfig(selector=selector, query_mem_gb=1.5).keeps_queries


def test_limits_themselves_are_allowed() -> None:
    """Both ends of every range."""
    for field, values in {
        "window": (1, 65536),
        "retain": (1e-9, 1.0),
        "delay": (0, 65536),
        "chunk_budget": (0.0, 1.0),
        "neighbours": (1, 255),
        "chunk_width": (2, 65536),
        "chunk_quantile": (0.0, 1.0),
        "last_queries": (1, 65536),
        "period": (1, 65536),
        "threshold": (0, 2**31 - 1),
        "min_pool_usage": (0.0, 1.0),
        "retracted_mem_gb": (0, 1_000_000),
        "seed": (0, 2**31 - 1),
        "max_requests_per_pass": (1, 65536),
        "query_mem_gb": (1e-9, 1_000_000),
    }.items():
        for value in values:
            assert getattr(KaraConfig.from_settings({field: value}), field) == value


@settings(max_examples=300)
@given(st.integers(1, 64), st.integers(1, 128), st.fractions(0, 1))
def test_kept_is_whole_pages_nearest_to_the_share(page: int, pages: int, share: Fraction) -> None:
    """At least one page, at most all, and no other number of pages is nearer."""
    assume(share > 0 and page * pages <= 65536)
    config = KaraConfig(window=page * pages)
    kept = config.kept(page, float(share))
    assert kept % page == 0 and page <= kept <= config.window
    wanted = float(share) * pages
    nearest = min(abs(count - wanted) for count in range(1, pages + 1))
    assert abs(kept // page - wanted) <= nearest + 1e-9


def test_kept_uses_the_servers_share_by_default() -> None:
    """And a request's where it has one."""
    config = KaraConfig(window=512, retain=0.25)
    assert config.kept(16) == 128 and config.kept(16, 0.5) == 256 and config.kept(64, 0.01) == 64


@pytest.mark.parametrize(
    "window,page,near",
    [(100, 16, "96 or 112"), (8, 16, "use 16"), (65, 64, "64 or 128"), (513, 512, "512 or 1024")],
)
def test_a_window_that_is_no_page_multiple(window: int, page: int, near: str) -> None:
    """The line names both flags and the nearest windows that fit."""
    with pytest.raises(ValueError) as caught:
        KaraConfig(window=window).check_page_size(page)
    text = str(caught.value)
    assert f"--kv-compress-window {window}" in text and "--page-size" in text and near in text
    KaraConfig(window=window).check_page_size(1)
    KaraConfig(window=4 * page).check_page_size(page)


@pytest.mark.parametrize(
    "window,retain,page", [(64, 0.5, 64), (64, 0.9, 32), (512, 0.99, 64), (1, 0.5, 1)]
)
def test_a_share_that_keeps_all_in_whole_pages(window: int, retain: float, page: int) -> None:
    """A server that compresses and frees nothing was not meant; R = W on purpose is fine."""
    with pytest.raises(ValueError) as caught:
        KaraConfig(window=window, retain=retain).check_page_size(page)
    text = str(caught.value)
    assert text.startswith("--kv-compress-retain") and "--kv-compress-window" in text
    KaraConfig(window=window, retain=1.0).check_page_size(page)
    KaraConfig(selector="identity", window=window, retain=retain).check_page_size(page)


@pytest.mark.parametrize("page", [1, 16])
def test_a_window_that_no_answer_fills_is_refused(page: int) -> None:
    """A page of prompt, a window and its delay must fit the model's context, and leave a token over."""
    config = KaraConfig(window=512, delay=64)
    config.check_context(512 + 64 + page + 1, page)
    for context in (512 + 64 + page, 512):
        with pytest.raises(ValueError, match="no answer fills a window of 512") as caught:
            config.check_context(context, page)
        text = str(caught.value)
        assert f"context of {context}" in text and "--kv-compress-window" in text and "\n" not in text


@pytest.mark.parametrize("selector", ["kara", "recent"])
def test_punctual_answers_need_one_kind_of_recorder(selector: str) -> None:
    """Where anybody may record queries, ring room must not decide what an answer says."""
    for heads in ("all", "mean"):
        KaraConfig(selector, policy="punctual", query_heads=heads)
    KaraConfig("recent", policy="punctual")
    with pytest.raises(ValueError, match='policy "punctual"') as caught:
        KaraConfig(selector, policy="punctual", query_mem_gb=1)
    assert 'set query_heads to "all" or "mean"' in str(caught.value)


def test_windows_of_one_slot_cannot_be_shared() -> None:
    """A single id is too short a name for a window; nothing shorter than a page is ever kept."""
    config = KaraConfig(window=32, retain=0.01, prefix_reuse="compressed")
    with pytest.raises(ValueError, match=r"^--kv-compress-retain 0\.01 keeps a single token") as caught:
        config.check_page_size(1)
    assert "--kv-compress-prefix-reuse compressed" in str(caught.value)
    config.check_page_size(2)
    KaraConfig(window=32, retain=0.01).check_page_size(1)
    KaraConfig(window=32, retain=0.05, prefix_reuse="compressed").check_page_size(1)
    KaraConfig(selector="identity", window=32, retain=0.01, prefix_reuse="compressed").check_page_size(
        1
    )
