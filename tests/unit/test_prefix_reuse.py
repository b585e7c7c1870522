"""What a server reuses whose settings leave it open, and what is said of it."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from kara_sglang import prefix_reuse
from kara_sglang.config import KaraConfig

PAGE = {"page_size": 16}
MODEL = SimpleNamespace(is_hybrid_swa=False)


@pytest.mark.parametrize(
    ("settings", "flags", "because"),
    [
        ({}, {}, None),
        ({"selector": "snapkv", "delay": 0}, {}, None),
        ({"selector": "identity", "retain": 0.01}, {"page_size": 1}, None),
        ({}, {"enable_hierarchical_cache": True}, None),
        ({}, {"disable_radix_cache": True}, "--disable-radix-cache"),
        ({}, {"kv_events_config": "{}"}, "--kv-events-config"),
        ({}, {"speculative_algorithm": "NGRAM"}, None),
        ({}, {"speculative_algorithm": "EAGLE"}, "--speculative-algorithm (other than NGRAM)"),
        (
            {"selector": "snapkv"},
            {},
            "--kv-compress snapkv, where the 64 tokens behind a window vote as well",
        ),
        (
            {"delay_votes": True},
            {},
            "--kv-compress kara, where the 64 tokens behind a window vote as well",
        ),
        (
            {"window": 32, "retain": 0.01},
            {"page_size": 1},
            "--kv-compress-retain 0.01, which keeps a single token of a window",
        ),
    ],
)
def test_the_default_is_auto_where_that_works(
    settings: dict[str, Any], flags: dict[str, Any], because: str | None, resolved: Any
) -> None:
    """And a sentence says why not. What is asked for by name is left as it is."""
    view = resolved(**PAGE | flags)
    config = prefix_reuse.settled(KaraConfig(**settings), view, MODEL)
    said = prefix_reuse.in_words(config, view, MODEL)
    if because is None:
        assert config == KaraConfig(**settings, prefix_reuse="auto")
        assert said == (
            "prefix reuse auto: a compressed prefix is taken where it reaches 2,048 tokens farther "
            "than exact KV"
        )
    else:
        assert config == KaraConfig(**settings, prefix_reuse="exact")
        assert said == f"prefix reuse exact: compressed prefixes do not work with {because}"
    for named in ("exact", "auto:64", "compressed") if not settings else ("exact",):
        config = KaraConfig(**settings, prefix_reuse=named)
        assert prefix_reuse.settled(config, view, MODEL) is config


def test_several_reasons_are_one_sentence(resolved: Any) -> None:
    view = resolved(**PAGE, disable_radix_cache=True, kv_events_config="{}")
    said = prefix_reuse.in_words(KaraConfig(prefix_reuse="exact"), view, MODEL)
    assert said.endswith("with --disable-radix-cache and --kv-events-config")
    view = resolved(**PAGE)
    compressed = prefix_reuse.in_words(KaraConfig(prefix_reuse="compressed"), view, MODEL)
    assert compressed.endswith("a compressed prefix is taken where it reaches farther than exact KV")
    exact = prefix_reuse.in_words(KaraConfig(prefix_reuse="exact"), view, MODEL)
    assert exact == "prefix reuse exact"


def test_a_model_may_be_a_reason(resolved: Any) -> None:
    model = SimpleNamespace(is_hybrid_swa=True)
    config = prefix_reuse.settled(KaraConfig(), resolved(**PAGE), model)
    assert config == KaraConfig(prefix_reuse="exact")
    said = prefix_reuse.in_words(config, resolved(**PAGE), model)
    assert said.endswith("do not work with a KV pool of sliding-window layers")


def test_flags_are_sglangs() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    assert {flag.split()[0] for flag, _ in prefix_reuse.FLAGS} <= known
