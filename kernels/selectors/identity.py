"""Keeps the whole window: everything of the pass runs and nothing may change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kara_sglang.kernels.selectors.recent import RecentSelector


@dataclass(frozen=True, slots=True)
class IdentitySelector(RecentSelector):
    """R = W, so the scores do not matter; the pass must leave the engine bit for bit as it was."""

    name: ClassVar[str] = "identity"
    keeps_all: ClassVar[bool] = True
