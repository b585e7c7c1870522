"""Flags that not every tested version has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kara_sglang.compat.flags import NEWER_FLAGS, Flags


@pytest.mark.parametrize("name", sorted(NEWER_FLAGS))
def test_a_newer_flag_is_none_where_sglang_lacks_it(name: str) -> None:
    assert getattr(Flags(SimpleNamespace()), name) is None
    assert getattr(Flags(SimpleNamespace(**{name: True})), name) is True


def test_flags_that_sglang_does_not_have_yet() -> None:
    """Nobody can have set them. Any other that is absent is an error."""
    flags = Flags(SimpleNamespace(pp_size=2, enable_nvidia_megakernel=True))
    assert flags.pp_size == 2 and flags.enable_nvidia_megakernel is True
    assert flags.enable_amd_monokernel is None
    with pytest.raises(AttributeError):
        flags.dcp_size  # noqa: B018
