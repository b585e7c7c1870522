"""``frontend.options``: what a program author writes is what the server accepts."""

from __future__ import annotations

import pytest

from kara_sglang.config import KaraConfig
from kara_sglang.frontend.options import custom_params
from kara_sglang.options import RequestOptions


def test_what_is_built_is_what_the_server_reads() -> None:
    assert custom_params(False) == {"kv_compress": False}
    built = custom_params(selector="recent", retain=0.3, seed=5)
    parsed = RequestOptions.parse(built, KaraConfig())
    assert parsed == RequestOptions(True, "recent", 0.3, 5)
    shared = RequestOptions.parse(
        custom_params(prefix="compressed"), KaraConfig(prefix_reuse="compressed")
    )
    assert shared == RequestOptions(prefix="compressed")
    assert RequestOptions.parse(custom_params(), KaraConfig()) == RequestOptions()


def test_errors_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"kv_compress\.retain"):
        custom_params(retain=1.5)
    with pytest.raises(ValueError, match=r"kv_compress\.prefix"):
        custom_params(prefix="shared")
    with pytest.raises(ValueError, match=r"kv_compress\.selector"):
        custom_params(selector="best")
