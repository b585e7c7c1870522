"""The texts that are forced: development and held-out, never the same work in both.

``data/SOURCES.md`` names where each comes from and its licence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).with_name("data")
SPLITS = ("development", "held_out")


@dataclass(frozen=True, slots=True)
class Text:
    """A document of about 9,000 characters; ``name`` begins with its kind."""

    name: str
    content: str

    @property
    def kind(self) -> str:
        """``prose``, ``verse``, ``drama``, ``doc``, ``code`` or ``maths``."""
        return self.name.split("-")[0]


def load(split: str, limit: int | None = None) -> list[Text]:
    """The texts of a split, kinds taking turns, so that the first few are of different kinds."""
    files = sorted((DATA / split).glob("*.txt"))
    texts = [Text(path.stem, path.read_text(encoding="utf-8")) for path in files]
    turn: dict[str, int] = {}
    order = []
    for text in texts:
        turn[text.kind] = turn.get(text.kind, 0) + 1
        order.append((turn[text.kind], text.name))
    ordered = [text for _, text in sorted(zip(order, texts, strict=True), key=lambda pair: pair[0])]
    return ordered[:limit]
