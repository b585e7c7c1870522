"""Flags of SGLang that not every tested version has."""

from __future__ import annotations

from typing import Any

NEWER_FLAGS = frozenset({"enable_amd_monokernel", "enable_nvidia_megakernel"})
"""Fields of ``ServerArgs`` from 0.5.23 on. Gone with 0.5.22."""


class Flags:
    """SGLang's settings; a newer flag that this SGLang does not have is None, since nobody can set it.

    Parameters
    ----------
    record
        ``ServerArgs`` or a view of it.
    """

    def __init__(self, record: Any) -> None:
        self._record = record

    def __getattr__(self, name: str) -> Any:
        if name in NEWER_FLAGS:
            return getattr(self._record, name, None)
        return getattr(self._record, name)
