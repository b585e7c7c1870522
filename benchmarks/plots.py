"""Drawing without a screen; imports matplotlib, which only the plots need."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

__all__ = ["Figure", "pyplot", "save"]


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write the figure and let go of it; the same figures give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    pyplot.close(figure)
