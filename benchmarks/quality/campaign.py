"""Fills the cells of a run folder: which servers to start, what each of them serves, and progress."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kara_sglang import cpu_engine
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.quality import engine, instrument, tasks, texts
from kara_sglang.benchmarks.quality.engine import PAGE_SIZE, EngineFailed, Order
from kara_sglang.benchmarks.quality.rows import Part, Row
from kara_sglang.benchmarks.quality.script import Script, cell_path, reference_path
from kara_sglang.benchmarks.ring import ring_of
from kara_sglang.config import KaraConfig

RUNNING = 32 if cpu_engine.is_installed() else 128
"""Requests that one engine runs at once; their KV takes memory."""


def same_run(folder: Path, identity: dict[str, Any]) -> None:
    """Keep what a run folder's results have in common, and refuse to mix them with others.

    Raises
    ------
    EngineFailed
    """
    if before := kept(folder):
        keys = dict.fromkeys([*identity, *before])
        if other := [key for key in keys if before.get(key) != identity.get(key)]:
            raise EngineFailed(
                f"{folder} holds another run (other {', '.join(other)}); give --folder or remove it"
            )
    else:
        write_json(folder / "run.json", identity)


def kept(folder: Path) -> dict[str, Any]:
    """What a run folder's results have in common; nothing where there are none yet."""
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def scripts_of(part: Part, tokenizer: Any, split: str) -> list[Script]:
    """The scripts of a part: one of each kind per text."""
    encode, beginning = tasks.encoder(tokenizer), tokenizer.encode("")
    scripts = []
    for number, text in enumerate(texts.load(split, part.texts)):
        scripts.append(tasks.text_script(encode, text, part.text, beginning))
        scripts.append(tasks.recall_script(encode, text, part.recall, number, beginning))
    return scripts


def is_done(folder: Path, row: Row, script: Script) -> bool:
    """Whether the cell need not be measured again."""
    if not cell_path(folder, row.key, script.name).is_file():
        return False
    needs_reference = row.name == instrument.REFERENCE_ROW and script.compared()
    return not needs_reference or reference_path(folder, script.name).is_file()


def servers(rows: list[Row]) -> list[list[Row]]:
    """Rows by server; the server of the reference comes first."""
    by_settings: dict[str, list[Row]] = {}
    for row in rows:
        key = json.dumps([row.settings, row.engine], sort_keys=True)
        by_settings.setdefault(key, []).append(row)
    return sorted(
        by_settings.values(),
        key=lambda members: all(row.name != instrument.REFERENCE_ROW for row in members),
    )


def query_memory(model: str, settings: dict[str, Any], running: int) -> float:
    """GiB that let every running request record all its heads, so that no row depends on the load."""
    ring = ring_of(model, settings)
    return (running + 1) * ring.most_bytes(ring.shape.group) / 2**30


def orders(
    rows: list[Row],
    scripts: list[Script],
    folder: Path,
    model: str,
    shards: int,
    running: int | None = None,
) -> list[list[Order]]:
    """What is left to do: a list of stages, each of them orders that can run side by side.

    ``running`` requests at once, by default :data:`RUNNING`.
    """
    running = running or RUNNING
    stages = []
    for members in servers(rows):
        settings = {"selector": "kara"} | members[0].settings
        config = KaraConfig.from_settings(settings)
        todo = [
            (row, script) for script in scripts for row in members if not is_done(folder, row, script)
        ]
        longest = max(len(script.prompt) + len(script.forced) for script in scripts)
        arguments = {
            "max_running_requests": running,
            "max_total_tokens": running * (longest + 2 * PAGE_SIZE),
        } | members[0].engine
        stage = []
        for shard in range(shards):
            mine = {script.name for script in scripts[shard::shards]}
            requests = [
                (
                    row.key,
                    script.name,
                    row.options,
                    0
                    if row.selector is None
                    else tasks.windows_done(script, config.window, config.delay, PAGE_SIZE),
                )
                for row, script in todo
                if script.name in mine
            ]
            if requests:
                memory = {"query_mem_gb": query_memory(model, settings, running)}
                stage.append(Order(model, settings | memory, arguments, requests))
        if stage:
            stages.append(stage)
    return stages


def carry_out(
    stages: list[list[Order]],
    folder: Path,
    name: str,
    threads: int,
    progress: Callable[[int], None],
) -> None:
    """Run the stages one after the other, the orders of each side by side.

    ``progress`` is told how many cells are new since it was last told.

    Raises
    ------
    EngineFailed
        With the end of the log of the engine that failed.
    """
    for number, stage in enumerate(stages):
        cells = [cell_path(folder, row, script) for o in stage for row, script, _, _ in o.requests]
        for path in cells:
            path.unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            running = {}
            for shard, order in enumerate(stage):
                title = f"{name}-{number}-{shard}"
                running[title] = stack.enter_context(engine.start(order, folder, title, threads))
            seen = 0
            while running:
                time.sleep(0.5)
                if (done := sum(path.is_file() for path in cells)) > seen:
                    progress(done - seen)
                    seen = done
                for title, process in list(running.items()):
                    if process.poll() is not None:
                        del running[title]
                        if process.returncode:
                            log = (folder / "logs" / f"{title}.log").read_text(errors="replace")
                            raise EngineFailed(
                                f"engine {title} failed; its log ends with\n{log[-3000:]}"
                            )
            progress(sum(path.is_file() for path in cells) - seen)
        if missing := [path for path in cells if not path.is_file()]:
            raise EngineFailed(f"{len(missing)} cells were not written, the first is {missing[0]}")
