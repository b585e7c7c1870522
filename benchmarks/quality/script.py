"""What a request is made to say, and what is measured while it says it.

A *script* is a prompt and the tokens that are forced as its answer. A *probe* is a stretch of the
answer whose tokens are measured. Scripts and results travel between this process and SGLang's
scheduler as files of a run folder, because a request can only carry flat scalars::

    scripts/<script>.json             the script
    reference/<script>.npy            log-probabilities of the full cache at the compared steps
    cells/<row>/<script>.json         what one request gave; its presence means that it is done

Step i of an answer is the one that gives its token i; its input is the last prompt token for i = 0 and
the forced token i - 1 after that.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from kara_sglang.benchmarks.output import write_json

FOLDER_ENV = "KARA_QUALITY_FOLDER"
"""Names the run folder; only a process that the instrument has started has it."""
VARIANTS_ENV = "KARA_QUALITY_VARIANTS"
"""Selectors of ``variants.py`` that this process registers, separated by spaces."""
SCRIPT_KEY = "quality_script"
ROW_KEY = "quality_row"
"""Fields of a request's ``custom_params``."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A stretch of the answer that is measured.

    Attributes
    ----------
    kind
        ``text`` for running text, otherwise the kind of fact that is asked for.
    start, stop
        Steps, half open.
    compared
        Whether the whole distribution is compared with the full cache's (KL divergence).
    offset
        Where the fact stands, as a share of its window (0 to 1); None for text.
    back
        How many windows before the newest compressed one it stands; None for text.
    source
        The step that gave the first token of what each step repeats, when it was said last.
    """

    kind: str
    start: int
    stop: int
    compared: bool = False
    offset: float | None = None
    back: int | None = None
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """One request: ``len(forced)`` tokens are forced behind ``prompt``."""

    name: str
    source: str
    prompt: list[int]
    forced: list[int]
    probes: list[Probe] = field(default_factory=list)
    stride: int = 1
    """Every how many steps of a compared probe the distribution is kept."""

    def measured(self) -> list[int]:
        """Steps whose forced token is measured, ascending."""
        return sorted({step for probe in self.probes for step in range(probe.start, probe.stop)})

    def compared(self) -> list[int]:
        """Steps whose distribution is compared with the full cache's, ascending."""
        return sorted(
            {
                step
                for probe in self.probes
                if probe.compared
                for step in range(probe.start, probe.stop, self.stride)
            }
        )

    def save(self, folder: Path) -> None:
        """Write ``scripts/<name>.json`` of the run folder."""
        write_json(folder / "scripts" / f"{self.name}.json", dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path, name: str) -> Script:
        """Read ``scripts/<name>.json`` of the run folder."""
        data = json.loads((folder / "scripts" / f"{name}.json").read_text())
        return cls(**(data | {"probes": [Probe(**probe) for probe in data["probes"]]}))


@dataclass(frozen=True, slots=True)
class Cell:
    """What one row gave for one script; lists are parallel to the script's steps.

    Attributes
    ----------
    logprob, top, slots
        Per measured step: log-probability of the forced token (nats), whether it was the most likely
        one, KV slots that the request held.
    kl
        Per compared step: KL divergence of this row's distribution from the full cache's, in nats;
        empty for the row that is the reference.
    """

    logprob: list[float]
    top: list[bool]
    slots: list[int]
    kl: list[float]

    def save(self, folder: Path, row: str, script: str) -> None:
        """Write the cell's file of the run folder."""
        write_json(cell_path(folder, row, script), dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path, row: str, script: str) -> Cell:
        """Read the cell's file of the run folder."""
        return cls(**json.loads(cell_path(folder, row, script).read_text()))


def cell_path(folder: Path, row: str, script: str) -> Path:
    """The file that says that a cell is done."""
    return folder / "cells" / row / f"{script}.json"


def reference_path(folder: Path, script: str) -> Path:
    """Log-probabilities of the full cache, shape ``(len(compared), vocab)``, float32."""
    return folder / "reference" / f"{script}.npy"
