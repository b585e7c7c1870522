"""The ids that SGLang puts into a text in place of one image or sound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import MultimodalDataItem


def padding_values(item: MultimodalDataItem) -> Sequence[int]:
    """All of an item's ids. SGLang 0.5.23 may draw several, 0.5.22 draws one. Gone with 0.5.22."""
    return getattr(item, "pad_values", None) or (item.pad_value,)
