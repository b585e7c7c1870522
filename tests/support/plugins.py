"""Modules of this folder as plugins of SGLang: each has a function ``load`` that SGLang calls in each
process."""

from __future__ import annotations

import os
from pathlib import Path


def install(folder: Path, *names: str) -> dict[str, str]:
    """What a server's environment must have so that SGLang finds these plugins."""
    about = folder / "tests_plugins-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tests-plugins\nVersion: 0\n")
    entries = "".join(f"{name} = {name}:load\n" for name in names)
    (about / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{entries}")
    path = (str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    return {"PYTHONPATH": os.pathsep.join(filter(None, path))}
