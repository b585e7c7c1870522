"""Two traces of one text: how far they can be compared."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from kara_sglang.trace.format import Trace, TraceError


@dataclass(frozen=True, slots=True)
class Pair:
    """Two requests that read and wrote the same tokens, at least at first.

    Attributes
    ----------
    whole : tuple of Trace
        The left trace and the right one.
    common : tuple of Trace
        Of each only the common tokens, and only the windows that end at or before ``end``.
    end : int
        Position behind the last token that is compared. A window in which the texts part was chosen
        with different text in view on the two sides, so nothing from its start on is compared.
    note : str
        Where the texts part, for people; empty where they are the same.
    """

    whole: tuple[Trace, Trace]
    common: tuple[Trace, Trace]
    end: int
    note: str


def pair(left: Trace, right: Trace) -> Pair:
    """Both traces up to the token at which their texts part.

    Raises
    ------
    TraceError
        Where the layers or heads differ, or a side has no window before the texts part.
    """
    shapes = [(trace.bits.shape[1], trace.about.heads) for trace in (left, right)]
    if shapes[0] != shapes[1]:
        says = " and ".join(f"{layers} layers with the KV heads {heads}" for layers, heads in shapes)
        raise TraceError(
            f"the traces have {says}: --with compares requests of one model, "
            "with the files of the same ranks"
        )
    ids = [np.concatenate([trace.prompt_ids, trace.output_ids]) for trace in (left, right)]
    shorter = min(map(len, ids))
    differ = np.flatnonzero(ids[0][:shorter] != ids[1][:shorter])
    common = int(differ[0]) if len(differ) else shorter
    end = _end(left, right, common)
    clipped = _until(left, end, common), _until(right, end, common)
    if not all(len(trace.windows) for trace in clipped):
        raise TraceError(
            f"the texts part at token {common}, before both have compressed a window; "
            "--with compares requests with the same text, without it show makes a page of each"
        )
    note = ""
    if common < max(map(len, ids)):
        how = "they part"
        if not len(differ):
            how = f"the {'left' if len(ids[0]) == common else 'right'} one ends"
        note = f"Both texts are the same up to token {common}, where {how} and the page ends."
        if end < common:
            note += f" Tokens from {end} on are not compared: their window goes on behind it."
    return Pair((left, right), clipped, end, note)


def _end(left: Trace, right: Trace, common: int) -> int:
    """The last position up to ``common`` that is inside no window of either side."""
    spans = [
        (start, start + width) for t in (left, right) for start, _, width, *_ in t.windows.tolist()
    ]
    end = common
    while cut := [start for start, stop in spans if start < end < stop]:
        end = min(cut)
    return end


def _until(trace: Trace, end: int, common: int) -> Trace:
    """The windows up to ``end`` and the tokens up to ``common``."""
    count = int((trace.windows[:, 0] + trace.windows[:, 2] <= end).sum())
    return dataclasses.replace(
        trace,
        prompt_ids=trace.prompt_ids[:common],
        output_ids=trace.output_ids[: max(0, common - len(trace.prompt_ids))],
        windows=trace.windows[:count],
        bits=trace.bits[:count],
    )
