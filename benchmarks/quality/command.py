"""What compression costs the answers, measured through the real engine.

    python -m kara_sglang.benchmarks.quality --quick --out quality.json

Without ``--model`` it measures the embedded SmolLM2-135M-Instruct. Everything lies in a run folder
(``--folder``, by default beside ``--out``); the same command goes on where it was interrupted.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from tqdm import tqdm

from kara_sglang import cpu_engine
from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import command
from kara_sglang.benchmarks.quality import campaign, tables
from kara_sglang.benchmarks.quality.engine import engine_arguments
from kara_sglang.benchmarks.quality.pace import MODELS_OWN
from kara_sglang.benchmarks.quality.rows import Part
from kara_sglang.benchmarks.quality.script import Script

MODULE = "kara_sglang.benchmarks.quality"


class Engines:
    """Perform scripts through SGLang.

    Parameters
    ----------
    model
        A folder.
    jobs
        Engines side by side; None: as the machine has room.
    """

    def __init__(self, model: str, jobs: int | None) -> None:
        cores = len(os.sched_getaffinity(0))
        self._model = model
        self._jobs = jobs or (min(2, cores) if cpu_engine.is_installed() else 1)
        self._threads = max(1, cores // self._jobs)
        self.meta = {
            "sglang": importlib.metadata.version("sglang"),
            "dtype": engine_arguments().get("dtype", MODELS_OWN),
        }

    def perform(self, part: Part, scripts: list[Script], folder: Path) -> None:
        """Fill the cells that the run folder lacks.

        Raises
        ------
        EngineFailed
        """
        stages = campaign.orders(part.rows, scripts, folder, self._model, self._jobs)
        total = len(part.rows) * len(scripts)
        left = sum(len(order.requests) for stage in stages for order in stage)
        with tqdm(total=total, initial=total - left, desc=part.name, unit="cell") as bar:
            campaign.carry_out(stages, folder, part.name, self._threads, bar.update)


def main(arguments: list[str]) -> int:
    known = tables.parser(__spec__, __doc__)
    known.add_argument(
        "--jobs",
        type=command_line.whole(),
        help="engines side by side; default: 1 on a GPU, 2 on a CPU with cores for both",
    )
    options = known.parse_args(arguments)
    return tables.make(options, command(MODULE, arguments), lambda model: Engines(model, options.jobs))
