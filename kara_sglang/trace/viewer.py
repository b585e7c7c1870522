"""A trace, or two of one text, as an HTML page: kept tokens dark and dropped ones pale, layer by layer.

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
from itertools import pairwise
from pathlib import PurePath

import numpy as np

from kara_sglang.radix_integration.row import VOTERS
from kara_sglang.trace.format import Trace
from kara_sglang.trace.pair import Pair

VOTES = {"none": "no queries recorded", "mean": "mean queries vote", "all": "all query heads vote"}
"""What the page says of :data:`kara_sglang.radix_integration.row.VOTERS`."""

LEVELS = 10
"""Steps of darkness between a token that nobody keeps (``k0``) and one that all keep."""


SIDES = ("left", "right")


def render(trace: Trace, texts: Sequence[str], notice: str = "") -> str:
    """The page of one trace.

    Parameters
    ----------
    trace : Trace
    texts : sequence of str
        What each token of prompt and output adds to the text.
    notice : str
        A line to put on top, for example that the text is missing.
    """
    sections = "\n".join(html for _, html in _sections(trace, texts, len(texts)))
    return _fill([trace], texts, len(texts), _facts(trace), sections, [notice])


def render_pair(pair: Pair, texts: Sequence[str], notice: str = "") -> str:
    """The page of two traces, the left one beside the right one; arguments as of :func:`render`."""
    facts = "".join(
        f"<div><h2>{side}</h2>{_facts(trace)}</div>"
        for side, trace in zip(SIDES, pair.whole, strict=True)
    )
    columns = [list(_sections(trace, texts, pair.end, side)) for side, trace in enumerate(pair.common)]
    # A row begins wherever a section begins on both sides, so that the same text stays side by side.
    starts = sorted(set.intersection(*({start for start, _ in column} for column in columns)))
    rows = (
        "".join(
            f"<div>{''.join(html for start, html in column if first <= start < last)}</div>"
            for column in columns
        )
        for first, last in pairwise([*starts, len(texts)])
    )
    sections = "\n".join(f"<div class=pair>{row}</div>" for row in rows)
    return _fill(
        pair.common, texts, pair.end, f"<div class=pair>{facts}</div>", sections, [pair.note, notice]
    )


def _fill(
    traces: Sequence[Trace],
    texts: Sequence[str],
    end: int,
    facts: str,
    sections: str,
    notices: Sequence[str],
) -> str:
    """The template with its slots filled; tokens from ``end`` on are not compared."""
    ids = np.concatenate([traces[0].prompt_ids, traces[0].output_ids])
    if len(texts) != len(ids):
        raise ValueError(f"{len(texts)} texts for {len(ids)} tokens")
    names = SIDES if len(traces) > 1 else ("",)
    slots = {
        "title": escape(" and ".join(trace.about.rid for trace in traces)),
        "sides": "two" if len(traces) > 1 else "one",
        "facts": facts,
        "notice": "".join(
            f"<p class=notice role=status>{escape(line)}</p>" for line in notices if line
        ),
        "sections": sections,
        "chunks": "".join(
            _CHUNKS.format(side=side, name=name and f", {name}") for side, name in enumerate(names)
        ),
        "data": _data(traces, ids, end),
        "last_layer": str(traces[0].bits.shape[1] - 1),
        "levels": "".join(f".k{i}{{--kept:{100 * i // LEVELS}%}}" for i in range(LEVELS + 1)),
        "num_levels": str(LEVELS),
    }
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # In one sweep: what a user wrote may look like a slot.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match[1]], template)


_CHUNKS = """<div class="box chunks">
  <h2>Chunks: kept tokens in a row{name}</h2>
  <svg id=histogram{side} viewBox="0 0 320 150" role=img aria-label="Sizes of chunks{name}"></svg>
  <p class=small id=chunks{side}></p>
</div>"""


def _facts(trace: Trace) -> str:
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
    items = (f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in rows.items())
    return f"<dl>{''.join(items)}</dl>"


def _sections(
    trace: Trace, texts: Sequence[str], end: int, side: int | None = None
) -> Iterator[tuple[int, str]]:
    """First token and markup of prompt, windows, and what lies between and behind them, in the order
    of the text. Of a pair, ``side`` is the column, and nothing from ``end`` on is compared."""
    sets = trace.bits.shape[1] * trace.bits.shape[2]
    counts = trace.keeps().sum(axis=(1, 2), dtype=np.int64)
    levels = (2 * LEVELS * counts + sets) // (2 * sets)  # rounded, halves up, as the script does it
    prompt_length, position = len(trace.prompt_ids), 0

    def section(kind: str, name: str, first: int, last: int, said: Sequence[str], body: str) -> str:
        label = "" if side is None else f"{SIDES[side]}: "
        notes = "".join(f"<small>{note}</small>" for note in said)
        shares = "<small class=shares></small>" if side is not None and kind == "window" else ""
        return (
            f"<section class={kind} data-side={side or 0}><h2>{label}{name}"
            f"<small>tokens {first}\N{EN DASH}{last - 1}</small>{notes}{shares}</h2>"
            f"<p>{body}</p></section>"
        )

    def uncompressed(start: int, stop: int) -> Iterator[tuple[int, str]]:
        middle = min(max(start, prompt_length), stop)
        cuts = [
            (start, min(middle, end), "prompt", "never touched"),
            (middle, min(stop, end), "not compressed", "all kept"),
            (max(start, end), stop, "not compared", "behind the last common window"),
        ]
        for first, last, name, what in cuts:
            if first < last:
                body = "".join(f"<span>{_visible(text)}</span>" for text in texts[first:last])
                yield first, section(name.split()[0], name, first, last, [what], body)

    for number, (start, _, width, kept, voters) in enumerate(trace.windows.tolist()):
        yield from uncompressed(position, start)
        position = start + width
        body = "".join(
            f"<span class=k{level}>{_visible(text)}</span>"
            for level, text in zip(levels[number], texts[start:position], strict=True)
        )
        said = [f"{kept} of {width} kept", VOTES[VOTERS[voters]]]
        yield start, section("window", f"window {number + 1}", start, position, said, body)
    yield from uncompressed(position, len(texts))


def _visible(text: str) -> str:
    """Escaped; a line break gets a sign, because a token may be nothing else."""
    return escape(text).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")


def _data(traces: Sequence[Trace], ids: np.ndarray, end: int) -> str:
    """What the script needs, as JSON that cannot end its element early."""
    data = {
        "layers": traces[0].bits.shape[1],
        "heads": traces[0].about.heads,
        "ids": ids.tolist(),
        "end": end,
        "traces": [
            {
                "windows": [
                    {"start": start, "width": width, "kept": kept}
                    for start, _, width, kept, _ in trace.windows.tolist()
                ],
                "bits": base64.b64encode(trace.bits.tobytes()).decode(),
            }
            for trace in traces
        ],
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
