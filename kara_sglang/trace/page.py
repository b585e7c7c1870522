"""A trace as one HTML page: text with kept tokens dark and dropped ones pale, layer by layer.

The page loads nothing from anywhere. It shows the mean over all layers and heads as it stands; its
script does the rest from the bit sets, which it carries.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import PurePath

import numpy as np

from kara_sglang.state import VOTERS
from kara_sglang.trace.file import Trace

VOTES = {"none": "no queries recorded", "mean": "mean queries vote", "all": "all query heads vote"}
"""What the page says of :data:`kara_sglang.state.VOTERS`."""

LEVELS = 10
"""Steps of darkness between a token that nobody keeps (``k0``) and one that all keep."""


def render(trace: Trace, texts: Sequence[str], notice: str = "") -> str:
    """The page.

    Parameters
    ----------
    trace : Trace
    texts : sequence of str
        What each token of prompt and output adds to the text.
    notice : str
        A line to put on top, for example that the text is missing.
    """
    prompt_length, length = len(trace.prompt_ids), len(trace.prompt_ids) + len(trace.output_ids)
    if len(texts) != length:
        raise ValueError(f"{len(texts)} texts for {length} tokens")
    slots = {
        "title": escape(trace.about.rid),
        "facts": "".join(_facts(trace)),
        "notice": f"<p class=notice role=status>{escape(notice)}</p>" if notice else "",
        "sections": "\n".join(_sections(trace, texts, prompt_length)),
        "data": _data(trace),
        "last_layer": str(trace.bits.shape[1] - 1),
        "levels": "".join(f".k{i}{{--kept:{100 * i // LEVELS}%}}" for i in range(LEVELS + 1)),
        "num_levels": str(LEVELS),
    }
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # In one sweep: what a user wrote may look like a slot.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match[1]], template)


def _facts(trace: Trace) -> Iterator[str]:
    about, count = trace.about, len(trace.windows)
    width = about.settings["window"]
    held = [f"{number:,}" for number in (len(trace.prompt_ids), len(trace.output_ids))]
    rows = {
        "request": about.rid,
        "model": PurePath(about.model).name,
        "selector": about.selector,
        "windows": f"{count:,} of {width} tokens, {about.kept} kept in each",
        "tokens": f"{held[0]} in the prompt, {held[1]} generated, "
        f"{count * (width - about.kept):,} removed from each layer and head",
        "ended by": about.finish,
    }
    if about.retractions:
        rows["retracted"] = f"{about.retractions} times; what was compressed before is forgotten"
    if len(about.heads) < about.num_kv_heads:
        rows["KV heads"] = (
            f"{about.heads[0]} to {about.heads[-1]} of {about.num_kv_heads}; "
            f"give show the files of all {about.tp_size} ranks to see the others"
        )
    for name, value in rows.items():
        yield f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>"


def _sections(trace: Trace, texts: Sequence[str], prompt_length: int) -> Iterator[str]:
    """Prompt, windows, and what lies between and behind them, in the order of the text."""
    sets = trace.bits.shape[1] * trace.bits.shape[2]
    counts = trace.keeps().sum(axis=(1, 2), dtype=np.int64)
    levels = (2 * LEVELS * counts + sets) // (2 * sets)  # rounded, halves up, as the script does it
    position = 0
    for number, (start, _, width, kept, voters) in enumerate(trace.windows.tolist()):
        yield from _uncompressed(texts, position, start, prompt_length)
        position = start + width
        tokens = "".join(
            f"<span class=k{level}>{_visible(text)}</span>"
            for level, text in zip(levels[number], texts[start:position], strict=True)
        )
        yield (
            f'<section class=window id="window-{number + 1}"><h2>window {number + 1}'
            f"<small>tokens {start}\N{EN DASH}{position - 1}</small>"
            f"<small>{kept} of {width} kept</small><small>{VOTES[VOTERS[voters]]}</small></h2>"
            f"<p>{tokens}</p></section>"
        )
    yield from _uncompressed(texts, position, len(texts), prompt_length)


def _uncompressed(texts: Sequence[str], start: int, end: int, prompt_length: int) -> Iterator[str]:
    middle = min(max(start, prompt_length), end)
    for first, last, name, what in (
        (start, middle, "prompt", "never touched"),
        (middle, end, "not compressed", "all kept"),
    ):
        if first < last:
            body = "".join(_visible(text) for text in texts[first:last])
            yield (
                f"<section class={name.split()[0]}><h2>{name}"
                f"<small>tokens {first}\N{EN DASH}{last - 1}</small><small>{what}</small></h2>"
                f"<p>{body}</p></section>"
            )


def _visible(text: str) -> str:
    """Escaped; a line break gets a sign, because a token may be nothing else."""
    return escape(text).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")


def _data(trace: Trace) -> str:
    """What the script needs, as JSON that cannot end its element early."""
    ids = np.concatenate([trace.prompt_ids, trace.output_ids])
    data = {
        "layers": trace.bits.shape[1],
        "heads": trace.about.heads,
        "windows": [
            {"start": start, "width": width, "kept": kept, "ids": ids[start : start + width].tolist()}
            for start, _, width, kept, _ in trace.windows.tolist()
        ],
        "bits": base64.b64encode(trace.bits.tobytes()).decode(),
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
