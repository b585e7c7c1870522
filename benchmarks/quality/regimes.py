"""Two regimes of a long answer told apart: what each step repeats, and what was stated once.

    python -m kara_sglang.benchmarks.quality.regimes --model DIR --out regimes.json

An answer is forced token by token through the real engine. It is a list of steps with a running total
and a key that is moved now and then, and in between it states facts, each of them once::

    The price of tea is 23.
    Step 12: add 14. The total is 214. The key is still in the attic.
    ...
    Step 40: add the price of tea, which is 23. The total is 237. The key goes to the cellar.

Some tokens are asked for: was the right one the most likely? ``total`` and ``state``, where the key is,
need what was said last, mostly in the step before: the restated regime. ``behind`` are those for which
that lies in a compressed window: none where a step is shorter than the delay. The others need a fact
that stands in a compressed window and nowhere else: the facts ``use``, a price in the middle of a step,
``copy``, a price, and ``name``, an identifier, and ``chain``, first the item that a price leads to and
then that item's price. The distance of a fact is counted in windows, from where it stands to where it
is needed. One script is one observation: intervals are percentiles of a bootstrap over scripts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kara_sglang import __version__, cpu_engine
from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import origin
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.quality import campaign, variants
from kara_sglang.benchmarks.quality.engine import PAGE_SIZE, EngineFailed
from kara_sglang.benchmarks.quality.estimates import interval, points, resampled
from kara_sglang.benchmarks.quality.instrument import REFERENCE_ROW
from kara_sglang.benchmarks.quality.pace import MODELS_OWN, fastest
from kara_sglang.benchmarks.quality.rows import PAPER, Row, defaults, reference, selectors
from kara_sglang.benchmarks.quality.script import Cell, Probe, Script
from kara_sglang.benchmarks.quality.tasks import NAMES, SETTLE, WORDS, Encode, encoder
from kara_sglang.benchmarks.serving.server import end_on_sigterm
from kara_sglang.embedded_model import EmbeddedModelMissing, embedded_model_path
from kara_sglang.kernels.selectors import REGISTRY

MODULE = "kara_sglang.benchmarks.quality.regimes"
RESTATED = ("total", "state")
FACTS = ("use", "copy", "name")
ONCE = (*FACTS, "chain")
SOURCE = "source"
NULL_ROW = "random"
ROOMS = ("kitchen", "garden", "attic", "office", "cellar", "garage", "hall", "library")
STAYS = 0.75
"""Chance that a step leaves the key where it is."""

SHOWN = """Below is a list of steps. Do what each step says and write the new total.

The price of rice is 31.
Step 1: add 14. The total is 590. The key goes to the hall.
The price of milk is 22.
The function of oil is open_copper_door.
Step 2: add 25. The total is 615. The key is still in the hall.
The price of salt equals that of rice.
Step 3: take away the price of rice, which is 31. The total is 584. The key is still in the hall.
Recall: the price of salt equals that of rice, which is 31.
Recall: the price of milk is 22.
Step 4: take away 31. The total is 553. The key goes to the attic.
Recall: the function of oil is open_copper_door.
Step 5: add 12. The total is 565. The key goes to the office.

Below is another list of steps. Do what each step says and write the new total.

"""
"""The prompt: one example of each kind. A prompt is never compressed."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Stated once by the line ``stated``.

    Attributes
    ----------
    kind
        One of :data:`ONCE`, or ``source``: where a chain ends, never asked for by itself.
    item
        What the line is about.
    value
        What it says of the item: a price, a function, or the index of the fact that a chain leads to.
    stated
        The line.
    """

    kind: str
    item: str
    value: int | str
    stated: str


class Writer:
    """Forced tokens so far, what is measured of them, and the running total."""

    def __init__(self, encode: Encode, rng: random.Random, window: int) -> None:
        self._encode, self._rng, self._window = encode, rng, window
        self.tokens: list[int] = []
        self.probes: list[Probe] = []
        self._total, self._step = rng.randrange(200, 400), 0
        self._room: str | None = None
        self._said: dict[str, int] = {}  # where a total, a room was said last

    def write(self, text: str) -> int:
        """Write what is not measured; returns the index of its first token."""
        start = len(self.tokens)
        self.tokens += self._encode(text)
        return start

    def asked(self, kind: str, answer: str, place: int) -> None:
        """Write what is measured: it stands at token ``place``."""
        start = self.write(answer)
        back = (start - place) // self._window
        self.probes.append(Probe(kind, start, len(self.tokens), back=back))

    def step(self, price: int, what: str = "", place: int | None = None, measured: bool = True) -> None:
        """Add ``price`` to the total or take it away; it is that of ``what``, whose line is at
        ``place``, or stands in the step itself."""
        self._step += 1
        adds = self._total < 600  # so the total keeps its three digits
        self._total += price if adds else -price
        self.write(f"Step {self._step}: {'add' if adds else 'take away'}")
        if what:
            self.write(f" the price of {what}, which is")
            assert place is not None
            self.asked("use", f" {price}", place)
            self.write(". The total is")
        else:
            self.write(f" {price}. The total is")
        self._repeat("total", f" {self._total}", measured)
        if self._room is not None and self._rng.random() < STAYS:
            self.write(". The key is still in the")
            self._repeat("state", f" {self._room}", measured)
        else:
            self._room = self._rng.choice([room for room in ROOMS if room != self._room])
            self.write(". The key goes to the")
            self._repeat("state", f" {self._room}", measured=False)
        self.write(".\n")

    def _repeat(self, kind: str, answer: str, measured: bool) -> None:
        """Write what follows from what was said last."""
        start = self.write(answer)
        if measured:
            self.probes.append(Probe(kind, start, len(self.tokens), source=self._said[kind]))
        self._said[kind] = start

    def plain_step(self, measured: bool) -> None:
        """A step that names its price."""
        self.step(self._rng.randrange(11, 50), measured=measured)


def script_of(
    encode: Encode, number: int, *, window: int, windows: int, facts: int, settle: int = SETTLE
) -> Script:
    """One forced answer.

    Parameters
    ----------
    encode
        The model's tokenizer.
    number
        Seed, and part of the name.
    window, windows
        W, and how many windows are compressed before anything is asked for.
    facts
        Facts stated per window; ``windows * facts`` at most as many as there are ``NAMES``.
    settle
        Tokens behind the last window before anything is asked for: no fewer than the delay.
    """
    rng = random.Random(f"regimes {number}")
    prompt = encode(SHOWN)
    writer = Writer(encode, rng, window)
    base = -len(prompt) % PAGE_SIZE  # the first window starts at a page
    stated = facts_of(rng, windows * facts)
    places: list[int] = []
    for i, fact in enumerate(stated):
        while len(writer.tokens) < base + round((i + 0.5) / facts * window):
            writer.plain_step(measured=False)
        places.append(writer.write(fact.stated + "\n"))
    while len(writer.tokens) < base + windows * window + settle:
        writer.plain_step(measured=False)
    asked = [i for i, fact in enumerate(stated) if fact.kind != SOURCE]
    rng.shuffle(asked)
    for i in asked:
        fact, place = stated[i], places[i]
        if fact.kind == "use":
            assert isinstance(fact.value, int)
            writer.step(fact.value, fact.item, place)
            continue
        what = "function" if fact.kind == "name" else "price"
        writer.write(f"Recall: the {what} of {fact.item}")
        # The words in front of an answer say which kind it is: only the fact itself is asked for.
        if fact.kind == "chain":
            assert isinstance(fact.value, int)
            source = stated[fact.value]
            writer.write(" equals that of")
            writer.asked("chain", f" {source.item}", place)
            writer.write(", which is")
            writer.asked("chain", f" {source.value}", places[fact.value])
        else:
            writer.write(" is")
            writer.asked(fact.kind, f" {fact.value}", place)
        writer.write(".\n")
        writer.plain_step(measured=True)
    name = f"regimes-{number}-w{window}x{windows}"
    return Script(name, "regimes", prompt, writer.tokens, writer.probes)


def facts_of(rng: random.Random, count: int) -> list[Fact]:
    """``count`` facts in random order, all kinds about equally often."""
    kinds = [(*ONCE, SOURCE)[i % 5] for i in range(count)]
    rng.shuffle(kinds)
    # Of the two lines of a chain the one with the price comes first.
    ends = [i for i, kind in enumerate(kinds) if kind in ("chain", SOURCE)]
    for i, place in enumerate(ends):
        kinds[place] = (SOURCE, "chain")[i % 2] if i // 2 < len(ends) // 2 else "copy"
    items = rng.sample(NAMES, count)
    facts: list[Fact] = []
    source = -1
    for place, (item, kind) in enumerate(zip(items, kinds, strict=True)):
        if kind == "chain":
            line = f"The price of {item} equals that of {items[source]}."
            facts.append(Fact(kind, item, source, line))
        elif kind == "name":
            function = "_".join(rng.sample(WORDS, 3))
            facts.append(Fact(kind, item, function, f"The function of {item} is {function}."))
        else:
            price = rng.randrange(11, 50)
            facts.append(Fact(kind, item, price, f"The price of {item} is {price}."))
            if kind == SOURCE:
                source = place
    return facts


def is_behind(script: Script, probe: Probe, window: int, delay: int) -> bool:
    """Whether what a probe repeats lies in a window that is compressed when it is asked for."""
    first = -len(script.prompt) % PAGE_SIZE
    # The token in front of the answer is computed behind the passes that are due before it.
    passes = max(0, (probe.start - 1 - delay - first) // window)
    return probe.source is not None and probe.source < first + passes * window


def right(script: Script, cell: Cell) -> list[bool]:
    """Per probe whether each of its tokens was the most likely one."""
    place = {step: i for i, step in enumerate(script.measured())}
    return [all(cell.top[place[s]] for s in range(p.start, p.stop)) for p in script.probes]


@dataclass(frozen=True, slots=True)
class Counted:
    """Right answers and questions per script, ``(scripts,)`` each."""

    right: np.ndarray
    asked: np.ndarray

    def share(self) -> list[float]:
        """Share of right answers and its 95 % interval."""
        drawn = resampled(len(self.asked))
        shares = self.right[drawn].sum(axis=1) / np.maximum(self.asked[drawn].sum(axis=1), 1)
        return [self._share(), *interval(shares)]

    def over(self, other: Counted) -> list[float]:
        """How much larger than ``other``'s the share is, paired over scripts, and its 95 % interval."""
        drawn = resampled(len(self.asked))
        asked = np.maximum(self.asked[drawn].sum(axis=1), 1)
        apart = (self.right - other.right)[drawn].sum(axis=1) / asked
        return [self._share() - other._share(), *interval(apart)]

    def _share(self) -> float:
        return float(self.right.sum() / max(1, self.asked.sum()))


Which = Callable[[Script, Probe], bool]


def counted(scripts: Sequence[Script], answers: Sequence[list[bool]], which: Which) -> Counted:
    """What a row got right of some questions; ``answers`` are :func:`right` by script."""
    mine = [
        [ok for ok, probe in zip(found, script.probes, strict=True) if which(script, probe)]
        for script, found in zip(scripts, answers, strict=True)
    ]
    return Counted(*(np.array([count(one) for one in mine], dtype=float) for count in (sum, len)))


def _of(*kinds: str, back: int | None = None) -> Which:
    return lambda _, probe: probe.kind in kinds and (back is None or probe.back == back)


def figures(scripts: Sequence[Script], folder: Path, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One record per row: shares of right answers by kind and regime, and of facts by distance."""
    backs = sorted({p.back for s in scripts for p in s.probes if p.back is not None})
    answers = {row.key: [right(s, Cell.load(folder, row.key, s.name)) for s in scripts] for row in rows}
    full = next(row for row in rows if row.name == REFERENCE_ROW)
    window, delay = full.settings["window"], full.delay
    groups = {"once": _of(*ONCE), "facts": _of(*FACTS)}
    groups["behind"] = lambda script, probe: is_behind(script, probe, window, delay)
    groups |= {kind: _of(kind) for kind in (*RESTATED, *ONCE)}
    records = []
    for row in rows:
        null = answers.get(Row(NULL_ROW, "", NULL_ROW, row.retain).key)
        record: dict[str, Any] = {"row": row.name, "retain": row.retain, "by_back": {}}
        for name, which in groups.items():
            mine = counted(scripts, answers[row.key], which)
            record[name] = {
                "asked": int(mine.asked.sum()),
                "share": mine.share(),
                "over_full": mine.over(counted(scripts, answers[full.key], which)),
                "over_random": mine.over(counted(scripts, null, which)) if null else None,
            }
        for back in backs:
            mine = counted(scripts, answers[row.key], _of(*FACTS, back=back))
            record["by_back"][back] = {"asked": int(mine.asked.sum()), "share": mine.share()}
        records.append(record)
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records in Markdown, in percent and points."""
    over = "over full (95 %)"
    # None is behind the delay where a step is shorter.
    repeated = [*RESTATED, *(["behind"] if any(r["behind"]["asked"] for r in records) else [])]
    lines = []
    for r in records:
        line = [r["row"], f"{r['retain']:g}"]
        for kind in repeated:
            line += _beside(r, kind)
        null = None if r["row"] in (REFERENCE_ROW, NULL_ROW) else r["facts"]["over_random"]
        line += [*_beside(r, "facts"), points(null), *(_percent(r[kind]) for kind in FACTS)]
        lines.append(line + _beside(r, "chain"))
    columns = ["row", "retain", *(name for kind in repeated for name in (kind, over))]
    columns += ["facts", over, "over random (95 %)", *FACTS, "chain", over]
    return grid(columns, lines)


def _beside(record: dict[str, Any], kind: str) -> list[str]:
    """A row's share of right answers, and how it differs from the full cache's."""
    found = record[kind]
    return [_percent(found), "" if record["row"] == REFERENCE_ROW else points(found["over_full"])]


def _percent(found: dict[str, Any]) -> str:
    return f"{100 * found['share'][0]:.1f}"


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Share of right answers against the distance of facts, where 20 were asked for or more; a panel
    per share that is kept."""
    from kara_sglang.benchmarks.plots import pyplot, save

    shares = sorted({r["retain"] for r in records if r["row"] != REFERENCE_ROW}, reverse=True)
    figure, panels = pyplot.subplots(1, len(shares), figsize=(5.5 * len(shares), 4), sharey=True)
    for panel, share in zip(np.atleast_1d(panels), shares, strict=True):
        for r in records:
            if r["retain"] != share and r["row"] != REFERENCE_ROW:
                continue
            backs = sorted(int(back) for back in r["by_back"])
            found = {int(back): value for back, value in r["by_back"].items()}
            backs = [back for back in backs if found[back]["asked"] >= 20]
            values = [100 * found[back]["share"][0] for back in backs]
            dash = "--" if r["row"] == REFERENCE_ROW else "-"
            (line,) = panel.plot(backs, values, dash, marker=".", label=r["row"])
            low, high = ([100 * found[back]["share"][i] for back in backs] for i in (1, 2))
            panel.fill_between(backs, low, high, alpha=0.12, color=line.get_color())
        panel.set_title(f"facts stated once, {share:g} of each window kept")
        panel.set_xlabel("distance of the fact, in windows")
        panel.grid(alpha=0.3)
    first, last = np.atleast_1d(panels)[[0, -1]]
    first.set(ylabel="right answers, %", ylim=(0, 102))
    last.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    save(figure, path)


def parser(spec: Any, description: str) -> argparse.ArgumentParser:
    """What every way to perform the answers can be told."""
    parser = command_line.parser(spec, description)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--model", type=command_line.model_folder, help="default: the embedded one")
    parser.add_argument(
        "--scripts", type=command_line.whole(), default=40, help="forced answers per row"
    )
    parser.add_argument(
        "--first",
        type=command_line.whole(0),
        default=0,
        metavar="SEED",
        help="of the first; a search for better scores takes those from 1000 on; default: %(default)s",
    )
    parser.add_argument(
        "--window", type=command_line.whole(), default=128, help="tokens; default: %(default)s"
    )
    parser.add_argument(
        "--windows", type=command_line.whole(), default=8, help="windows before the first question"
    )
    parser.add_argument("--facts", type=command_line.whole(), default=3, help="per window")
    parser.add_argument(
        "--retain",
        nargs="+",
        type=command_line.share,
        default=[0.5, 0.25],
        metavar="SHARE",
        help="default: 0.5 0.25",
    )
    parser.add_argument(
        "--delay", type=command_line.whole(0), metavar="N", help="in all rows but paper; default: 64"
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="SELECTOR", help="default: all selectors and paper"
    )
    parser.add_argument("--plot", type=Path, help="draw shares by distance into this file")
    parser.add_argument("--folder", type=Path, help="run folder; by default --out with the suffix .run")
    return parser


class Run:
    """The forced answers of one call, and the rows that perform them.

    Parameters
    ----------
    options
        Of :func:`parser`.

    Raises
    ------
    EmbeddedModelMissing
    EngineFailed
        There are no such rows or not so many facts.

    Attributes
    ----------
    model
        A folder.
    folder
        Of the results.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.options = options
        self.model: str = options.model or str(embedded_model_path())
        self.folder: Path = (options.folder or options.out.with_suffix(".run")).resolve()
        if options.windows * options.facts > len(NAMES):
            raise EngineFailed(
                f"--windows {options.windows} --facts {options.facts}: {len(NAMES)} facts at most"
            )
        names = options.rows or [*(n for n in REGISTRY if n not in ("identity", "causal")), PAPER]
        try:
            unknown = set(variants.register(names)) - {PAPER}
        except ValueError as error:
            raise EngineFailed(f"--rows: {error}") from None
        if unknown:
            known = ", ".join([*REGISTRY, PAPER])
            raise EngineFailed(f"--rows {', '.join(sorted(unknown))}: there is {known}")
        window, retains = options.window, tuple(options.retain)
        self.rows = [reference(window), *selectors(names, window, retains)]
        if options.delay is not None:
            self.rows = [r if r.name == PAPER else r.delayed(options.delay) for r in self.rows]
        encode = encoder(AutoTokenizer.from_pretrained(self.model))
        size = {key: getattr(options, key) for key in ("window", "windows", "facts")}
        numbers = range(options.first, options.first + options.scripts)
        settle = max(SETTLE, options.delay or 0)
        self.scripts = [script_of(encode, number, settle=settle, **size) for number in numbers]
        # Scripts are known by name: cells of others, or of other defaults, are not theirs.
        first = repr((self.scripts[0].prompt, self.scripts[0].forced)).encode()
        self._identity = {"model": Path(self.model).name, "script": zlib.crc32(first)}
        self._identity |= size | {"delay": options.delay} | defaults()

    def begin(self, **how: Any) -> None:
        """Make the folder, or go on in it; ``how`` says how the answers are performed.

        Raises
        ------
        EngineFailed
            It holds another run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        campaign.same_run(self.folder, self._identity | how)

    def end(self, **meta: Any) -> None:
        """Write and draw the figures of a run that is complete."""
        lengths = [len(script.forced) for script in self.scripts]
        meta |= {
            "model": Path(self.model).name,
            "kara_sglang": __version__,
            "scripts": len(self.scripts),
            "tokens_per_script": [min(lengths), max(lengths)],
        }
        records = figures(self.scripts, self.folder, self.rows)
        write_json(self.options.out, {"meta": meta, "results": records})
        print(table(records))
        if self.options.plot:
            plot(json.loads(self.options.out.read_text())["results"], self.options.plot)


def main(arguments: list[str]) -> int:
    known = parser(__spec__, __doc__)
    known.add_argument("--running", type=command_line.whole(), help="answers at once")
    known.add_argument("--dtype", help="default: the model's; without a GPU the fastest one")
    options = known.parse_args(arguments)
    try:
        run = Run(options)
        running = options.running or campaign.RUNNING
        dtype, threads = options.dtype, len(os.sched_getaffinity(0))
        if cpu_engine.is_installed():
            found = fastest(run.model, running)
            dtype = dtype or campaign.kept(run.folder).get("dtype") or found.dtype
            if dtype == MODELS_OWN:
                raise EngineFailed(f"{run.folder} holds answers of a GPU; give --folder")
            threads = found.threads
        run.begin(dtype=dtype or MODELS_OWN, by="engine")
        for script in run.scripts:
            script.save(run.folder)
        stages = campaign.orders(run.rows, run.scripts, run.folder, run.model, 1, running)
        if dtype is not None:
            for order in (order for stage in stages for order in stage):
                order.engine["dtype"] = dtype
        left = sum(len(order.requests) for stage in stages for order in stage)
        total = len(run.rows) * len(run.scripts)
        with tqdm(total=total, initial=total - left, desc="regimes", unit="cell") as bar:
            campaign.carry_out(stages, run.folder, "regimes", threads, bar.update)
    except (EmbeddedModelMissing, EngineFailed) as error:
        print(f"regimes: {error}", file=sys.stderr)
        return 1
    run.end(**origin(MODULE, arguments), dtype=dtype or MODELS_OWN)
    return 0


if __name__ == "__main__":
    end_on_sigterm()
    raise SystemExit(main(sys.argv[1:]))
