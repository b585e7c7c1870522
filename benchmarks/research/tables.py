"""The tables of ``quality`` by replay: the same rows perform the same scripts, without a server.

    python -m kara_sglang.benchmarks.research.tables --part main --out full.json

An engine on a CPU gives an answer token by token; a replay computes all tokens between two compressions
at once. ``tests/engine/test_forced_decoding.py`` holds both together. Rows that need what only an
engine has (``ring`` in fp4, ``kv``) are refused.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kara_sglang.benchmarks.machine import command
from kara_sglang.benchmarks.quality import tables, variants
from kara_sglang.benchmarks.quality.engine import EngineFailed
from kara_sglang.benchmarks.quality.rows import Part, Row
from kara_sglang.benchmarks.quality.script import Script, cell_path
from kara_sglang.benchmarks.research.replay import Plan, Replay
from kara_sglang.config import KaraConfig

MODULE = "kara_sglang.benchmarks.research.tables"


class Replays:
    """Perform scripts through transformers.

    Parameters
    ----------
    model
        A folder.
    dtype
        ``float32`` or ``bfloat16``.
    """

    def __init__(self, model: str, dtype: str) -> None:
        self._replay = Replay(model, getattr(torch, dtype))
        self.meta: dict[str, Any] = {
            "transformers": importlib.metadata.version("transformers"),
            "dtype": dtype,
        }

    def perform(self, part: Part, scripts: list[Script], folder: Path) -> None:
        """Fill the cells that the run folder lacks.

        Raises
        ------
        EngineFailed
            For a row that only an engine can perform.
        """
        fill(self._replay, part.rows, scripts, folder, part.name)


def fill(
    replay: Replay, rows: Sequence[Row], scripts: Sequence[Script], folder: Path, title: str
) -> None:
    """Perform what a run folder lacks; each script has a seed of its own.

    Raises
    ------
    EngineFailed
        For a row, or a model, that only an engine can perform.
    """
    plans = {row.key: plan_of(row) for row in rows}
    with torch.no_grad(), tqdm(total=len(scripts) * len(plans), desc=title, unit="cell") as bar:
        for script in scripts:
            seed = zlib.crc32(script.name.encode())
            for key, plan in plans.items():
                if not cell_path(folder, key, script.name).is_file():
                    seeded = dataclasses.replace(plan, seed=seed)
                    whole = plan.selector is None
                    cell = replay.full(script) if whole else replay.run(script, seeded)
                    cell.save(folder, key, script.name)
                bar.update()
            replay.forget()


def plan_of(row: Row) -> Plan:
    """How a server would compress the requests of a row, but for the seed.

    Raises
    ------
    EngineFailed
        Where only an engine can perform the row.
    """
    if row.engine:
        raise EngineFailed(f"row {row.name!r} needs an engine: {', '.join(row.engine)}")
    if row.selector is not None:
        variants.register([row.selector])
    config = KaraConfig.from_settings({"retain": row.retain} | row.settings)
    try:
        return Plan.of(row.selector, config)
    except ValueError as error:
        raise EngineFailed(f"row {row.name!r} needs an engine: {error}") from None


def main(arguments: list[str]) -> int:
    known = tables.parser(__spec__, __doc__)
    known.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s"
    )
    options = known.parse_args(arguments)
    if not (options.quick or options.part):
        known.error("give --quick, --part main or --part windows; the others need an engine")
    return tables.make(
        options,
        command(MODULE, arguments),
        lambda model: Replays(model, options.dtype),
        by="replay",
        dtype=options.dtype,
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
