"""Scripts made of texts: running text, and facts that are stated and later asked for.

A script is laid out by a window W, so that everything that is measured is measured in the same state of
compression, whatever the row::

    prompt | window 1 | ... | window n | delay | probes

When the probes begin, every row has compressed all n windows. ``text`` scripts go on with the text;
a tail of W tokens is one whole cycle, in which every row compresses exactly once. ``recall`` scripts
state facts at even offsets of all n windows and then ask for each of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kara_sglang.benchmarks.quality.script import Probe, Script
from kara_sglang.benchmarks.quality.texts import DATA, Text

SETTLE = 64
"""Tokens behind the last window, unless a layout has more."""
PROMPT = 32
"""Tokens of prompt, a multiple of every page size that is used."""

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of a script in tokens.

    Attributes
    ----------
    window
        W; smaller windows that divide it fit the same script.
    windows
        How many windows lie before the probes.
    tail
        Tokens of running text that are measured (``text``).
    stride
        Of the compared distributions (``text``).
    facts
        Per window (``recall``).
    settle
        Tokens behind the last window; no row may delay its windows further.
    """

    window: int
    windows: int
    tail: int = 0
    stride: int = 1
    facts: int = 0
    settle: int = SETTLE

    @property
    def span(self) -> int:
        """Tokens before the probes."""
        return self.windows * self.window + self.settle


@dataclass(frozen=True, slots=True)
class Fact:
    """``lead + answer`` is stated once and its answer asked for behind the same lead."""

    kind: str
    lead: str
    answer: str


def encoder(tokenizer: Any) -> Encode:
    """``tokenizer`` without its special tokens."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def windows_done(script: Script, window: int, delay: int, page_size: int) -> int:
    """Windows that a request compresses while it performs ``script``.

    A pass runs before a decode step, and not before the last one.
    """
    before_last = len(script.prompt) + len(script.forced) - 3
    first = -(-len(script.prompt) // page_size) * page_size
    return max(0, (before_last - first - delay) // window)


def text_script(encode: Encode, text: Text, layout: Layout, beginning: Sequence[int] = ()) -> Script:
    """Running text whose last ``layout.tail`` tokens are measured and compared; ``beginning`` are the
    tokens with which the model wants any text to begin."""
    tokens = [*beginning, *encode(text.content)]
    need = PROMPT + layout.span + layout.tail
    _check_length(text, tokens, need)
    forced = tokens[PROMPT:need]
    probe = Probe("text", layout.span, len(forced), compared=True)
    name = f"text-{text.name}-w{layout.window}x{layout.windows}"
    return Script(name, text.name, tokens[:PROMPT], forced, [probe], layout.stride)


def recall_script(
    encode: Encode, text: Text, layout: Layout, seed: int, beginning: Sequence[int] = ()
) -> Script:
    """Running text with facts in it, and behind it the questions, the earliest fact first."""
    rng = random.Random(f"{seed} {text.name} {layout.window}")
    filler = [*beginning, *encode(text.content)]
    _check_length(text, filler, PROMPT + layout.span)
    prompt, filler = filler[:PROMPT], filler[PROMPT:]
    number = layout.windows * layout.facts
    kinds = [tuple(FACTS)[i % len(FACTS)] for i in range(number)]
    rng.shuffle(kinds)
    names = rng.sample(NAMES, number)
    facts = [FACTS[kind](rng, name) for kind, name in zip(kinds, names, strict=True)]

    forced: list[int] = []
    placed: list[tuple[Fact, float, int]] = []
    used = 0
    for window in range(layout.windows):
        for slot in range(layout.facts):
            fact = facts[window * layout.facts + slot]
            offset = (slot + 0.5) / layout.facts
            stated = encode(f"\n{fact.lead}") + encode(fact.answer) + encode(".\n")
            start = window * layout.window + round(offset * layout.window - len(stated) / 2)
            gap = start - len(forced)
            if gap < 0:
                raise ValueError(f"{layout.facts} facts do not fit a window of {layout.window} tokens")
            forced += filler[used : used + gap] + stated
            used += gap
            placed.append((fact, offset, layout.windows - 1 - window))
    gap = layout.span - len(forced)
    forced += filler[used : used + gap] + encode("\n\nNow repeat what was stated above.")
    probes = []
    for fact, offset, back in placed:
        forced += encode(f"\n{fact.lead}")
        answer = encode(fact.answer)
        probes.append(
            Probe(fact.kind, len(forced), len(forced) + len(answer), offset=offset, back=back)
        )
        forced += answer + encode(".")
    name = f"recall-{text.name}-w{layout.window}x{layout.windows}-s{seed}"
    return Script(name, text.name, prompt, forced, probes)


def _check_length(text: Text, tokens: list[int], need: int) -> None:
    if len(tokens) < need:
        raise ValueError(
            f"text {text.name} has {len(tokens)} tokens, {need} are needed; choose a smaller window"
        )


def _passkey(rng: random.Random, name: str) -> Fact:
    digits = "".join(rng.choice("0123456789") for _ in range(5))
    return Fact("passkey", f"The pass key of {name} is", f" {digits}")


def _pair(rng: random.Random, name: str) -> Fact:
    return Fact("pair", f"{name.lower()}-{rng.randrange(100, 1000)}:", f" {rng.choice(WORDS)}")


def _identifier(rng: random.Random, name: str) -> Fact:
    parts = "_".join(rng.sample(WORDS, 3))
    return Fact("identifier", f"The function that reads {name} is", f" {parts}")


def _passage(rng: random.Random, name: str) -> Fact:
    return Fact("passage", f"{name} wrote:", " " + " ".join(rng.sample(WORDS, 8)))


FACTS: dict[str, Callable[[random.Random, str], Fact]] = {
    "passkey": _passkey,
    "pair": _pair,
    "identifier": _identifier,
    "passage": _passage,
}

NAMES = (DATA / "names.txt").read_text().split()

WORDS = (DATA / "words.txt").read_text().split()
