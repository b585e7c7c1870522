"""Flags that not every tested version has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kara_sglang.compat.flags import NEWER_FLAGS, Flags


@pytest.mark.parametrize("name", sorted(NEWER_FLAGS))
def test_a_newer_flag_is_none_where_sglang_lacks_it(name: str) -> None:
    assert getattr(Flags(SimpleNamespace()), name) is None
    assert getattr(Flags(SimpleNamespace(**{name: True})), name) is True


def test_any_other_flag_must_be_there() -> None:
    flags = Flags(SimpleNamespace(tp_size=2))
    assert flags.tp_size == 2
    with pytest.raises(AttributeError, match="pp_size"):
        _ = flags.pp_size
