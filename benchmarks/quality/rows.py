"""The rows of the tables: what is compared with what, and which rows can share a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kara_sglang.benchmarks.quality.instrument import REFERENCE_ROW
from kara_sglang.benchmarks.quality.tasks import SETTLE, Layout
from kara_sglang.benchmarks.quality.variants import Variant
from kara_sglang.config import PRESETS, KaraConfig


@dataclass(frozen=True, slots=True)
class Row:
    """One way to compress.

    Attributes
    ----------
    name
        As in the tables.
    group
        The table that it belongs to.
    selector
        Of the request; None: not compressed at all.
    retain
        Share that is kept; 1 for rows that keep all.
    settings
        The server's settings, for :func:`kara_sglang.configure`.
    engine
        Arguments of ``sglang.Engine`` that this row has on top.
    """

    name: str
    group: str
    selector: str | None
    retain: float
    settings: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Unique, and fit for a file's name."""
        if self.name == REFERENCE_ROW:
            return self.name
        return f"{self.name.replace(':', '_').replace(' ', '-')}@{self.retain:g}"

    @property
    def options(self) -> Any:
        """The request's ``kv_compress``."""
        if self.selector is None:
            return False
        return {"selector": self.selector, "retain": self.retain}

    @property
    def delay(self) -> int:
        """Tokens that the server leaves uncompressed behind a window."""
        return KaraConfig.from_settings(self.settings).delay

    def delayed(self, delay: int) -> Row:
        """The row with another delay."""
        return replace(self, settings=self.settings | {"delay": delay})


@dataclass(slots=True)
class Part:
    """Rows that perform the same scripts.

    Attributes
    ----------
    rows
        Begin with the reference.
    text, recall
        Layouts of the two kinds of scripts.
    texts
        How many documents; None: all.
    """

    name: str
    rows: list[Row]
    text: Layout
    recall: Layout
    texts: int | None


def defaults() -> dict[str, str]:
    """What rows mean that leave settings out, by preset."""
    return {name: KaraConfig.from_settings({"preset": name}).to_json() for name in PRESETS}


PAPER = "paper"
SELECTORS = ("kara", "causal", "snapkv", "keys", "recent", "random", PAPER)
QUICK = ("kara", "keys", "random", "recent", "snapkv", PAPER)

PRODUCT = Variant(value=4, chunks=0, later=0, novel=1, ahead=1, near=13)
"""The variant that is the product's default; a test holds them together."""

ABLATIONS = {
    "with Token2Chunk": replace(PRODUCT, chunks=0.1),
    "sum instead of squares": replace(PRODUCT, power=1),
    "norm of V once": replace(PRODUCT, value=1),
    "norm of V cubed": replace(PRODUCT, value=3),
    "without the norm of V": replace(PRODUCT, value=0),
    "without the key's distance": replace(PRODUCT, novel=0),
    "queries where they are": replace(PRODUCT, ahead=0),
    "without neighbours": replace(PRODUCT, near=1),
    "with the delay's votes": replace(PRODUCT, later=1),
}


def _server(window: int, **settings: Any) -> dict[str, Any]:
    # Each window as soon as it is due: what is measured must not depend on who runs beside it.
    return {"window": window, "policy": "threshold"} | settings


def reference(window: int) -> Row:
    """The full cache on a server with windows of so many tokens."""
    return Row(REFERENCE_ROW, "selectors", None, 1.0, _server(window))


def selectors(names: Sequence[str], window: int, retains: Sequence[float]) -> list[Row]:
    """Every selector at every share; ``paper`` is ``kara`` on a server with the preset of that name."""
    own = [name for name in names if name != PAPER]
    rows = [Row(name, "selectors", name, r, _server(window)) for r in retains for name in own]
    paper = _server(window, preset="paper")
    return rows + [Row(PAPER, "selectors", "kara", r, paper) for r in retains if PAPER in names]


def _ablations(window: int, retains: tuple[float, ...]) -> list[Row]:
    def row(name: str, selector: str, retain: float, **settings: Any) -> Row:
        return Row(name, "ablations", selector, retain, _server(window, **settings))

    rows = []
    for retain in retains:
        rows += [row(name, v.name, retain) for name, v in ABLATIONS.items()]
    for retain in retains:
        newest = replace(PRODUCT, newest=min(SETTLE, window // 8))
        rows.append(row("without delay", "kara", retain, delay=0))
        rows.append(row("newest kept, without delay", newest.name, retain, delay=0))
    rows += [row("one index set per layer", "kara", r, granularity="layer") for r in retains]
    rows += [row("mean of the query heads", "kara", r, query_heads="mean") for r in retains]
    rows += [row("queries in full precision", "kara", r, query_dtype="model") for r in retains]
    return rows


def only(parts: list[Part], names: list[str] | None, shares: list[float] | None) -> list[Part]:
    """The parts with their reference and, of the other rows, those with one of ``names`` and one of
    ``shares``; parts that would be left with the reference alone are left out.

    Raises
    ------
    ValueError
        One line: where no row has a name or a share that was asked for.
    """
    rows = [row for part in parts for row in part.rows]
    for flag, wanted, there in (
        ("--rows", names, [row.name for row in rows]),
        ("--shares", shares, [row.retain for row in rows]),
    ):
        if unknown := set(wanted or ()) - set(there):
            known = ", ".join(map(str, dict.fromkeys(there)))
            raise ValueError(f"{flag} {', '.join(map(str, unknown))}: there is {known}")

    def chosen(row: Row) -> bool:
        return row.name in (names or [row.name]) and row.retain in (shares or [row.retain])

    smaller = [
        replace(part, rows=[r for r in part.rows if r.name == REFERENCE_ROW or chosen(r)])
        for part in parts
    ]
    return [part for part in smaller if len(part.rows) > 1]


def delayed(parts: list[Part], delay: int) -> list[Part]:
    """The parts with this delay in all rows, as a model with so long a sliding window has it."""

    def settled(layout: Layout) -> Layout:
        return replace(layout, settle=max(SETTLE, delay))

    return [
        replace(
            part,
            rows=[row.delayed(delay) for row in part.rows],
            text=settled(part.text),
            recall=settled(part.recall),
        )
        for part in parts
    ]


def quick() -> list[Part]:
    """Minutes on two cores: the main rows at two shares, a small window, few texts."""
    window = 128
    rows = [reference(window), *selectors(QUICK, window, (0.5, 0.25))]
    text = Layout(window, 1, tail=window, stride=2)
    recall = Layout(window, 2, facts=3)
    return [Part("quick", rows, text, recall, 8)]


def full() -> list[Part]:
    """Everything that the documents report."""
    window, retains = 256, (0.75, 0.5, 0.3, 0.2)
    identity = Row("identity", "selectors", "identity", 1.0, _server(window))
    main = [reference(window), identity, *selectors(SELECTORS, window, retains)]
    main += _ablations(window, (0.5,))
    text = Layout(window, 1, tail=window, stride=2)
    parts = [Part("main", main, text, Layout(window, 3, facts=4), None)]

    wide = 1024
    sweep = [reference(wide)]
    for size in (wide, 512, 256, 128):
        sweep += [Row(f"window {size}", "windows", "kara", r, _server(size)) for r in (0.5, 0.25)]
    default = KaraConfig().window
    sweep += [
        Row(f"keys, window {default}", "windows", "keys", r, _server(default)) for r in (0.5, 0.25)
    ]
    text = Layout(wide, 1, tail=256, stride=2)
    parts.append(Part("windows", sweep, text, Layout(wide, 1, facts=8), 8))

    small = 128
    text = Layout(small, 1, tail=small, stride=2)
    recall = Layout(small, 2, facts=3)
    parts.append(Part("ring", _rings(small), text, recall, None))
    parts.append(Part("kv", _kv_caches(small), text, recall, None))
    return parts


def _rings(window: int) -> list[Row]:
    """What recorded queries are stored as, at a half."""
    rows = [reference(window)]
    for heads in ("all", "mean"):
        for stored in ("model", "fp8", "fp4"):
            server = _server(window, query_heads=heads, query_dtype=stored)
            rows.append(Row(f"{stored}, {heads}", "ring", "kara", 0.5, server))
    return rows


def _kv_caches(window: int) -> list[Row]:
    """What K and V are kept in, uncompressed and at a half; the reference has the model's own dtype."""
    server = _server(window)
    rows = [reference(window), *(Row(name, "kv", name, 0.5, server) for name in ("kara", "keys"))]
    for stored in ("bf16", "fp8_e4m3", "fp8_e5m2"):
        engine = {"kv_cache_dtype": stored}
        rows.append(Row(stored, "kv", None, 1.0, server, engine))
        rows += [Row(f"{name}, {stored}", "kv", name, 0.5, server, engine) for name in ("kara", "keys")]
    return rows
