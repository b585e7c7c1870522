"""Per-request options: what ``custom_params["kv_compress"]`` may say."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kara_sglang.config import SELECTORS, KaraConfig
from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.options import KEY, RequestOptions

CONFIG = KaraConfig()

NO_QUERIES = KaraConfig(selector="recent")


def parse(value: Any, config: KaraConfig = CONFIG) -> RequestOptions:
    return RequestOptions.parse({KEY: value}, config)


@pytest.mark.parametrize("params", [None, {}, {"other": 1}, {KEY: None}, "text", ["kv_compress"], 7])
def test_without_options_the_server_decides(params: Any) -> None:
    """Other users of custom_params, and none at all."""
    assert RequestOptions.parse(params, CONFIG) == RequestOptions()


@pytest.mark.parametrize(
    "value,expected",
    [
        (True, RequestOptions()),
        (False, RequestOptions(enabled=False)),
        ({}, RequestOptions()),
        ({"retain": 0.3}, RequestOptions(retain=0.3)),
        ({"retain": 1}, RequestOptions(retain=1.0)),
        ({"selector": "recent", "seed": 5}, RequestOptions(selector="recent", seed=5)),
        ({"seed": 0, "retain": 1e-9}, RequestOptions(seed=0, retain=1e-9)),
        ({"seed": 2**31 - 1}, RequestOptions(seed=2**31 - 1)),
    ],
)
def test_good_options(value: Any, expected: RequestOptions) -> None:
    """Flags, an empty object and every field."""
    assert parse(value) == expected


@pytest.mark.parametrize(
    "value,message",
    [
        (0, "kv_compress must be true, false or an object with selector, retain, seed, prefix, got 0"),
        ("off", "kv_compress must be true, false or an object"),
        ([], "kv_compress must be true, false or an object"),
        ([{"retain": 0.5}], "kv_compress must be true, false or an object"),
        ({"window": 64}, "kv_compress.window is unknown; the fields are selector, retain, seed"),
        ({"Retain": 0.5}, "kv_compress.Retain is unknown"),
        ({"retain": 0.5, "": 1}, "kv_compress. is unknown"),
        ({"enabled": False}, "kv_compress.enabled is unknown"),
        ({"retain": 0}, "kv_compress.retain must be a share with 0 < retain <= 1, got 0"),
        ({"retain": 1.5}, "kv_compress.retain must be a share"),
        ({"retain": -1}, "kv_compress.retain must be a share"),
        ({"retain": math.nan}, "kv_compress.retain must be a share"),
        ({"retain": math.inf}, "kv_compress.retain must be a share"),
        ({"retain": "0.5"}, "kv_compress.retain must be a number, got '0.5'"),
        ({"retain": True}, "kv_compress.retain must be a number"),
        ({"retain": None}, "kv_compress.retain must be a number"),
        ({"retain": [0.5]}, "kv_compress.retain must be a number"),
        ({"retain": 10**400}, "kv_compress.retain must be"),
        ({"retain": -(10**400)}, "kv_compress.retain must be"),
        ({"selector": "none"}, "kv_compress.selector must be one of kara, causal"),
        ({"selector": "KARA"}, "kv_compress.selector must be one of"),
        ({"selector": 3}, "kv_compress.selector must be one of"),
        ({"selector": {"kara": 1}}, "kv_compress.selector must be one of"),
        ({"seed": -1}, "kv_compress.seed must be between 0 and 2**31 - 1"),
        ({"seed": 2**31}, "kv_compress.seed must be between"),
        ({"seed": 10**400}, "kv_compress.seed must be between"),
        ({"seed": 1.0}, "kv_compress.seed must be a whole number"),
        ({"seed": False}, "kv_compress.seed must be a whole number"),
        ({"prefix": "none"}, "kv_compress.prefix must be one of exact, compressed"),
        ({"prefix": True}, "kv_compress.prefix must be one of exact, compressed"),
        ({"prefix": "compressed"}, "needs a server that shares compressed prefixes"),
    ],
)
def test_bad_options_name_the_field(value: Any, message: str) -> None:
    """One line each: it becomes the body of an HTTP 400."""
    with pytest.raises(ValueError) as caught:
        parse(value)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert type(caught.value) is ValueError


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)

objects = st.dictionaries(
    st.sampled_from(["selector", "retain", "seed"]), json_values | st.sampled_from(SELECTORS)
)


@settings(max_examples=300)
@given(json_values | objects, st.sampled_from([CONFIG, NO_QUERIES]))
def test_anything_that_json_can_say(value: Any, config: KaraConfig) -> None:
    """Options that can be carried out, or a ``ValueError``; nothing else reaches the scheduler."""
    try:
        options = parse(value, config)
    except ValueError as error:
        assert str(error).startswith(KEY)
        return
    assert options.retain is None or 1 <= config.kept(16, options.retain) <= config.window
    assert options.seed is None or 0 <= options.seed < 2**31
    assert options.selector is None or options.selector in SELECTORS


@pytest.mark.parametrize("selector", SELECTORS)
def test_selectors_that_the_server_cannot_serve(selector: str) -> None:
    """A server without a ring keeps no queries; a server with one serves every selector."""
    assert parse({"selector": selector}).selector == selector
    with_ring = KaraConfig(selector="recent", query_mem_gb=0.1)
    assert parse({"selector": selector}, with_ring).selector == selector
    if REGISTRY[selector].needs_queries:
        with pytest.raises(ValueError) as caught:
            parse({"selector": selector}, NO_QUERIES)
        text = str(caught.value)
        assert "kv_compress.selector" in text and "--kv-compress-query-mem-gb" in text
        others = [name for name, one in REGISTRY.items() if not one.needs_queries]
        assert f"choose {' or '.join(others)}" in text
    else:
        assert parse({"selector": selector}, NO_QUERIES).selector == selector


def test_long_values_are_cut_short() -> None:
    """An error message is no place for a request's whole body."""
    for value in ("x" * 10_000, {"x" * 10_000: 1}, {"selector": "y" * 10_000}, {"seed": 10**5000}):
        with pytest.raises(ValueError) as caught:
            parse(value)
        assert len(str(caught.value)) < 500
