"""Results as JSON files; needs nothing but Python."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_json(path: Path | None, value: object, indent: int | None = None) -> None:
    """Write ``value`` at once, so that whoever sees the file sees all of it, whatever happens to this
    process. None: nothing is written."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=indent) + "\n")
    scratch.replace(path)
