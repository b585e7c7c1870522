"""The documents list exactly what the code has."""

from __future__ import annotations

import contextlib
import io
import json
import pkgutil
import re
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import render
import told
from places import ROOT

from kara_sglang import options
from kara_sglang.benchmarks.serving import tables
from kara_sglang.config import FLAGS, PRESETS, KaraConfig
from kara_sglang.kernels.selectors import REGISTRY

README = ROOT / "README.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
THROUGHPUT = ROOT / "docs" / "throughput.md"
USAGE = ROOT / "docs" / "usage.md"


def table(path: Path, marker: str) -> list[list[str]]:
    """Cells of the table behind ``marker`` (an HTML comment or a heading), without its header."""
    lines = path.read_text().split(f"\n{marker}\n", 1)[1].lstrip("\n").splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert len(rows) > 2, f"no table behind {marker}"
    return rows[2:]


def bare(cell: str) -> str:
    return cell.strip("`")


@pytest.mark.parametrize("path,kind,made", render.TABLES)
def test_rendered_tables_are_the_codes(path: Path, kind: str, made: str):
    document, end = path.read_text(), f"<!-- end of {kind} -->"
    assert document.count(f"<!-- {kind} -->\n") == document.count(end) == 1
    found = document.partition(f"<!-- {kind} -->\n")[2].partition(end)[0]
    assert found == made, "run make tables"
    assert made.count("\n") > 5


def test_the_settings_are_the_codes_with_their_defaults():
    default = KaraConfig()
    expected = [
        (name, FLAGS.get(name, "key"), json.dumps(getattr(default, name)).strip('"'))
        for name in KaraConfig.__dataclass_fields__
    ]
    rows = [
        row for mark in ("settings", "experiments") for row in table(CONFIGURATION, f"<!-- {mark} -->")
    ]
    assert sorted((bare(row[0]), bare(row[1]), bare(row[3])) for row in rows) == sorted(expected)


def test_the_presets_are_the_codes():
    listed = {bare(row[0]): row[1] for row in table(CONFIGURATION, "<!-- presets -->")}
    expected = {
        name: ", ".join(f"`{key}` = `{json.dumps(value)}`" for key, value in preset.items())
        for name, preset in PRESETS.items()
    }
    assert listed == expected


def test_the_request_options_are_the_codes():
    listed = [bare(row[0]) for row in table(CONFIGURATION, "<!-- request options -->")]
    assert sorted(listed) == sorted(options.FIELDS)
    assert options.KEY == "kv_compress"


def test_the_readmes_flags():
    default = KaraConfig()
    rows = {bare(row[0]): bare(row[2]) for row in table(README, "<!-- flags -->")}
    assert list(rows) == [*FLAGS.values(), "--kv-compress-config"]
    assert rows["--kv-compress-window"] == str(default.window)
    assert rows["--kv-compress-retain"] == str(default.retain)
    assert default.query_mem_gb is None and rows["--kv-compress-query-mem-gb"] == "as needed"


def test_the_selectors_are_the_registry():
    rows = table(USAGE, "<!-- selectors -->")
    listed = {bare(row[0]): row[2] for row in rows}
    assert len(rows) == len(listed)
    assert listed == {
        name: "yes" if selector.needs_queries else "no" for name, selector in REGISTRY.items()
    }


def test_the_metrics_are_the_exported_ones():
    source = (ROOT / "kara_sglang" / "scheduler" / "metrics.py").read_text()
    counters = re.findall(r'\bcounter\(\s*"(\w+)"', source)
    gauges = re.findall(r'\bgauge\(\s*"(\w+)"', source)
    assert len(counters) == source.count("counter(") - 1 and len(gauges) == source.count("gauge(") - 1
    names = [f"{name}_total" for name in counters] + gauges
    listed = [bare(row[0]) for row in table(USAGE, "<!-- metrics -->")]
    assert listed == [f"sglang:kv_compress_{name}" for name in names]


def test_the_example_of_the_ring_prints_what_it_says():
    text = CONFIGURATION.read_text().split("<!-- ring example -->\n", 1)[1]
    command, output = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)[:2]
    program = re.search(r"<<'END'\n(.*)^END$", command, re.DOTALL | re.MULTILINE)
    assert program is not None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program[1], {})
    assert printed.getvalue() == output


BESIDE = {
    "--kv-cache-dtype": "fp8 KV",
    "--lora-backend": "LoRA",
    "--chunked-prefill-size": "chunked prefill",
    "--enable-priority-scheduling": "priorities",
    "--enable-hierarchical-cache": "HiCache",
    "--tp-size": "tensor parallelism",
}
"""Flags, and the words for them in the table of what runs together with drafts."""


def with_drafts(flags: tuple[str, ...], file: str, slow: bool = False) -> tuple[str, ...]:
    """A server of a test as a row of that table."""
    given = {flag: value for flag, value in pairwise((*flags, "")) if flag.startswith("--")}
    name, count = given["--speculative-algorithm"], given["--speculative-num-draft-tokens"]
    breadth = "ngram-max-bfs-breadth" if name == "NGRAM" else "eagle-topk"
    return (
        f"{name} {count} / {given['--speculative-' + breadth]}",
        given["--page-size"],
        "off" if "--disable-overlap-schedule" in given else "on",
        given.get("--kv-compress-prefix-reuse", "exact"),
        ", ".join(word for flag, word in BESIDE.items() if flag in given),
        f"`{file}`" + (", slow" if slow else ""),
    )


def test_the_combinations_with_drafts_are_those_of_the_tests(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "engine")
    import server
    import test_combinations
    import test_draft_combinations
    import test_speculation
    import test_tensor_parallel
    import test_torture

    expected = [
        with_drafts(flags, "test_speculation", kind in test_speculation.SLOW)
        for kind, flags in test_speculation.KINDS.items()
    ]
    expected.append(with_drafts(test_combinations.MANY, "test_combinations"))
    expected += [
        with_drafts(flags, "test_draft_combinations", kind in test_draft_combinations.SLOW)
        for kind, flags in test_draft_combinations.KINDS.items()
    ]

    engine = (ROOT / "tests" / "support" / "tp2_engine.py").read_text()
    told = ("--page-size", "16", "--kv-compress-prefix-reuse", "compressed", "--tp-size", "2")
    assert all(words in engine for words in ("page_size=16", 'prefix_reuse="compressed"', "tp_size=2"))
    for (drafts,) in parameters(test_tensor_parallel.test_engine_with_two_ranks, "drafts"):
        if drafts.values[0]:
            flags = [word for name, value in drafts.values[0].items() for word in (name, str(value))]
            flags[::2] = ["--" + name.replace("_", "-") for name in flags[::2]]
            expected.append(with_drafts((*flags, *told), "test_tensor_parallel", bool(drafts.marks)))

    monkeypatch.setattr(server, "launch", lambda _model, _log, *flags, env: flags)
    many = test_torture.test_many_odd_requests_stay_boring
    for page, reuse, drafts in parameters(many, "page_size", "reuse", "drafts"):
        if drafts.values[0]:
            flags = server.launch_small(ROOT, ROOT, page.values[0], reuse.values[0], *drafts.values[0])
            slow = any(mark.name == "slow" for mark in many.pytestmark)
            expected.append(with_drafts(flags, "test_torture", slow))
    assert [tuple(row) for row in table(USAGE, "<!-- drafts -->")] == list(joined(expected))


def joined(rows: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Rows that differ in page size and prefix reuse only, as one: all pairs of these are run."""
    for (name, overlap, beside, file), same in groupby(rows, lambda row: (row[0], row[2], *row[4:])):
        pairs = [(row[1], row[3]) for row in same]
        pages, reuses = (list(dict.fromkeys(column)) for column in zip(*pairs, strict=True))
        assert pairs == list(product(pages, reuses))
        yield (name, ", ".join(pages), overlap, ", ".join(reuses), beside, file)


def parameters(test: Callable[..., None], *names: str) -> Iterator[tuple[Any, ...]]:
    """The combinations of a test's parameters, each as ``pytest.param`` makes it."""
    marks = {mark.args[0]: mark.args[1] for mark in test.pytestmark if mark.name == "parametrize"}
    params = [[one if hasattr(one, "marks") else pytest.param(one) for one in marks[n]] for n in names]
    return product(*params)


def test_the_throughput_tables_are_the_committed_results():
    """A figure edited by hand, or a result exchanged without its tables, is found here."""
    results = ROOT / "benchmarks" / "results" / "serving" / "README.md"
    for path, shown in ((README, "quick/"), (THROUGHPUT, "quick/"), (results, "tiny/")):
        text = path.read_text()
        assert re.search(rf"<!-- serving:{shown}.* -->\n\| (row|point) \|", text)
        command = f"python -m kara_sglang.benchmarks.serving.tables {path.relative_to(ROOT)}"
        assert tables.render(text) == text, f"run {command}"


def test_the_readme_is_read_in_five_minutes():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1500


RUN_BY = {
    "python -": ("unit/repository/test_docs.py", "exec(program"),
    "kara_sglang.doctor": ("unit/test_doctor.py", "doctor.main("),
    "kara_sglang.plan": ("unit/plan/test_deployment.py", "plan.main("),
    "kara_sglang.compat": ("unit/compat/test_command.py", "command.main("),
    "kara_sglang.frontend": ("engine/test_frontend.py", '"kara_sglang.frontend", "solve"'),
    "kara_sglang.top": ("engine/test_watching.py", '"kara_sglang.top"'),
    "kara_sglang.trace": ("engine/test_serving.py", '"kara_sglang.trace", "show"'),
    "kara_sglang.benchmarks.gpu.identity": ("kernels/test_gpu_benchmark.py", "identity.main("),
    "kara_sglang.benchmarks.quality.reasoning": (
        "unit/benchmarks/test_reasoning.py",
        "reasoning.main(",
    ),
    "kara_sglang.benchmarks.reuse.modes": ("engine/test_frontend.py", "modes.compare("),
    "kara_sglang.benchmarks.serving": (
        "engine/test_serving_benchmark.py",
        '"kara_sglang.benchmarks.serving"',
    ),
    "kara_sglang.benchmarks.steps": ("unit/scheduler/test_calendar.py", "steps.main("),
    "sglang.launch_server": ("support/server.py", '"sglang.launch_server"'),
    "make serve": ("engine/conftest.py", "`make serve` runs it"),
    "make style": ("../.github/workflows/style.yml", "make style types"),
    "make tables": ("unit/repository/test_docs.py", "render.TABLES"),
    "make test": ("../.ci/run", "goal=test"),
    "make test-sglang": ("../.ci/run", "test-sglang VERSION"),
    "make check-wheel": ("../.github/workflows/wheel.yml", "make check-wheel"),
    "curl": ("engine/test_serving.py", "documented("),
    "pip install": ("unit/repository/test_packaging.py", '"pip", "install"'),
}
"""The test or workflow that runs each program that the documents tell to run, and how."""
NOT_RUN = {
    "docker": "not built, not run",
    "systemctl": "not run",
    "sglang_router.launch_router": "run by hand",
    "make test-triton": "by hand",
    "kara_sglang.benchmarks.quality": "by hand",
    "kara_sglang.benchmarks.quality.coder_model": "by hand",
    "kara_sglang.benchmarks.quality.drafts": "by hand",
    "kara_sglang.benchmarks.quality.regimes": "by hand",
    "kara_sglang.benchmarks.quality.report": "by hand",
    "kara_sglang.benchmarks.research.regimes": "by hand",
    "kara_sglang.benchmarks.research.search": "by hand",
    "kara_sglang.benchmarks.reuse": "by hand",
    "kara_sglang.benchmarks.reuse.match": "by hand",
    "kara_sglang.benchmarks.serving.longest": "by hand",
    "kara_sglang.benchmarks.serving.overhead": "by hand",
    "git": "by hand",
    "twine": "by hand",
}
"""Programs that no test runs, and how each page that names them says so."""


@pytest.mark.parametrize("path", told.PAGES, ids=lambda p: p.name)
def test_commands_are_run_by_a_test_or_named_as_not_run(path: Path):
    for program, line in told.commands(path):
        if program in NOT_RUN:
            assert NOT_RUN[program] in " ".join(path.read_text().split()), line
        else:
            file, runs = RUN_BY[program]
            assert runs in (ROOT / "tests" / file).read_text(), line


def test_the_documents_stay_short():
    """Words are what holds a letter, outside of code blocks."""
    words = 0
    for path in (ROOT / "docs").glob("*.md"):
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        words += sum(re.search("[A-Za-z]", word) is not None for word in text.split())
    assert 6000 < words <= 12_000


def test_dotted_names_in_the_documents_are_there():
    """`kara_sglang.trace.format.load` and the like, outside of commands."""
    for path in (README, *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"`(kara_sglang(?:\.\w+)+)\b", path.read_text()):
            pkgutil.resolve_name(name)


def test_links_between_the_documents_lead_somewhere():
    pages = (*(ROOT / "docs").glob("*.md"), *(ROOT / ".github").glob("*.md"))
    results = (ROOT / "benchmarks" / "results").glob("*/README.md")
    for path in (README, ROOT / "CHANGELOG.md", *pages, *results):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
