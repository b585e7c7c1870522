"""What tests of ``benchmarks/quality`` share: a tiny vocabulary, scripts, made-up results."""

from __future__ import annotations

from pathlib import Path

from kara_sglang.benchmarks.quality.instrument import REFERENCE_ROW
from kara_sglang.benchmarks.quality.rows import Part
from kara_sglang.benchmarks.quality.script import (
    Cell,
    Script,
)


def encode(text: str) -> list[int]:
    """One token per character."""
    return [ord(character) for character in text]


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def fill(folder: Path, part: Part, scripts: list[Script], kl: dict[str, float]) -> None:
    for row in part.rows:
        for number, script in enumerate(scripts):
            n, m = len(script.measured()), len(script.compared())
            reference = row.name == REFERENCE_ROW
            values = [] if reference else [kl[row.name] * (1 + number)] * m
            worse = 0.0 if reference else kl[row.name]
            cell = Cell([-1.0 - worse] * n, [reference or worse < 0.1] * n, [100] * n, values)
            cell.save(folder, row.key, script.name)
