"""From cells to figures: JSON, tables in Markdown, plots.

    python -m kara_sglang.benchmarks.quality.report RESULT.json [--plot FILE.png]
    python -m kara_sglang.benchmarks.quality.report --into README.md docs/quality.md

renders the tables of a result or draws its plot, and puts the tables of the committed results into
documents, between the lines ``<!-- quality:NAME -->`` and ``<!-- end of quality -->``. A name is
``RESULT PART/GROUP`` with the file's name without its suffix, and ``@SHARE`` behind it for the rows of
one share only, ``RESULT PART/kinds`` (or with a share), ``RESULT PART/goals``, or ``RESULT`` alone
for one of ``reasoning.py`` or ``regimes.py``. Marks of results that are not there stay as they are.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks import command_line, marked
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.quality import reasoning, regimes
from kara_sglang.benchmarks.quality.estimates import (
    Estimate,
    Observation,
    known,
    mean,
    observe,
    ranks,
    ratio,
)
from kara_sglang.benchmarks.quality.instrument import REFERENCE_ROW
from kara_sglang.benchmarks.quality.rows import Part
from kara_sglang.benchmarks.quality.script import Cell, Script

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality"
BASELINES = ("random", "recent", "snapkv")


def collect(part: Part, scripts: list[Script], folder: Path) -> dict[str, list[Observation]]:
    """Observations per row, one per script, in the scripts' order."""
    return {
        row.key: [observe(script, Cell.load(folder, row.key, script.name)) for script in scripts]
        for row in part.rows
    }


def figures(part: Part, scripts: list[Script], folder: Path) -> list[dict[str, Any]]:
    """One record per row; ``*_se`` is the standard error over texts."""
    seen = collect(part, scripts, folder)
    full = seen[REFERENCE_ROW]
    records = []
    for row in part.rows:
        mine = seen[row.key]
        text = [(o, f) for o, f in zip(mine, full, strict=True) if o.nll is not None]
        facts = [(o, f) for o, f in zip(mine, full, strict=True) if o.recall is not None]
        nll = mean([_there(o.nll) for o, _ in text])
        record: dict[str, Any] = {
            "part": part.name,
            "group": row.group,
            "row": row.name,
            "retain": row.retain,
            "settings": row.settings,
            "engine": row.engine,
            "texts": len(text),
            "facts": sum(len(s.probes) for s in scripts if s.probes[0].back is not None),
            "recall_by_kind": _counts([o.by_kind for o in mine]),
            "recall_by_place": _counts([o.by_place for o in mine]),
        }
        values = {
            # The reference differs from itself by nothing; its cells hold no KL.
            "kl_text": mean([o.kl or 0.0 for o, _ in text]),
            "perplexity": Estimate(math.exp(nll.value), math.exp(nll.value) * nll.error),
            "nll_over_full": mean([_there(o.nll) - _there(f.nll) for o, f in text]),
            "recall": mean([_there(o.recall) for o, _ in facts]),
            "recall_below_full": mean([_there(f.recall) - _there(o.recall) for o, f in facts]),
            "recall_logprob": mean([_there(o.recall_logprob) for o, _ in facts]),
            "slots": mean([o.slots for o, _ in text]),
        }
        for back in sorted(facts[0][0].by_back):
            values[f"recall_back_{back}"] = mean([o.by_back[back] for o, _ in facts])
            values[f"recall_back_{back}_below_full"] = mean(
                [f.by_back[back] - o.by_back[back] for o, f in facts]
            )
        for name, estimate in values.items():
            record[name] = estimate.value
            record[f"{name}_se"] = known(estimate.error)
        records.append(record)
    return records


def _there(value: float | None) -> float:
    """A figure that scripts of this kind have."""
    assert value is not None
    return value


def _counts(cells: list[dict[str, list[float]]]) -> dict[str, list[int]]:
    """Per kind or place of facts how many were right, and how many there are."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        for name, right in cell.items():
            found.setdefault(name, []).extend(right)
    return {name: [int(sum(right)), len(right)] for name, right in sorted(found.items())}


def goals(part: Part, scripts: list[Script], folder: Path) -> dict[str, Any]:
    """What the project wants of ``kara``, as measured against the other selectors that are there; empty
    without the paper's."""
    rows = {(row.name, row.retain): row for row in part.rows}
    present = {name for name, _ in rows}
    if not {"paper", "kara"} <= present:
        return {}
    seen = collect(part, scripts, folder)
    out: dict[str, Any] = {}
    shares = sorted({retain for name, retain in rows if name == "kara"}, reverse=True)
    for retain in shares:
        ours, paper = (seen[rows[name, retain].key] for name in ("kara", "paper"))
        kl = ratio([o.kl for o in ours if o.kl is not None], [o.kl for o in paper if o.kl is not None])
        better = [
            a.recall - _there(b.recall)
            for a, b in zip(ours, paper, strict=True)
            if a.recall is not None
        ]
        more = mean(better)
        out[f"{retain:g}"] = {
            "kl_text_over_paper": kl.value,
            "kl_text_over_paper_se": known(kl.error),
            "recall_over_paper": more.value,
            "recall_over_paper_se": known(more.error),
            "recall_below_full_by_offset": _below_full(ours, seen[REFERENCE_ROW]),
        }
    names = [name for name in ("kara", "paper", *BASELINES) if name in present]
    totals = dict.fromkeys(names, 0.0)
    contests = 0
    for retain in shares:
        observations = {name: seen[rows[name, retain].key] for name in names}
        for i, _ in enumerate(scripts):
            here = {name: observations[name][i] for name in names}
            if here["kara"].kl is not None:
                scores = {name: float(o.kl) for name, o in here.items() if o.kl is not None}
            else:
                scores = {n: -o.recall_logprob for n, o in here.items() if o.recall_logprob is not None}
            contests += 1
            for name, rank in ranks(scores).items():
                totals[name] += rank
    out["mean_rank"] = {name: total / contests for name, total in totals.items()}
    return out


def _below_full(
    ours: list[Observation], full: list[Observation]
) -> dict[str, tuple[float, float | None]]:
    """Recall lost against the full cache, by where in its window a fact stands; not the newest
    window's facts. Values with their standard errors."""
    pairs = [(o, f) for o, f in zip(ours, full, strict=True) if o.by_offset]
    found = {}
    for offset in sorted(pairs[0][0].by_offset) if pairs else ():
        lost = mean([f.by_offset[offset] - o.by_offset[offset] for o, f in pairs])
        found[f"{offset:g}"] = (lost.value, known(lost.error))
    return found


def table(records: list[dict[str, Any]], part: str, group: str, retain: str = "") -> str:
    """A Markdown table of a group's rows (of one share), the reference above them."""
    chosen = _chosen(records, part, group, retain)
    lines = []
    for r in chosen:
        kl = "0" if r["row"] == REFERENCE_ROW else _with_error(r, "kl_text", 4)
        digits = {"perplexity": 2, "recall": 3, "recall_logprob": 2}
        cells = [_with_error(r, name, places) for name, places in digits.items()]
        lines.append([r["row"], f"{r['retain']:g}", kl, *cells, f"{r['slots']:.0f}"])
    columns = ["row", "retain", "KL on text (nats)", "perplexity", "recall", "log p of answers"]
    return grid([*columns, "KV held"], lines)


def kinds_table(records: list[dict[str, Any]], part: str, retain: str = "") -> str:
    """The selectors' rows of a part (of one share): which kinds of facts they recall."""
    chosen = _chosen(records, part, "selectors", retain)
    kinds = list(chosen[0]["recall_by_kind"])
    lines = []
    for r in chosen:
        cells = (f"{right} of {asked}" for right, asked in r["recall_by_kind"].values())
        lines.append([r["row"], f"{r['retain']:g}", *cells])
    return grid(["row", "retain", *kinds], lines)


def _with_selectors(records: list[dict[str, Any]]) -> list[str]:
    """Parts that have selectors beside the reference, in their order."""
    rows = (r for r in records if r["group"] == "selectors" and r["row"] != REFERENCE_ROW)
    return list(dict.fromkeys(r["part"] for r in rows))


def _chosen(records: list[dict[str, Any]], part: str, group: str, retain: str) -> list[dict[str, Any]]:
    """A group's rows (of one share) with the reference above them."""
    return [
        r
        for r in records
        if r["part"] == part
        and (
            r["row"] == REFERENCE_ROW
            or (r["group"] == group and (not retain or r["retain"] == float(retain)))
        )
    ]


def _with_error(record: dict[str, Any], name: str, digits: int) -> str:
    return _plus_minus(record[name], record[f"{name}_se"], digits)


def _plus_minus(value: float, error: float | None, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def markdown(result: dict[str, Any]) -> str:
    """The whole result as a document."""
    meta = result["meta"]
    replayed = "transformers" in meta
    performer = (
        f"by replay in {meta['dtype']} with transformers {meta['transformers']}"
        if replayed
        else f"SGLang {meta['sglang']}"
    )
    lines = [
        "# Quality of compressed answers",
        "",
        f"`{meta['command']}`, {meta['model']}, {meta['split']} texts, {performer}, "
        f"kara-sglang {meta['kara_sglang']}, {meta['machine']}, {meta['seconds'] / 60:.0f} minutes.",
        "",
    ]
    groups = dict.fromkeys((r["part"], r["group"]) for r in result["results"])
    for part, group in groups:
        lines += [f"## {part}: {group}", "", table(result["results"], part, group)]
    for part in _with_selectors(result["results"]):
        lines += [f"## {part}: facts by kind", "", kinds_table(result["results"], part)]
    if result["goals"]:
        lines += ["## Goals", "", goal_table(result["goals"])]
    return "\n".join(lines)


def goal_table(found: dict[str, Any]) -> str:
    """KL and recall of ``kara`` against the paper's preset, and the mean ranks."""
    lines = []
    for retain, values in found.items():
        if retain != "mean_rank":
            kl = _with_error(values, "kl_text_over_paper", 2)
            lines.append([retain, kl, _with_error(values, "recall_over_paper", 3)])
    tables = [grid(["retain", "KL of kara / paper", "recall of kara - paper"], lines)]
    by_share = {
        retain: lost
        for retain, values in found.items()
        if retain != "mean_rank" and (lost := values["recall_below_full_by_offset"])
    }
    if by_share:
        offsets = list(next(iter(by_share.values())))
        first = "recall below full, facts before the newest window, by offset in their window"
        below = (
            [retain, *(_plus_minus(lost[o][0], lost[o][1], 3) for o in offsets)]
            for retain, lost in by_share.items()
        )
        tables.append(grid([first, *(f"{float(offset):.0%}" for offset in offsets)], below))
    by_rank = sorted(found["mean_rank"].items(), key=lambda pair: pair[1])
    ranks = ([name, f"{rank:.2f}"] for name, rank in by_rank)
    return "\n".join([*tables, grid(["selector", "mean rank"], ranks)])


def plot(result: dict[str, Any], path: Path) -> None:
    """KL and recall over the share retained, a line per selector."""
    try:
        from kara_sglang.benchmarks.plots import pyplot, save
    except ImportError:
        raise SystemExit(
            "--plot needs matplotlib; pip install 'kara-sglang[quality]' or pip install matplotlib"
        ) from None

    first = result["results"][0]["part"]
    records = [r for r in result["results"] if r["part"] == first and r["group"] == "selectors"]
    names = [
        n for n in dict.fromkeys(r["row"] for r in records) if n not in (REFERENCE_ROW, "identity")
    ]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in names:
        mine = sorted((r for r in records if r["row"] == name), key=lambda r: r["retain"])
        shares = [r["retain"] for r in mine]
        style = {"marker": "o", "linewidth": 2.5 if name == "kara" else 1.2, "capsize": 3}
        for axes, key in ((left, "kl_text"), (right, "recall")):
            errors = [r[f"{key}_se"] or 0 for r in mine]
            axes.errorbar(shares, [r[key] for r in mine], errors, label=name, **style)
    whole = next(r for r in records if r["row"] == REFERENCE_ROW)
    right.axhline(whole["recall"], color="black", linestyle=":", label="full cache")
    left.set(yscale="log", xlabel="share retained", ylabel="KL to the full cache on text (nats)")
    right.set(ylim=(0, 1), xlabel="share retained", ylabel="facts recalled")
    right.legend(fontsize="small")
    save(figure, path, dpi=120)


def put_into(document: str, folder: Path = RESULTS) -> str:
    """``document`` with every marked table rendered anew whose result is in ``folder``.

    Raises
    ------
    ValueError
        Where a mark names a part or a group that its result does not have.
    """

    def body(name: str) -> str | None:
        stem, _, place = name.partition(" ")
        path = folder / f"{stem}.json"
        if not path.is_file():
            return None
        result = json.loads(path.read_text())
        place, _, retain = place.partition("@")
        if not place:
            shown = (1, float(retain)) if retain else {r["retain"] for r in result["results"]}
            module = regimes if "by_back" in result["results"][0] else reasoning
            return module.table([r for r in result["results"] if r["retain"] in shown])
        part, _, group = place.partition("/")
        if group == "goals":  # of the first part that has all rows
            if result["results"][0]["part"] == part and result["goals"]:
                return goal_table(result["goals"])
        elif group == "kinds" and part in _with_selectors(result["results"]):
            return kinds_table(result["results"], part, retain)
        elif any(r["part"] == part and r["group"] == group for r in result["results"]):
            return table(result["results"], part, group, retain)
        raise ValueError(f"{path.name} has no {place}")

    return marked.fill(document, "quality", body)


def main() -> int:
    parser = command_line.parser(__spec__, "Render the tables and plots of results.")
    parser.add_argument(
        "result", nargs="?", type=Path, help="what quality --out has written: its tables"
    )
    parser.add_argument("--plot", type=Path, help="draw its KL and recall into this file instead")
    parser.add_argument("--into", nargs="+", type=Path, help="Markdown documents with marked tables")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="of these; default: the committed"
    )
    arguments = parser.parse_args()
    if (arguments.result is None) == (arguments.into is None):
        parser.error("give a result, or --into and documents")
    marked.rewrite(arguments.into or (), lambda text: put_into(text, arguments.results), parser)
    if arguments.result is not None:
        result = json.loads(arguments.result.read_text())
        if arguments.plot:
            plot(result, arguments.plot)
        else:
            print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
