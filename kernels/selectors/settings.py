"""What selectors read of a server's settings; ``KaraConfig`` fits it."""

from __future__ import annotations

from typing import Protocol


class SelectorSettings(Protocol):
    """Each field's meaning is :class:`kara_sglang.config.KaraConfig`'s."""

    @property
    def score(self) -> str: ...

    @property
    def neighbours(self) -> int: ...

    @property
    def delay_votes(self) -> bool: ...

    @property
    def ahead(self) -> bool: ...

    @property
    def granularity(self) -> str: ...

    @property
    def chunk_budget(self) -> float: ...

    @property
    def chunk_width(self) -> int: ...

    @property
    def chunk_quantile(self) -> float: ...

    @property
    def last_queries(self) -> int: ...
