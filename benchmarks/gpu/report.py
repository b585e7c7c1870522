"""Writing results as JSON; needs nothing but Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(report: dict[str, Any], path: Path | None) -> None:
    """Replace the file at once, so that it is whole whatever happens to this process."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        partial.replace(path)
