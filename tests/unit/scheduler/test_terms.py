"""What a request gets is read once, and stays through a retraction."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kara_sglang.config import KaraConfig
from kara_sglang.scheduler.terms import TERMS, TermsOf

PAGE = 16


def req(options: Any = None, **more: Any) -> SimpleNamespace:
    params = SimpleNamespace(custom_params=None if options is None else {"kv_compress": options})
    kind = {"beam_group": None, "multimodal_inputs": None}
    return SimpleNamespace(rid="one", sampling_params=params, **kind | more)


def terms_of(options: Any = None, reuse: str = "compressed", **more: Any) -> Any:
    return TermsOf(KaraConfig(window=64, prefix_reuse=reuse), PAGE)(req(options, **more))


@pytest.mark.parametrize(
    ("options", "more", "reason"),
    [
        (None, {}, None),
        (True, {}, None),
        (False, {}, "opt_out"),
        (None, {"beam_group": object()}, "beam"),
        (None, {"multimodal_inputs": object()}, "multimodal"),
        ({"selector": "no such"}, {}, "opt_out"),  # it ends with its first token
    ],
)
def test_who_is_never_compressed_shares_nothing(options: Any, more: dict, reason: str | None) -> None:
    terms = terms_of(options, **more)
    assert terms.skipped == reason
    assert (terms.sharing is None) is (reason is not None)


def test_what_nobody_has_checked_is_told() -> None:
    """In the words of the launcher."""
    terms = TermsOf(KaraConfig(window=64), PAGE)
    assert terms.problem(req()) is terms.problem(req({"retain": 0.25})) is None
    assert "kv_compress.retain must be a share" in terms.problem(req({"retain": 7}))


def test_what_a_request_may_change() -> None:
    assert (terms_of().selector, terms_of().kept, terms_of().seed) == ("kara", 32, None)
    asked = terms_of({"selector": "random", "retain": 0.25, "seed": 5})
    assert (asked.selector, asked.kept, asked.seed) == ("random", 16, 5)
    assert terms_of({"selector": "identity"}).kept == 64


def test_who_shares_with_whom() -> None:
    """The same selector and R; a seed where it matters; not who asks for exact prefixes."""
    same = terms_of().sharing.settings
    assert terms_of({"retain": 0.5}).sharing.settings == same
    assert terms_of({"seed": 3}).sharing.settings == same
    for other in ({"retain": 0.25}, {"selector": "keys"}):
        assert terms_of(other).sharing.settings != same
    seeded = [terms_of({"selector": "random", "seed": n}).sharing.settings for n in (3, 4)]
    assert seeded[0] != seeded[1]
    assert terms_of({"prefix": "exact"}).sharing is terms_of(reuse="exact").sharing is None


def test_windows_that_tokens_behind_them_decide_are_not_shared() -> None:
    """The newest queries vote in `snapkv`: the delay's, of which the window's name says nothing."""
    assert terms_of({"selector": "snapkv"}).sharing is None
    without = TermsOf(KaraConfig(window=64, delay=0, prefix_reuse="compressed"), PAGE)
    assert without(req({"selector": "snapkv"})).sharing is not None
    voting = {"selector": "kara", "delay_votes": True, "prefix_reuse": "auto"}
    for settings in (voting, {"selector": "snapkv", "prefix_reuse": "compressed"}):
        with pytest.raises(ValueError, match="the 64 tokens behind vote as well"):
            KaraConfig(**settings)
        KaraConfig(**settings | {"delay": 0})


def test_how_far_a_compressed_prefix_must_reach() -> None:
    assert terms_of().sharing.least == 1
    assert terms_of(reuse="auto:300").sharing.least == 300
    assert terms_of({"prefix": "compressed"}, reuse="auto:300").sharing.least == 1


def test_they_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the match, at each step that a request waits, and at its first decode step."""
    read, one = TermsOf(KaraConfig(window=64), PAGE), req()
    first = read(one)
    monkeypatch.setattr(TermsOf, "_read", None)
    assert read(one) is first and getattr(one, TERMS) is first
